"""The most confident mistakes of a model, and film strips of the frames that it saw.

Letters: K classes, V views, T frames, H W pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax  # type: ignore[import-untyped]  # SciPy has no type hints
from torch import Tensor
from torchvision.transforms.v2.functional import resize
from torchvision.utils import make_grid

from video_swinv2.report.metrics import ranking
from video_swinv2.report.scores import AGAIN, Scores, read_arrays, require_arrays, write_arrays

MAX_MISTAKES = 12
STRIP_FRAMES = 8  # of a film strip, at most
STRIP_COLUMNS = 4
STRIP_PIXELS = 640  # across a strip: as wide as pages show it; two for each of MAX_MISTAKES are 1 MB, 5 MB at worst
JPEG_QUALITY = 80  # of 100


@dataclass(frozen=True)
class Strip:
    """Two JPEG files of a mistake: frames of its view, and the same tinted where the evidence for the answer lies.

    explanation: empty if there is none.
    """

    film: bytes
    explanation: bytes


@dataclass(frozen=True)
class Guess:
    """One of the most probable classes of a video, and whether it is the label."""

    name: str
    probability: float
    right: bool


@dataclass(frozen=True)
class Mistake:
    """A video that was answered wrongly.

    position: its row in the scores. guesses: its five most probable classes, and the label after them if it is not one
    of them. view: the view that gives the wrong answer the highest probability. start: the first frame of that view.
    """

    position: int
    path: str
    label: str
    answer: str
    answer_probability: float
    label_probability: float
    guesses: tuple[Guess, ...]
    view: int
    start: int


def surest_mistakes(
    scores: Scores, probabilities: NDArray[np.float64], max_mistakes: int = MAX_MISTAKES
) -> tuple[Mistake, ...]:
    """The wrong answers with the highest probability, most confident first. probabilities: (scored videos, K)."""
    # positions[row] is the row in the scores of a row of `probabilities`, which has scored videos only.
    positions = np.flatnonzero(scores.scored)
    answers = probabilities.argmax(axis=1)
    labels = scores.labels[positions]
    wrong = np.flatnonzero(answers != labels)
    # Stable: of equally confident mistakes, the one earlier in the list comes first.
    order = wrong[np.argsort(-probabilities[wrong, answers[wrong]], kind="stable")][:max_mistakes]
    return tuple(_mistake(scores, int(positions[row]), int(answers[row]), probabilities[row]) for row in order)


def _mistake(scores: Scores, position: int, answer: int, probabilities: NDArray[np.float64]) -> Mistake:
    """The mistake at row `position` of the scores. probabilities: (K,) of that video."""
    label = int(scores.labels[position])
    best = ranking(probabilities[None], 5)[0].tolist()
    # (V, K) -> (V,) probability of the answer in each view.
    view = int(softmax(scores.logits[position].astype(np.float64), axis=-1)[:, answer].argmax())
    return Mistake(
        position=position,
        path=scores.paths[position],
        label=scores.classes[label],
        answer=scores.classes[answer],
        answer_probability=float(probabilities[answer]),
        label_probability=float(probabilities[label]),
        guesses=tuple(
            Guess(scores.classes[guess], float(probabilities[guess]), guess == label)
            for guess in (best if label in best else [*best, label])
        ),
        view=view,
        start=int(scores.views[position, view, 0]),
    )


def write_strips(path: Path, strips: Mapping[int, Strip]) -> None:
    """Write strips, by row in the scores, to strips.npz."""
    # positions: (M,) rows of the scores. jpeg_000, ... and explanation_000, ...: the files of each, as bytes; a mistake
    # without an explanation has no such array.
    arrays = {"positions": np.array(list(strips), dtype=np.int64)}
    for row, strip in enumerate(strips.values()):
        files = {"jpeg": strip.film, "explanation": strip.explanation}
        arrays |= {f"{name}_{row:03d}": np.frombuffer(file, np.uint8) for name, file in files.items() if file}
    write_arrays(path, arrays)


def read_strips(path: Path) -> dict[int, Strip]:
    """The strips in strips.npz by row in the scores; empty if there is no such file. Raises UserError."""
    if not path.is_file():
        return {}
    arrays = read_arrays(path, AGAIN)
    require_arrays(arrays, {"positions": ("i", 1)}, str(path), AGAIN)
    rows = range(len(arrays["positions"]))
    films, explanations = ([f"{name}_{row:03d}" for row in rows] for name in ("jpeg", "explanation"))
    found = [name for name in explanations if name in arrays]
    require_arrays(arrays, dict.fromkeys([*films, *found], ("u", 1)), str(path), AGAIN)
    return {
        int(position): Strip(arrays[film].tobytes(), arrays[explained].tobytes() if explained in found else b"")
        for position, film, explained in zip(arrays["positions"], films, explanations, strict=True)
    }


def jpeg_uri(jpeg: bytes) -> str:
    """A JPEG file as the address of an image in a page."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def film_strip(view: Tensor) -> bytes:
    """uint8 (3, [T,] H, W) -> a JPEG of at most STRIP_FRAMES frames in rows of STRIP_COLUMNS.

    Frames are shrunk to at most STRIP_PIXELS / STRIP_COLUMNS pixels, or the half of STRIP_PIXELS if one or two are all.
    """
    frames = frames_of_strip(view)
    columns = min(len(frames), STRIP_COLUMNS)
    scale = STRIP_PIXELS / max(columns, 2) / max(frames[0].shape[1:])
    if scale < 1:
        size = [max(1, round(scale * pixels)) for pixels in frames[0].shape[1:]]
        frames = list(resize(torch.stack(frames), size, antialias=True))
    return jpeg_of_frames(frames, columns)


def frames_of_strip(view: Tensor) -> list[Tensor]:
    """(3, [T,] H, W) -> at most STRIP_FRAMES times (3, H, W), evenly spaced, the first and the last frame included."""
    clip = view.unsqueeze(1) if view.ndim == 3 else view  # a still image is a clip of one frame
    frames = clip.shape[1]
    chosen = torch.linspace(0, frames - 1, min(frames, STRIP_FRAMES)).round().long()
    return list(clip[:, chosen].unbind(1))


def jpeg_of_frames(frames: list[Tensor], columns: int) -> bytes:
    """A JPEG of frames, each uint8 (3, H, W), in rows of `columns`."""
    picture: Tensor = make_grid(frames, nrow=columns, padding=2)  # (3, height, width)
    jpeg = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(jpeg, format="jpeg", quality=JPEG_QUALITY)
    return jpeg.getvalue()
