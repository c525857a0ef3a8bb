"""The test of a segmenter: mIoU over the images of a split, with an interval, and pictures of the surest mistakes.

Letters: N images, K classes, H W pixels.

Rank r of R processes takes the images r, r + R, ... of the split, so each image counts exactly once, and the matrices
of all processes are added. Pixels are compared with the masks at the masks' own size.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from video_swinv2.data.decode import DecodeError
from video_swinv2.data.images import read_image
from video_swinv2.data.sources import refuse_inside_tree
from video_swinv2.data.transforms import normalise
from video_swinv2.dense.loading import load_model
from video_swinv2.dense.segmentation_data import SegmentationData, read_segmentation_data
from video_swinv2.dense.segmentation_metrics import confusion_matrix, image_areas, miou_interval, segmentation_figures
from video_swinv2.dense.segmentation_pictures import colour_map
from video_swinv2.dense.segmentation_views import SegmentationViews, class_probabilities
from video_swinv2.dense.segmenters import IGNORE, Segmenter
from video_swinv2.distributed.collectives import gather_shares
from video_swinv2.distributed.devices import report_missing_bf16, use_bf16
from video_swinv2.distributed.world import World
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.dense import (
    ADVICE,
    make_record,
    own_folder,
    own_images,
    refuse_other_test,
    write_sheet,
)
from video_swinv2.evaluation.overrides import TestOverrides, refuse_detector_keys
from video_swinv2.files import write_json
from video_swinv2.records import Record, parse_record
from video_swinv2.report.dense import MISTAKES, REPORT, RESULTS
from video_swinv2.report.segmentation import write_segmentation_report
from video_swinv2.weights.store import ModelCard, read_card

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of published multi-scale tests, which also mirror each
PROTOCOLS = ("whole", "slide", "whole-multi-scale", "slide-multi-scale")
SHOWN_MISTAKES = 8  # images in the picture of the surest mistakes
TILE_HEIGHT = 160  # pixels
WRONG = (230, 30, 30)


@dataclass(frozen=True, eq=False)
class ImageResult:
    """What a test keeps of one image. `areas` is that of `image_areas`, int64 (2, K)."""

    number: int
    areas: NDArray[np.int64]
    accuracy: float
    """Share of its pixels that is predicted right; NaN if none has a class."""
    surely_wrong: float
    """Sum over the wrong pixels of the probability of the answer, divided by the number of pixels that count."""
    fault: str
    """Why the image could not be read; "" if it was."""
    picture: NDArray[np.uint8] | None = None
    """Image, mask, prediction and wrong pixels side by side, (3, h, w); None for all but the surest mistakes."""


class _MaskSettings(Record, extra="ignore"):
    """How the masks of the training were read, as the provenance of a model file records it."""

    ignore_index: int = Field(default=IGNORE, ge=0, le=255)
    reduce_zero_label: bool = False


def protocol_views(protocol: str, crop: tuple[int, int], short_side: int | None) -> SegmentationViews:
    """The views of a protocol. Raises UsageError for an unknown one."""
    if protocol not in PROTOCOLS:
        raise UsageError(f"--protocol: a segmenter has no {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    many = protocol.endswith("multi-scale")
    mode = "slide" if protocol.startswith("slide") else "whole"
    return SegmentationViews(mode, crop, None, short_side, SCALES if many else (1.0,), flip=many)  # type: ignore[arg-type]


def run_segmentation_test(
    model_path: Path | str,
    data: Path | str,
    *,
    protocol: str = "whole",
    split: str = "test",
    out: Path | str,
    overrides: TestOverrides | None = None,
) -> dict[str, Any]:
    """Test a segmenter on a split, and write results.json, mistakes.png and report.html to `out`.

    protocol: one of PROTOCOLS. Windows are of the size of the training crops, or of `overrides.image_size`.

    Indices of no class are read as in training. Processes launched by torchrun, deepspeed or srun share the images.
    Returns the content of results.json, on every process. Raises UsageError if the test cannot succeed, or would
    replace another one, and UserError if no image can be read.
    """
    settings, out = overrides or TestOverrides(), Path(out)
    refuse_detector_keys(settings, "a segmenter")
    with settings.session(ADVICE) as world:
        refuse_inside_tree(out, [data])
        card = read_card(model_path)
        masks = parse_record(card.provenance.get("data") or {}, _MaskSettings, f"{model_path}: its card: provenance")
        found = read_segmentation_data(
            data,
            split,
            ignore_index=masks.ignore_index,
            reduce_zero_label=masks.reduce_zero_label,
            max_pixels=settings.max_pixels,
        )
        _check_classes(card, found, model_path)
        model = load_model(model_path, window=settings.window, attention=settings.attention).to(world.device)
        views = protocol_views(protocol, settings.image_size or card.preprocessing.image_size, model.design.short_side)
        numbers = {
            "mode": views.mode,
            "crop": list(views.crop or ()),
            "short_side": views.short_side,
            "scales": list(views.scales),
            "flip": views.flip,
            "window": list(model.encoder.window),
        }
        record = {"protocol": protocol} | make_record(
            "segmentation", model_path, card, data, split, found.check(), found.classes, numbers, settings, world
        )
        with own_folder(out, world):
            return _run(model, found, views, settings, record, out, world)


def _check_classes(card: ModelCard, data: SegmentationData, model_path: Path | str) -> None:
    pairs = zip(card.classes, data.classes, strict=False)
    differing = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if differing is not None or len(card.classes) != len(data.classes):
        first = f" ({differing[0]!r} there, {differing[1]!r} here)" if differing else ""
        raise UsageError(
            f"{data.root}: its {len(data.classes)} classes are not the {len(card.classes)} of {model_path}{first}; "
            "test on data with the classes that the model was trained on, in their order"
        )


def _run(
    model: Segmenter,
    data: SegmentationData,
    views: SegmentationViews,
    settings: TestOverrides,
    record: dict[str, Any],
    out: Path,
    world: World,
) -> dict[str, Any]:
    if world.rank == 0:
        refuse_other_test(out / RESULTS, record)
        report_missing_bf16(settings.precision, world.device)
    started = time.perf_counter()
    mine, confusion = _score(model, data, views, settings, world)
    shares = gather_shares(world, (mine, confusion.numpy()))
    images = sorted((image for share, _ in shares for image in share), key=lambda image: image.number)
    if [image.number for image in images] != list(range(len(data.entries))):
        raise RuntimeError("an image was not scored exactly once")
    total = np.sum([matrix for _, matrix in shares], axis=0)
    result = record | _figures(images, total, data, settings.seed)
    result["seconds"] = round(time.perf_counter() - started, 3)
    failed = result["images"]["failed"]
    if failed == len(images):
        raise UserError(f"{images[0].fault}; nor can any other image of the split be read")
    if world.rank == 0:
        for image in images:
            if image.fault:
                print(f"test: {image.fault}; all of its pixels count as wrong", file=sys.stderr)
        shown = [torch.from_numpy(i.picture) for i in sorted(images, key=_sureness) if i.picture is not None]
        if shown:
            write_sheet(shown[:SHOWN_MISTAKES], out / MISTAKES)
        write_json(out / RESULTS, result)
        write_segmentation_report(out)
    gather_shares(world, None)  # nobody leaves before the files are written
    return result


def _score(
    model: Segmenter, data: SegmentationData, views: SegmentationViews, settings: TestOverrides, world: World
) -> tuple[list[ImageResult], Tensor]:
    """The images of this process, and the sum of their confusion matrices, (K, K + 1)."""
    classes = len(data.classes)
    bf16 = use_bf16(settings.precision, world.device)
    preprocessing = model.encoder.preprocessing
    if preprocessing is None:
        raise RuntimeError("a model from a file has its preprocessing")
    total, found = torch.zeros(classes, classes + 1, dtype=torch.int64), list[ImageResult]()
    with torch.inference_mode():
        for number in own_images(len(data.entries), world):
            mask, fault = data.read_mask(number).to(world.device), ""
            probabilities = image = None
            try:
                image = read_image(data.entries[number].path, data.max_pixels).to(world.device)
            except DecodeError as error:
                fault = str(error)
            if image is not None:
                pixels = normalise(image[None], preprocessing.mean, preprocessing.std)[0]
                with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
                    probabilities = class_probabilities(model, pixels, views)
            confusion = confusion_matrix(None if probabilities is None else probabilities.argmax(0), mask, classes)
            total += confusion
            found.append(_image_result(number, confusion, image, mask, probabilities, fault))
            _keep_surest(found)
    return found, total


def _image_result(
    number: int, confusion: Tensor, image: Tensor | None, mask: Tensor, probabilities: Tensor | None, fault: str
) -> ImageResult:
    accuracy = segmentation_figures(confusion).pixel_accuracy
    if image is None or probabilities is None:
        return ImageResult(number, image_areas(confusion), accuracy, 0.0, fault)
    confidence, predicted = probabilities.max(dim=0)
    counted = mask != IGNORE
    wrong = counted & (predicted != mask)
    sure = float((confidence * wrong).sum() / counted.sum().clamp(min=1))
    picture = _picture(image, mask, predicted, wrong, len(confusion))
    return ImageResult(number, image_areas(confusion), accuracy, sure, fault, picture)


def _picture(image: Tensor, mask: Tensor, predicted: Tensor, wrong: Tensor, classes: int) -> NDArray[np.uint8]:
    """Image, mask, prediction and wrong pixels side by side, TILE_HEIGHT high."""
    red = torch.tensor(WRONG, dtype=torch.uint8, device=image.device)[:, None, None]
    marked = torch.where(wrong, red, image // 2)
    tiles = [image, colour_map(mask, classes), colour_map(predicted, classes), marked]
    size = [TILE_HEIGHT, max(round(TILE_HEIGHT * mask.shape[1] / mask.shape[0]), 1)]
    row: NDArray[np.uint8] = torch.cat([TF.resize(tile, size, antialias=True) for tile in tiles], dim=2).cpu().numpy()
    return row


def _keep_surest(images: list[ImageResult]) -> None:
    """Drop the pictures of all but the surest mistakes, so that no more than those take memory."""
    shown = sorted((image for image in images if image.picture is not None), key=_sureness)
    for image in shown[SHOWN_MISTAKES:]:
        images[images.index(image)] = replace(image, picture=None)


def _sureness(image: ImageResult) -> tuple[float, int]:
    """The order in which mistakes are shown: the surest first, and of equal ones the first of the split."""
    return -image.surely_wrong, image.number


def _figures(
    images: Sequence[ImageResult], confusion: NDArray[np.int64], data: SegmentationData, seed: int
) -> dict[str, Any]:
    figures = segmentation_figures(confusion)
    pixels = confusion.sum(axis=1)
    failed = sum(bool(image.fault) for image in images)
    return {
        "images": {"listed": len(images), "scored": len(images) - failed, "failed": failed},
        "miou": figures.miou,
        "miou_interval": list(miou_interval(np.stack([image.areas for image in images]), seed)),
        "mean_accuracy": figures.mean_accuracy,
        "pixel_accuracy": figures.pixel_accuracy,
        "per_class": [
            {"class": name, "iou": iou, "accuracy": accuracy, "pixels": int(count)}
            for name, iou, accuracy, count in zip(data.classes, figures.iou, figures.accuracy, pixels, strict=True)
        ],
        # Rows are true classes and columns predicted ones; the last column is for images that could not be read.
        "confusion": confusion.tolist(),
        "per_image": [
            {
                "name": data.entries[image.number].name,
                "pixel_accuracy": image.accuracy,
                "surely_wrong": image.surely_wrong,
                "fault": image.fault,
            }
            for image in images
        ],
    }


def summarize_segmentation(result: dict[str, Any], out: Path | str) -> list[str]:
    """The result in a few lines to print."""
    low, high = result["miou_interval"]
    images = result["images"]
    lines = [
        f"mIoU {100 * result['miou']:.2f} % (95 % interval over images {100 * low:.1f} to {100 * high:.1f} %), mean "
        f"accuracy {100 * result['mean_accuracy']:.2f} %, pixel accuracy {100 * result['pixel_accuracy']:.2f} %"
    ]
    width = max(len(row["class"]) for row in result["per_class"])
    lines += [
        f"  {row['class']:{width}}  IoU {_per_cent(row['iou'])}  accuracy {_per_cent(row['accuracy'])}"
        for row in result["per_class"]
    ]
    lines.append(f"{images['scored']} of {images['listed']} images scored, {result['seconds']:.1f} seconds")
    return [*lines, f"report: {Path(out) / REPORT}"]


def _per_cent(share: float) -> str:
    return "    none" if np.isnan(share) else f"{100 * share:6.2f} %"
