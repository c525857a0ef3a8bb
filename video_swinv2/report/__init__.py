"""What do the scores of a test show? Metrics with intervals, diagnosis, and the reports and comparisons made of them.

From scores to pages, with the files that do it in parentheses: scores.npz is read (scores). From it come accuracies
with intervals (metrics, intervals), calibration, accuracy by number of views and class order (diagnosis), and
confusions and mistakes (confusion, mistakes). One object holds all of them (analysis). It is written as report.html,
report.md and results.json (page, plots, markdown, training_run) or compared with other tests (compare). Nothing here
needs the model or the videos.
"""
