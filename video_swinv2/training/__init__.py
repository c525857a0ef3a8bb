"""Training: the loop that all tasks share, the tasks themselves, and what a run records about itself."""
