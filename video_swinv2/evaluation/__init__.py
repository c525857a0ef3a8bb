"""What does a test look at? Protocols, views, the multi-view test in parts, frozen features and probes."""
