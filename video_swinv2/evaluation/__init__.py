"""Testing: multi-view protocols, scores that are kept, figures computed from them, and the report page."""
