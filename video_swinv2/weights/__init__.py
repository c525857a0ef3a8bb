"""Weights on disk: whose they are, how they become this model's, and what became of every tensor."""
