"""How is a model evaluated? Protocols and views, the multi-view test and its parts, frozen features and probes."""
