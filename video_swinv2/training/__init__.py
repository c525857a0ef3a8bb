"""What is learned, and when: the one training loop, its tasks, and what a run records about itself."""
