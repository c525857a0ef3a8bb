"""The processes of a run: launchers, ranks and devices, signals, collectives, and the lifeline between processes."""
