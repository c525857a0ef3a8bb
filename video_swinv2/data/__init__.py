"""Data loading: which files a split holds, which of their frames make a sample, and how they are decoded."""
