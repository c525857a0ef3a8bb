"""Export of a detector to ONNX: one image of a fixed size -> the objects in it.

`export.py` exports all other models through torch.export, which cannot express a detector: how many boxes survive a
suppression depends on the image. The older exporter of torch.onnx, which traces, can: torchvision gives it what it
needs for regions and suppressions.

Letters: H W pixels, D detections.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from video_swinv2.data.images import read_image
from video_swinv2.data.media import IMAGE
from video_swinv2.dense.detection_views import View
from video_swinv2.dense.detectors import Detector
from video_swinv2.dense.suppression import Suppression
from video_swinv2.errors import UsageError
from video_swinv2.files import json_text
from video_swinv2.inference.media_types import find_media_files
from video_swinv2.weights.store import CARD_KEY, ModelCard

OPSETS = range(18, 21)  # that the older exporter knows
OPSET = OPSETS[-1]
NOISE = 2  # images to compare on without files
# A detection of the program is that of the model if it has the same label, and if its score and its sides, in parts of
# the longer side of the image, differ by less. A different order of summation changes them by 1e-6.
MAX_DIFFERENCE = 1e-3
# Rounding can decide whether two boxes overlap by more than the limit, and so which of them is kept.
MIN_SHARE_FOUND = 0.98

Detections = tuple[Tensor, ...]
"""boxes (D, 4), labels (D,), scores (D,) and, of a detector with masks, masks (D, 1, 28, 28)."""


class DetectorProgram(nn.Module):
    """What the ONNX file computes: an image and a lowest score -> detections."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()
        self.outputs = ("boxes", "labels", "scores", *(("masks",) if detector.design.has_masks else ()))

    def forward(self, pixels: Tensor, min_score: Tensor) -> Detections:
        """(3, H, W) in 0..1 and a number -> the detections with higher scores, best first."""
        # A tensor where a number is expected, so that it stays an input of the traced program.
        self.detector.suppression = dataclasses.replace(self.detector.suppression, min_score=min_score)  # type: ignore[arg-type]
        found = self.detector.detect(pixels, [View()])
        return tuple(found[name] for name in self.outputs)


def write_onnx(detector: Detector, card: ModelCard, part: Path, opset: int | None) -> Callable[..., Detections]:
    """Write the program to `part`, and open it with ONNX Runtime on the CPU: it is called as a DetectorProgram is.

    card: its preprocessing has the size of the images. Raises UsageError for an opset that the exporter does not know.
    """
    import onnx
    import onnxruntime

    if opset is not None and opset not in OPSETS:
        raise UsageError(f"--opset {opset}: of a detector, from {OPSETS[0]} to {OPSETS[-1]}")
    program, (height, width) = DetectorProgram(detector), card.preprocessing.image_size
    torch.onnx.export(
        program,
        (torch.rand(3, height, width), torch.tensor(0.0)),
        part,
        dynamo=False,
        opset_version=opset or OPSET,
        input_names=["pixels", "min_score"],
        output_names=list(program.outputs),
        # Otherwise the numbers of detections for the example would be declared as theirs.
        dynamic_axes={name: {0: "detections"} for name in program.outputs},
    )
    model = onnx.load(part)
    onnx.helper.set_model_props(model, {CARD_KEY: json_text(_description(card))})
    onnx.save(model, part)
    session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor, min_score: Tensor) -> Detections:
        found = session.run(list(program.outputs), {"pixels": pixels.numpy(), "min_score": min_score.numpy()})
        return tuple(map(torch.from_numpy, found))

    return run


def compare_detections(
    detector: Detector, run: Callable[..., Detections], size: tuple[int, int], check: Sequence[Path]
) -> tuple[float, int, int]:
    """The largest difference among detections that both find, the number of detections, and how many both find.

    Compared are the detections of each image in `check` at the default lowest score, or at 0 those of noise, in which
    even a good detector would find nothing else. A difference is one of scores, of parts of the longer side of the
    image, or of probabilities of masks.
    """
    program, worst, found_by_both, total = DetectorProgram(detector), 0.0, 0, 0
    images: Iterable[Tensor] = _images(check, size) if check else (torch.rand(3, *size) for _ in range(NOISE))
    min_score = torch.tensor(Suppression.min_score if check else 0.0)
    for pixels in images:
        with torch.no_grad():
            sides = [program(pixels, min_score), run(pixels, min_score)]
        for ours, theirs in itertools.permutations(sides):
            differences = _differences(ours, theirs, max(size))
            same = differences < MAX_DIFFERENCE
            total, found_by_both = total + len(same), found_by_both + int(same.sum())
            worst = max([worst, *differences[same].tolist()])
    return worst, total // 2, found_by_both // 2


def _differences(ours: Detections, theirs: Detections, side: int) -> Tensor:
    """For each of our detections (D,), its difference from the most similar one of theirs; infinite without one."""
    (boxes, labels, scores, *masks), (other_boxes, other_labels, other_scores, *other_masks) = ours, theirs
    if not len(other_labels):
        return torch.full((len(labels),), torch.inf)
    # (D, D'): the largest difference of sides and score
    apart = torch.cdist(boxes / side, other_boxes / side, p=torch.inf)
    apart = torch.maximum(apart, (scores[:, None] - other_scores).abs())
    least, place = apart.masked_fill(labels[:, None] != other_labels, torch.inf).min(dim=1)
    if masks:
        least = torch.maximum(least, (masks[0] - other_masks[0][place]).abs().flatten(1).amax(dim=1))
    return torch.nan_to_num(least, nan=torch.inf, posinf=torch.inf)


def _images(check: Sequence[Path], size: tuple[int, int]) -> Iterator[Tensor]:
    """Every image of `check`, float32 (3, H, W) in 0..1."""
    missing = [path for path in check if not path.exists()]
    if missing:
        raise UsageError(f"{missing[0]}: no such file")
    for path, _ in find_media_files(check, IMAGE):
        yield F.resize(read_image(path), list(size), antialias=True).float() / 255


def _description(card: ModelCard) -> dict[str, object]:
    """Everything that a user of the exported file needs to know; it is stored in the file as JSON."""
    height, width = card.preprocessing.image_size
    return {
        "input": f"pixels (3, {height}, {width}) float32: RGB from 0 to 1; min_score () float32, the lowest score",
        "output": "boxes (D, 4) float32, x1 y1 x2 y2 in pixels of the input; labels (D,) int64, the place in classes, "
        "from 1; scores (D,) float32, best first; of a detector with masks also masks (D, 1, 28, 28) float32, the "
        "probability that each part of the box belongs to the object",
        "classes": list(card.classes),
        "architecture": card.architecture,
        "detector": card.dense,
        "provenance": card.provenance,
    }
