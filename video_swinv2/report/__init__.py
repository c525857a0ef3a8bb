"""What the scores of a test say: figures, intervals, pages."""
