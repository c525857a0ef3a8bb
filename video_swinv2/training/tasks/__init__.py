"""The tasks that a run can learn, one file each. They all share the training loop."""
