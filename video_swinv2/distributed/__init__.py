"""The processes of a run: who they are, how they start, signals, and what they tell each other."""
