"""Reports as Markdown: the figures of a test or a comparison in a few tables, with every name escaped.

The functions take the content of results.json or comparison.json, so that text and data always agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from video_swinv2.escaping import for_markdown
from video_swinv2.report.intervals import MIN_SOURCES

MAX_ROWS = 20  # of a table; the JSON files list everything
ACCURACIES = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class accuracy"}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table. Cells are escaped; `head` is not, so it must be text of our own."""
    lines = [head, ["---"] * len(head), *([for_markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def percent(fraction: float | None) -> str:
    """A fraction as `62.50 %`; a dash for None."""
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def span(interval: Sequence[float] | None) -> str:
    """An interval of fractions as `41.67 to 79.17`, in percent; a dash for None."""
    return "-" if interval is None else " to ".join(f"{100 * end:.2f}" for end in interval)


def accuracy_line(result: Mapping[str, Any], key: str = "top1", words: str = "top-1") -> str:
    """An accuracy with everything needed to quote it: interval, sample size, protocol and data fingerprint.

    key: of the accuracy in `result`, a test in results.json or comparison.json. words: its name for people.
    """
    unit = result.get("unit", "videos")
    return (
        f"{words} {percent(result[key])} (95 % interval {span(result[f'{key}_interval'])}, "
        f"{result['videos']['scored']} {unit}, {result['protocol']}, data {result['data_fingerprint'][:12]})"
    )


def accuracy_lines(result: Mapping[str, Any]) -> list[str]:
    """Every accuracy that means something for the number of classes, and what it takes to beat.

    result: the content of results.json.
    """
    lines = [accuracy_line(result, key, words) for key, words in ACCURACIES.items() if result[key] is not None]
    lines.append(baseline_line(result))
    if result["two_classes"]:
        lines.append(f"ROC AUC {result['two_classes']['roc_auc']:.4f}")
        lines += [_detected_line(row) for row in result["two_classes"]["classes"]]
    warning = few_sources_warning(result["sources"], result.get("unit", "videos"))
    return [*lines, warning] if warning else lines


def baseline_line(result: Mapping[str, Any]) -> str:
    """What top-1 is to be compared with: a random answer, and the most frequent class whatever the video."""
    majority = result["majority"]
    return (
        f"by chance {percent(result['chance'])}; always answering {majority['class']!r}, the most frequent class, "
        f"{percent(majority['share'])}"
    )


def few_sources_warning(sources: int, unit: str) -> str:
    """A warning for intervals that rest on few sources; empty for MIN_SOURCES or more."""
    if sources >= MIN_SOURCES:
        return ""
    return (
        f"warning: the {unit} come from only {sources} independent source{'s' * (sources != 1)}; intervals from fewer "
        f"than {MIN_SOURCES} are rough, so add {unit} of other sources before you rely on them"
    )


def _detected_line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['name']!r} against the other class: precision {percent(row['precision'])}, recall "
        f"{percent(row['recall'])}, F1 {percent(row['f1'])}, PR AUC {row['pr_auc']:.4f} ({row['n']} of it)"
    )


def report_text(result: Mapping[str, Any]) -> str:
    """The report of one test as Markdown. result: the content of results.json."""
    videos, unit = result["videos"], result.get("unit", "videos")
    basis = for_markdown(f"{videos['scored']} {unit}, {result['protocol']}, data {result['data_fingerprint'][:12]}.")
    parts = [
        f"# Test of {for_markdown(result['model']['path'])}",
        _headline(result),
        f"## Accuracy by number of views\n\n{basis} Each value is the mean over subsets of the views of this test.",
        table(
            ["clips", "crops", "top-1", "95 % interval"],
            [
                (point["clips"], point["crops"], percent(point["top1"]), span(point["interval"]))
                for point in result["views_curve"]
            ],
        ),
        f"## Classes\n\n{basis} At most {MAX_ROWS}, worst first; results.json lists all.",
        table(["class", "accuracy", "95 % interval", unit], _class_rows(result)),
        f"## Most confused classes\n\n{basis}",
        table(
            ["label", "answer", unit, "share of the class"],
            [
                (pair["label"], pair["answer"], pair["count"], percent(pair["share"]))
                for pair in result["most_confused"]
            ],
        ),
    ]
    # The last section, because it may be long; left out if every video could be read.
    if result["failures"]:
        rows = [(failure["path"], failure["reason"]) for failure in result["failures"][:MAX_ROWS]]
        parts += [f"## Failed {unit}", table(["file", "reason"], rows)]
    return "\n\n".join(parts) + "\n"


def comparison_text(result: Mapping[str, Any]) -> str:
    """The comparison of several tests as Markdown. result: the content of comparison.json."""
    tests, pairs = result["tests"], result["pairs"]
    # All tests have the same classes, so top-5 means something for all of them or for none.
    has_top5 = tests[0]["top5"] is not None
    figures = [
        (
            test["letter"],
            test["folder"],
            f"{percent(test['top1'])} ({span(test['top1_interval'])})",
            *([f"{percent(test['top5'])} ({span(test['top5_interval'])})"] if has_top5 else []),
            f"{percent(test['mean_class_accuracy'])} ({span(test['mean_class_accuracy_interval'])})",
            f"{test['videos']['scored']} of {test['videos']['listed']}",
            test["protocol"],
            test["data_fingerprint"][:12],
        )
        for test in tests
    ]
    top5 = ["top-5"] if has_top5 else []
    head = ["", "test", "top-1 (95 % interval)", *top5, "mean class accuracy", "scored", "protocol", "data"]
    differences = [
        (
            f"{pair['first']} to {pair['second']}",
            f"{100 * pair['paired']['difference']:+.2f} ({span(pair['paired']['interval'])})",
            pair["paired"]["n"],
            f"{pair['paired']['only_first']} / {pair['paired']['only_second']}",
            f"{pair['paired']['p_value']:.2g}",
            f"{pair['p_holm']:.2g}",
        )
        for pair in pairs
    ]
    columns = ("pair", "top-1 difference, points", "n", "only first / only second correct", "McNemar p", "Holm p")
    verdicts = "\n".join(f"* {for_markdown(pair['verdict'])}" for pair in pairs)
    parts = [f"# {len(tests)} tests compared", verdicts, table(head, figures), table(columns, differences)]
    return "\n\n".join(parts) + "\n"


def _headline(result: Mapping[str, Any]) -> str:
    """The list at the top: accuracies, calibration, failures, and the warning of a wrong class order."""
    videos, unit, other = result["videos"], result.get("unit", "videos"), result["other_average"]
    lines = [f"* {for_markdown(line)}" for line in accuracy_lines(result)]
    lines.append(
        f"* top-1 with views averaged as {for_markdown(other['average'])}: {percent(other['top1'])} "
        f"({span(other['top1_interval'])}); this protocol averages {for_markdown(result.get('average', 'prob'))}"
    )
    lines.append(f"* expected calibration error {percent(result['calibration']['ece'])}")
    lines.append(
        f"* {videos['scored']} of {videos['listed']} listed {unit} scored, {videos['failed']} failed: top-1 over all "
        f"listed {unit}: {span(result['top1_bounds'])} %"
    )
    # In bold: with classes in the wrong order every accuracy above is meaningless.
    if result["class_order_hint"]:
        hint = result["class_order_hint"]
        rule = f" as if the model's class list were {hint['rule']}" if hint["rule"] else ""
        lines.append(
            f"* **the class order looks wrong**: with the classes renamed{rule}, top-1 would be "
            f"{percent(hint['accuracy'])} ({span(hint['interval'])}); results.json lists the renaming"
        )
    return "\n".join(lines)


def _class_rows(result: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """The worst classes, worst first, of equals those with more videos first; classes without videos are left out."""
    rows = [row for row in result["per_class"] if row["n"]]
    # As in `page.split_classes`, so that the text lists the classes that the page shows first.
    rows.sort(key=lambda row: (row["accuracy"], -row["n"]))
    return [(row["name"], percent(row["accuracy"]), span(row["interval"]), row["n"]) for row in rows[:MAX_ROWS]]
