"""The report of a test: one HTML file that needs nothing else, made again at any time from the scores in its folder."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from video_swinv2.evaluation.matrix import draw_matrix
from video_swinv2.evaluation.metrics import ClassAccuracy, Metrics, compute_metrics, softmax, video_probabilities
from video_swinv2.evaluation.reading import VideoGroups
from video_swinv2.evaluation.scores import Scores, load_scores, read_arrays, write_arrays
from video_swinv2.files import whole
from video_swinv2.pages import render

MOST_MISTAKES = 12
STRIP_FRAMES = 8
STRIP_COLUMNS = 4
JPEG_QUALITY = 80
ALL_CLASSES_UP_TO = 30
WORST_CLASSES = 20
MOST_FAILURES = 500


@dataclass(frozen=True)
class Mistake:
    """A video answered wrongly: its place in the list, both classes and probabilities, and the view surest of it."""

    position: int
    path: str
    label: str
    answer: str
    answer_probability: float
    label_probability: float
    view: int
    start: int


def surest_mistakes(scores: Scores, most: int = MOST_MISTAKES) -> tuple[Mistake, ...]:
    """The wrong answers that were given with the highest probability, surest first."""
    probabilities = video_probabilities(scores, scores.metadata.get("average", "prob"))
    positions = np.flatnonzero(scores.scored)
    answers = probabilities.argmax(axis=1)
    labels = scores.labels[positions]
    wrong = np.flatnonzero(answers != labels)
    order = wrong[np.argsort(-probabilities[wrong, answers[wrong]], kind="stable")][:most]
    return tuple(_mistake(scores, int(positions[row]), int(answers[row]), probabilities[row]) for row in order)


def _mistake(scores: Scores, position: int, answer: int, probabilities: NDArray[np.float64]) -> Mistake:
    label = int(scores.labels[position])
    view = int(softmax(scores.logits[position].astype(np.float64))[:, answer].argmax())
    return Mistake(
        position=position,
        path=scores.paths[position],
        label=scores.classes[label],
        answer=scores.classes[answer],
        answer_probability=float(probabilities[answer]),
        label_probability=float(probabilities[label]),
        view=view,
        start=int(scores.views[position, view, 0]),
    )


def save_strips(out: Path, scores: Scores, videos: VideoGroups) -> None:
    """Read the surest mistakes, and only them, again; keep what the model saw of each in strips.npz, as JPEG."""
    arrays: dict[str, NDArray[Any]] = {}
    kept: list[int] = []
    for mistake in surest_mistakes(scores):
        record, pixels = videos.read(mistake.position)
        if pixels is not None:
            arrays[f"jpeg_{len(kept):03d}"] = np.frombuffer(film_strip(pixels[mistake.view]), dtype=np.uint8)
            kept.append(record.position)
    arrays["positions"] = np.array(kept, dtype=np.int64)
    write_arrays(out / "strips.npz", arrays)


def film_strip(view: Tensor) -> bytes:
    """uint8 (3, T, H, W) or (3, H, W) -> the bytes of one JPEG: STRIP_FRAMES frames in rows of STRIP_COLUMNS."""
    clip = view.unsqueeze(1) if view.ndim == 3 else view
    frames = clip.shape[1]
    chosen = torch.linspace(0, frames - 1, min(frames, STRIP_FRAMES)).round().long()
    picture: Tensor = make_grid(list(clip[:, chosen].unbind(1)), nrow=STRIP_COLUMNS, padding=2)
    jpeg = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(jpeg, format="jpeg", quality=JPEG_QUALITY)
    return jpeg.getvalue()


def write_report(out_dir: Path | str) -> Path:
    """Write report.html from scores.npz, with the strips kept beside it; neither videos nor model are needed.

    Returns its path. Raises UserError where the scores are missing or damaged or the page cannot be written.
    """
    out = Path(out_dir)
    scores = load_scores(out / "scores.npz")
    metrics = compute_metrics(
        scores, average=scores.metadata.get("average", "prob"), seed=scores.metadata.get("seed", 0)
    )
    values = contents(scores, metrics, _read_strips(out / "strips.npz"))
    path = out / "report.html"
    with whole(path) as part:
        part.write_bytes(render("video_swinv2.evaluation", "report.html.j2", values))
    return path


def contents(scores: Scores, metrics: Metrics, strips: dict[int, str]) -> dict[str, object]:
    """What the template shows. strips: place in the list -> data URI of what the model saw."""
    shown, rest = split_classes(metrics.per_class)
    failures = [(path, reason) for path, reason in zip(scores.paths, scores.reasons, strict=True) if reason]
    return {
        "metrics": metrics,
        "record": scores.metadata,
        "unit": scores.metadata.get("unit", "videos"),
        "record_lines": list(flatten(scores.metadata)),
        "digits": 1 if metrics.scored < 5000 else 2,
        "n_classes": len(scores.classes),
        "classes_shown": shown,
        "classes_rest": rest,
        "matrix": draw_matrix(metrics.confusion, scores.classes),
        "pairs": metrics.confused_pairs,
        "mistakes": surest_mistakes(scores),
        "strips": strips,
        "lost": metrics.failed - len(failures),
        "failures": failures[:MOST_FAILURES],
        "failures_left": max(0, len(failures) - MOST_FAILURES),
    }


def split_classes(rows: tuple[ClassAccuracy, ...]) -> tuple[list[ClassAccuracy], list[ClassAccuracy]]:
    """(shown at once, behind a click), worst first; classes without videos last. A short list is shown whole."""
    ordered = sorted(rows, key=lambda row: (row.accuracy is None, row.accuracy or 0.0, -row.n))
    cut = len(ordered) if len(ordered) <= ALL_CLASSES_UP_TO else WORST_CLASSES
    return ordered[:cut], ordered[cut:]


def flatten(record: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of nested plain data, in order."""
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value if isinstance(value, str) else json.dumps(value)


def _read_strips(path: Path) -> dict[int, str]:
    """Data URIs by place in the list; none where the file was not kept."""
    if not path.is_file():
        return {}
    arrays = read_arrays(path, "run the test again")
    return {
        int(position): "data:image/jpeg;base64," + base64.b64encode(arrays[f"jpeg_{row:03d}"].tobytes()).decode()
        for row, position in enumerate(arrays.get("positions", np.empty(0, np.int64)))
    }
