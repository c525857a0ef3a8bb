"""Tools for a new installation: `doctor` checks the machine, `demo` runs the whole path on generated clips."""
