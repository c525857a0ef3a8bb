"""Data on its way to the model: which videos, which of their frames, and how they are read."""
