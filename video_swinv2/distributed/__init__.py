"""The processes of a run: launchers, ranks, devices, collectives, signals, and the lifeline that ends them together."""
