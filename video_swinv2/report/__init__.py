"""What the scores of a test say: metrics with intervals, diagnosis, and the pages, texts and comparisons of them.

The way through the room: scores.npz (scores) -> accuracies with intervals (metrics, intervals), calibration, views and
class order (diagnosis), confusions and mistakes (confusion, mistakes) -> all of them in one object (analysis) ->
report.html, report.md and results.json (page, plots, markdown, training_run), or several tests side by side (compare).
Nothing here needs the model or the videos.
"""
