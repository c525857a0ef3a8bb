"""Predicts the memory, work and time of a training run before it is started."""
