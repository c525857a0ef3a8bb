"""Objects in images from a detector: boxes, scores and masks in words, as JSON and drawn into pictures.

Letters: D detections of an image.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from video_swinv2.data.images import read_image
from video_swinv2.dense.detection_metrics import image_detections
from video_swinv2.dense.detection_pictures import detections_picture
from video_swinv2.dense.detectors import Detector
from video_swinv2.dense.loading import load_model
from video_swinv2.dense.outlines import coco_masks
from video_swinv2.distributed.world import World
from video_swinv2.escaping import for_csv, terminal_lines
from video_swinv2.files import atomic_write, json_text
from video_swinv2.inference.images import ImageSources
from video_swinv2.inference.predictor import output_paths

MIN_SCORE = 0.3  # below it, most detections are wrong


@dataclass(frozen=True)
class FoundObject:
    """One detection."""

    name: str
    """Of its class."""
    score: float
    box: tuple[float, ...]
    """x1, y1, x2, y2 in pixels; the pixel at the top left covers 0 to 1."""
    mask: dict[str, Any] | None = None
    """COCO's run lengths in the whole image; None for a detector without masks."""


@dataclass(frozen=True)
class FoundObjects:
    """The objects in one image, the surest first. `picture` is the file that was written, or ""."""

    path: str
    objects: tuple[FoundObject, ...] = ()
    picture: str = ""
    error: str = ""
    """Why the image could not be read; "" if it was."""


def predict_objects(
    model_path: Path | str, sources: Sequence[str], *, min_score: float, pictures: Path | None, world: World
) -> list[FoundObjects]:
    """The objects in each image of `sources`, which are files and folders; in their order, on every process.

    min_score: detections with a lower score are left out. pictures: folder for NAME.jpg, the image, reduced if it is
    large, with boxes, names and scores, and with masks if the model finds them.

    Processes share the images. Raises UserError or UsageError for a model or a folder that cannot be used.
    """
    model: Detector = load_model(model_path).to(world.device)
    if model.design.has_masks:
        coco_masks()  # is needed for the first image; better to miss it now
    names = model.classes or tuple(str(label) for label in range(1, model.design.num_classes + 1))
    images = ImageSources(sources)
    shown = output_paths(pictures, images.paths, ".jpg", "--pictures")

    def predict(number: int, path: str) -> FoundObjects:
        return _predict(model, names, path, min_score, shown[number])

    return images.answers(predict, lambda path, error: FoundObjects(path, error=error), world)


def _predict(model: Detector, names: Sequence[str], path: str, min_score: float, picture: Path | None) -> FoundObjects:
    image = read_image(Path(path))
    with torch.inference_mode():
        found = model.detect(image.to(next(model.parameters()).device))
    kept = found["scores"] >= min_score
    found = {key: value[kept] for key, value in found.items()}
    if picture is not None:
        pixels = detections_picture(image, found, names).permute(1, 2, 0).numpy()
        with atomic_write(picture) as part:
            Image.fromarray(pixels).save(part, format="JPEG", quality=90)
    plain = image_detections(0, found, (image.shape[1], image.shape[2]))
    objects = tuple(
        FoundObject(names[label - 1], float(score), tuple(box), None if plain.masks is None else plain.masks[place])
        for place, (label, score, box) in enumerate(zip(plain.labels, plain.scores, plain.boxes.tolist(), strict=True))
    )
    return FoundObjects(path, objects, str(picture or ""))


def format_objects(found: Sequence[FoundObjects], form: str, top: int) -> str:
    """The objects as text, the `top` surest of each image, or all of them as JSON or CSV (`form`)."""
    if form == "json":
        return json_text([asdict(each) for each in found], indent=1)
    if form == "csv":
        written = io.StringIO()
        table = csv.writer(written, lineterminator="\n")
        table.writerow(["path", "class", "score", "x1", "y1", "x2", "y2", "error"])
        for each in found:
            rows = [
                [for_csv(item.name), f"{item.score:.6f}", *(f"{side:.2f}" for side in item.box)]
                for item in each.objects
            ]
            for row in rows or [[""] * 6]:
                table.writerow([for_csv(each.path), *row, for_csv(each.error)])
        return written.getvalue().rstrip("\n")
    return terminal_lines(f"{each.path}: {each.error or _in_words(each.objects, top)}" for each in found)


def _in_words(objects: Sequence[FoundObject], top: int) -> str:
    if not objects:
        return "nothing found"
    shown = [
        f"{item.name} {item.score:.2f} at ({', '.join(f'{side:.0f}' for side in item.box)})" for item in objects[:top]
    ]
    return ", ".join(shown) + (f", and {len(objects) - top} more" if len(objects) > top else "")
