"""What the tests of the report share: folders of random scores with hard names, and a parser that checks the page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch

from video_swinv2.report.metrics import Metrics, metrics_of_scores, video_probabilities
from video_swinv2.report.mistakes import film_strip, surest_mistakes
from video_swinv2.report.page import write_report
from video_swinv2.report.scores import Scores, save_scores, write_arrays

ATTACK = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "img", "input", "option"}
RECORD = {
    "protocol": "videoswin-4x3",
    "average": "prob",
    "views": 3,
    "frames": 8,
    "frame_stride": 4,
    "image_size": [64, 64],
    "frame_order": "in-order",
    "split": "test",
    "data": 'a "quoted" folder',
    "data_fingerprint": "ab" * 32,
    "model": {"path": "runs/<b>/model.safetensors"},
    "seed": 0,
}


def metrics_of(scores: Scores, average: str = "prob") -> Metrics:
    """The figures as a report has them."""
    return metrics_of_scores(scores, video_probabilities(scores, average), seed=0)


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] not in ("style", "script"):
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def make_folder(out: Path, classes: tuple[str, ...], n: int, failed: int = 2, **record: object) -> Scores:
    rng = np.random.default_rng(len(classes))
    labels = rng.integers(0, len(classes), n)
    logits = rng.normal(size=(n, 3, len(classes)))
    right = rng.random(n) < 0.6
    logits[np.arange(n), :, np.where(right, labels, (labels + 1) % len(classes))] += 4
    logits[:failed] = np.nan
    views = np.zeros((n, 3, 5), np.int32)
    views[:failed] = -1
    scores = Scores(
        tuple(f'dir/it\'s "{i}"\n& {ATTACK}.mp4' for i in range(n)),
        labels,
        logits.astype(np.float16),
        views,
        tuple(f"reason {ATTACK}" if i < failed else "" for i in range(n)),
        classes,
        RECORD | record,
    )
    out.mkdir(exist_ok=True)
    save_scores(scores, out / "scores.npz")
    return scores


def write_page(out: Path) -> str:
    write_report(out)
    return (out / "report.html").read_text(encoding="utf-8")


def matrix_of(raw: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="matrix-data">(.*?)</script>', raw)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def make_six(folder: Path) -> tuple[Path, Scores]:
    """Six classes with hard names, two failures, and a strip for each mistake."""
    scores = make_folder(folder, (ATTACK, "b \"quoted\" 'name'", "c", "d & e", "f", "g"), 90)
    strips = {}
    mistakes = surest_mistakes(scores, video_probabilities(scores))
    for i in range(len(mistakes)):
        strips[f"jpeg_{i:03d}"] = np.frombuffer(film_strip(torch.full((3, 8, 16, 16), i, dtype=torch.uint8)), np.uint8)
    write_arrays(folder / "strips.npz", strips | {"positions": np.array([mistake.position for mistake in mistakes])})
    return folder, scores
