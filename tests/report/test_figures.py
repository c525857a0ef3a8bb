"""Fifty random score files: every figure of results.json and of the page against an independent computation."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report import independent
from tests.report.report_pages import RECORD, build_scores
from video_swinv2.report.page import write_report
from video_swinv2.report.scores import save_scores

GRIDS = ((1, 1), (4, 3), (3, 1), (1, 3), (2, 2), (5, 3))


def random_file(seed: int, folder: Path) -> None:
    """A random number of videos, classes, views, failures and sources; accuracy from chance to nearly perfect."""
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(6, 120)), int(rng.integers(2, 25))
    clips, crops = GRIDS[seed % len(GRIDS)]
    labels = rng.integers(0, max(1, k - int(rng.integers(0, 3))), n)
    logits = rng.normal(size=(n, clips * crops, k)) * rng.uniform(0.5, 3)
    logits[np.arange(n), :, labels] += rng.uniform(-1, 6)
    logits += rng.normal(size=(n, 1, k))
    failed = rng.choice(n, int(rng.integers(0, 4)), replace=False)
    record: dict[str, Any] = RECORD | {
        "protocol": f"random-{seed}",
        "protocol_numbers": {"clips": clips, "crops": crops},
        "average": ("prob", "logit")[seed % 2],
        "views": clips * crops,
        "data_fingerprint": f"{seed:064x}",
        "seed": seed,
        "lost_in_preparation": int(rng.integers(0, 3)),
    }
    if seed % 3 == 0:
        record["origins"] = [str(rng.integers(0, n // 3 + 1)) if rng.random() < 0.9 else "" for _ in range(n)]
    scores = build_scores(labels, logits, failed=failed, **record)
    save_scores(scores, folder / "scores.npz")


def assert_equal(found: Any, expected: Any, where: str) -> None:
    """Nested results are equal, numbers to within rounding."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key, value in expected.items():
            assert_equal(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, value in enumerate(expected):
            assert_equal(found[place], value, f"{where}[{place}]")
    elif isinstance(expected, (str, np.str_)) or expected is None:
        assert found == expected, where
    else:
        assert found == pytest.approx(float(expected), abs=1e-9), where


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def shown(expected: dict[str, Any]) -> list[str]:
    """Every figure as the page must show it."""
    words = [
        f"{percent(expected[key])} % {' to '.join(percent(end) for end in expected[key + '_interval'])}"
        for key in ("top5", "mean_class_accuracy")
        if expected[key] is not None
    ]
    words.append(f"{percent(expected['top1'])} % top-1")
    words.append(f"95 % interval {' to '.join(percent(end) for end in expected['top1_interval'])} over")
    words.append(f"{percent(expected['other_average']['top1'])} %")
    words.append(f"Expected calibration error {percent(expected['calibration']['ece'])} %")
    for row in expected["per_class"]:
        if row["n"]:
            low, high = (percent(end, 0) for end in row["interval"])
            words.append(f"{row['name']} {percent(row['accuracy'])} % {low} to {high}, n {row['n']}")
    words += [
        f"{pair['label']} {pair['answer']} {pair['count']} {percent(pair['share'])} %"
        for pair in expected["most_confused"]
    ]
    words += [
        f"{b['n']} videos, confidence {percent(b['confidence'])} %, accuracy {percent(b['accuracy'])} %"
        for b in expected["calibration"]["bins"]
    ]
    if len(expected["views_curve"]) > 1:
        words += [
            f"{percent(point['top1'])} {' to '.join(percent(end, 0) for end in point['interval'])}"
            for point in expected["views_curve"]
        ]
    return words


@pytest.mark.parametrize("first", range(0, 50, 10))
def test_every_figure_of_fifty_reports(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 10):
        random_file(seed, tmp_path)
        write_report(tmp_path)
        expected = independent.figures(tmp_path / "scores.npz")
        table, wrong = expected.pop("confusion"), expected.pop("surest_mistakes")
        result = json.loads((tmp_path / "results.json").read_text())
        assert_equal({key: result[key] for key in expected}, expected, f"file {seed}")
        assert [one["path"] for one in result["surest_mistakes"]] == [path for path, _ in wrong]

        raw = (tmp_path / "report.html").read_text()
        cells = json.loads(re.search(r'id="matrix-data">(.*?)</script>', raw)[1])["cells"]  # type: ignore[index]  # it is there
        drawn = np.zeros_like(table)
        drawn[cells[::3], cells[1::3]] = cells[2::3]
        np.testing.assert_array_equal(drawn, table)
        text = " ".join(unescape(re.sub(r"<[^>]*>", " ", raw)).split())
        for words in shown(expected):
            assert words in text, f"file {seed}: the page does not say {words!r}"
        said = (tmp_path / "report.md").read_text()
        for key in (key for key in ("top1", "top5", "mean_class_accuracy") if expected[key] is not None):
            ends = " to ".join(percent(end, 2) for end in expected[f"{key}_interval"])
            assert f"{percent(expected[key], 2)} % (95 % interval {ends}, {expected['videos']['scored']} videos" in said
