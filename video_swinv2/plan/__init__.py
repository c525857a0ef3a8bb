"""Memory, work and time of a run, computed before it."""
