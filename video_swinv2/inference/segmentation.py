"""Masks of images from a segmenter: their classes in words, as PNGs and in colours.

Letters: H W pixels.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from video_swinv2.data.images import read_image
from video_swinv2.data.transforms import normalise
from video_swinv2.dense.loading import load_model
from video_swinv2.dense.segmentation_pictures import class_shares, mask_image, overlay_with_legend
from video_swinv2.dense.segmentation_views import SegmentationViews, predicted_classes
from video_swinv2.dense.segmenters import Segmenter
from video_swinv2.distributed.world import World
from video_swinv2.escaping import for_csv, terminal_lines
from video_swinv2.evaluation.segmentation import protocol_views
from video_swinv2.files import atomic_write, json_text
from video_swinv2.inference.images import ImageSources
from video_swinv2.inference.predictor import output_paths


@dataclass(frozen=True)
class PredictedMask:
    """The classes in one image. `mask` and `picture` are the files that were written, or ""."""

    path: str
    shares: dict[str, float] = field(default_factory=dict)
    """The share of the pixels of each class that occurs, the largest first."""
    mask: str = ""
    picture: str = ""
    error: str = ""
    """Why the image could not be read; "" if it was."""


def predict_masks(
    model_path: Path | str, sources: Sequence[str], *, protocol: str, pictures: Path | None, world: World
) -> list[PredictedMask]:
    """The classes in each image of `sources`, which are files and folders; in their order, on every process.

    protocol: a protocol of the test of segmenters. pictures: folder for NAME.png, whose pixels are numbers of classes
    and which viewers show in colours, and NAME.jpg, the image in these colours with a legend.

    Processes share the images. Raises UserError or UsageError for a model or a folder that cannot be used.
    """
    model = load_model(model_path).to(world.device)
    names = model.classes or tuple(str(number) for number in range(model.design.num_classes))
    preprocessing = model.encoder.preprocessing
    views = protocol_views(protocol, preprocessing.image_size, model.design.short_side)
    images = ImageSources(sources)
    masks = output_paths(pictures, images.paths, ".png", "--pictures")
    shown = output_paths(pictures, images.paths, ".jpg", "--pictures")

    def predict(number: int, path: str) -> PredictedMask:
        return _predict(model, names, path, views, masks[number], shown[number])

    return images.answers(predict, lambda path, error: PredictedMask(path, error=error), world)


def _predict(
    model: Segmenter,
    names: Sequence[str],
    path: str,
    views: SegmentationViews,
    mask_path: Path | None,
    picture_path: Path | None,
) -> PredictedMask:
    image = read_image(Path(path))
    preprocessing = model.encoder.preprocessing
    if preprocessing is None:
        raise RuntimeError("a model from a file has its preprocessing")
    device = next(model.parameters()).device
    with torch.inference_mode():
        pixels = normalise(image[None].to(device), preprocessing.mean, preprocessing.std)[0]
        classes = predicted_classes(model, pixels, views).cpu()
    shares = class_shares(classes, len(names))
    order = sorted((k for k in range(len(names)) if shares[k] > 0), key=lambda k: -shares[k])
    if mask_path is not None and picture_path is not None:
        with atomic_write(mask_path) as part:
            mask_image(classes, len(names)).save(part, format="PNG")
        with atomic_write(picture_path) as part:
            overlay_with_legend(image, classes, names).save(part, format="JPEG", quality=90)
    return PredictedMask(path, {names[k]: shares[k] for k in order}, str(mask_path or ""), str(picture_path or ""))


def format_masks(found: Sequence[PredictedMask], form: str, top: int) -> str:
    """The classes as text, the `top` largest of each image, or all of them as JSON or CSV (`form`)."""
    if form == "json":
        return json_text([asdict(each) for each in found], indent=1)
    if form == "csv":
        written = io.StringIO()
        table = csv.writer(written, lineterminator="\n")
        table.writerow(["path", "class", "share", "error"])
        for each in found:
            for name, share in each.shares.items() or {"": 0.0}.items():
                table.writerow([for_csv(each.path), for_csv(name), f"{share:.6f}" if name else "", for_csv(each.error)])
        return written.getvalue().rstrip("\n")
    lines = []
    for each in found:
        largest = list(each.shares.items())[:top]
        lines.append(
            f"{each.path}: {each.error or ', '.join(f'{name} {100 * share:.1f} %' for name, share in largest)}"
        )
    return terminal_lines(lines)
