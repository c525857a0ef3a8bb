"""What tests of the report share: score files, a training run, hard names, and a parser that checks the page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch

from video_swinv2.report.metrics import Metrics, metrics_of_scores, video_probabilities
from video_swinv2.report.mistakes import Strip, film_strip, surest_mistakes, write_strips
from video_swinv2.report.page import write_report
from video_swinv2.report.scores import Scores, save_scores

ATTACK = "<script>alert(1)</script>"
VOID_TAGS = {"meta", "link", "br", "img", "input", "option"}  # those without a closing tag
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


def build_scores(
    labels: np.ndarray,
    logits: np.ndarray,
    *,
    failed: Sequence[int] | np.ndarray = (),
    reason: str = "broken",
    paths: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    **metadata: Any,
) -> Scores:
    """Scores of labels (N,) and logits (N, V, K), with the rows `failed` blanked as failed videos are."""
    n, n_views, n_classes = logits.shape
    logits, views = logits.astype(np.float16), np.zeros((n, n_views, 5), np.int32)
    failed = list(failed)
    logits[failed], views[failed] = np.nan, -1
    return Scores(
        paths=tuple(paths or (f"{i}.mp4" for i in range(n))),
        labels=labels,
        logits=logits,
        views=views,
        reasons=tuple(reason if i in failed else "" for i in range(n)),
        classes=tuple(classes or (f"class {i}" for i in range(n_classes))),
        metadata=metadata,
    )


def metrics_of(scores: Scores, average: str = "prob") -> Metrics:
    """The metrics of a report on these scores."""
    return metrics_of_scores(scores, video_probabilities(scores, average))


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
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID_TAGS:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] not in ("style", "script"):
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def make_folder(out: Path, classes: tuple[str, ...], n: int, failed: int = 2, **record: object) -> Scores:
    """A folder with the scores of a model that is right about 60 % of the time; every path and reason is an attack."""
    rng = np.random.default_rng(len(classes))
    labels = rng.integers(0, len(classes), n)
    logits = rng.normal(size=(n, 3, len(classes)))
    right = rng.random(n) < 0.6
    logits[np.arange(n), :, np.where(right, labels, (labels + 1) % len(classes))] += 4
    scores = build_scores(
        labels,
        logits,
        failed=range(failed),
        reason=f"reason {ATTACK}",
        paths=[f'dir/it\'s "{i}"\n& {ATTACK}.mp4' for i in range(n)],
        classes=classes,
        **RECORD | record,
    )
    out.mkdir(exist_ok=True)
    save_scores(scores, out / "scores.npz")
    return scores


def make_six(folder: Path) -> tuple[Path, Scores]:
    """Six classes with hard names, two failed videos, and strips of each mistake."""
    scores = make_folder(folder, (ATTACK, "b \"quoted\" 'name'", "c", "d & e", "f", "g"), 90)
    strips = {}
    for i, mistake in enumerate(surest_mistakes(scores, video_probabilities(scores))):
        film = film_strip(torch.full((3, 8, 16, 16), i, dtype=torch.uint8))
        tinted = film_strip(torch.full((3, 8, 16, 16), 99, dtype=torch.uint8))
        strips[mistake.position] = Strip(film, tinted if i else b"")  # the first has no explanation
    write_strips(folder / "strips.npz", strips)
    return folder, scores


def make_run(folder: Path, **record: Any) -> None:
    """The folder of a training run of 999 steps, three validations, and a last line that is half written."""
    folder.mkdir()
    known = {"hours": 0.5, "device_hours": 4.0, "device": "cuda", "processes": 8, "parameters": 28_000_000}
    (folder / "run.json").write_text(json.dumps(known | record))
    lines = [{"step": step, "train/loss": 3.0 / step, "train/lr": 1e-3} for step in range(1, 1000)]
    lines += [{"step": step, "val/loss": 2.0, "val/top1": step / 1000} for step in (250, 500, 1000)]
    lines.append({"step": 7, "train/loss": float("nan")})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1001, "tr')


def write_page(out: Path) -> str:
    """Write the report of a folder; its page as text."""
    write_report(out)
    return (out / "report.html").read_text(encoding="utf-8")


def matrix_of(raw: str) -> dict[str, Any]:
    """The data of the confusion matrix in a page."""
    found = re.search(r'<script type="application/json" id="matrix-data">(.*?)</script>', raw)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data
