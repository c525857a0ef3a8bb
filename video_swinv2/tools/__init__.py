"""Tools around the three jobs."""
