"""What a run learns: one file per task. The training loop is the same for all of them."""
