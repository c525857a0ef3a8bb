"""Weights on disk: reads checkpoints of all known layouts, loads them into models, and writes model files."""
