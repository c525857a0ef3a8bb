"""Memory, work and time of a run, worked out before it is started."""
