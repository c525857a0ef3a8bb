"""Boxes and masks on the pyramid of SwinV2: the heads of dense tasks, their data and their metrics."""
