"""Training: engines, checkpoints, schedules, processes and the loop over them."""
