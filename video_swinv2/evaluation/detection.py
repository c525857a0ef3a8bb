"""The test of a detector: COCO's figures over the images of a split, with intervals, and pictures of its mistakes.

Letters: D detections of an image, H W pixels.

Rank r of R processes takes the images r, r + R, ... of the split, so each image counts exactly once, and what all
processes found is compared with the objects together. An image goes through the network by itself, so the detections
are the same on any number of processes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from video_swinv2.data.decode import DecodeError
from video_swinv2.data.images import read_image
from video_swinv2.data.sources import refuse_inside_tree
from video_swinv2.dense.detection_data import DetectionData, size_fault
from video_swinv2.dense.detection_dataset import read_detection_data
from video_swinv2.dense.detection_metrics import (
    ImageDetections,
    data_set_results,
    detection_figures,
    image_detections,
    image_mistakes,
)
from video_swinv2.dense.detection_pictures import draw_detections
from video_swinv2.dense.detection_transforms import fitted_size, resize
from video_swinv2.dense.detection_views import View
from video_swinv2.dense.detectors import Detector
from video_swinv2.dense.loading import load_model
from video_swinv2.dense.outlines import coco_masks
from video_swinv2.distributed.collectives import gather_shares
from video_swinv2.distributed.devices import report_missing_bf16, use_bf16
from video_swinv2.distributed.world import World
from video_swinv2.errors import UsageError, UserError
from video_swinv2.escaping import for_terminal
from video_swinv2.evaluation.dense import ADVICE, make_record, own_folder, own_images, refuse_other_test, write_sheet
from video_swinv2.evaluation.overrides import TestOverrides
from video_swinv2.files import atomic_write, json_text, write_json
from video_swinv2.report.dense import MISTAKES, REPORT, RESULTS
from video_swinv2.report.detection import DETECTIONS, MISSED, write_detection_report
from video_swinv2.weights.store import read_card

SURE = 0.3  # score from which a detection counts in the list and the pictures of mistakes; figures take all
SHOWN_MISTAKES = 6  # images in each of the two pictures
TILE = 280  # pixels of the shorter side
SIZES = ("small", "medium", "large")
RIGHT, WRONG = (40, 170, 60), (230, 30, 30)


@dataclass(frozen=True, eq=False)
class ImageResult:
    """What was found in one image, and why it could not be read ("" if it was)."""

    found: ImageDetections
    fault: str


@dataclass(frozen=True, eq=False)
class Mistakes:
    """The mistakes in one image, at an IoU of 0.5 and a score of at least SURE."""

    found: ImageDetections
    """The detections of at least this score."""
    wrong: NDArray[np.bool_]
    """(D,)"""
    missed: NDArray[np.int64]
    """The places of the objects that were not found."""

    @property
    def surest(self) -> float:
        """The score of the surest wrong detection; 0 if none is wrong."""
        return float(self.found.scores[self.wrong].max(initial=0.0))


def detector_views(design_side: int, design_longest: int, settings: TestOverrides) -> list[View]:
    """The views of a test: by default one, of the sizes of the design. The longest side grows with the shorter one."""
    side, longest = sorted(settings.image_size or (design_side, design_longest))
    sides = settings.test_sides or (side,)
    mirrored = (False, True) if settings.test_flip else (False,)
    return [View(each, round(each * longest / side), flip) for each in sides for flip in mirrored]


def run_detection_test(
    model_path: Path | str,
    data: Path | str,
    *,
    split: str = "test",
    out: Path | str,
    overrides: TestOverrides | None = None,
) -> dict[str, Any]:
    """Test a detector on a split, and write results.json, detections.json, mistakes.png, missed.png and report.html.

    Processes launched by torchrun, deepspeed or srun share the images. Masks are compared if the model finds and the
    data set has them. Returns the content of results.json, on every process. Raises UsageError if the test cannot
    succeed, or would replace another one, and UserError if no image can be read.
    """
    settings, out = overrides or TestOverrides(), Path(out)
    coco_masks()  # is needed after the last image; better to miss it now
    with settings.session(ADVICE) as world:
        refuse_inside_tree(out, [data])
        card = read_card(model_path)
        model = load_model(model_path, window=settings.window, attention=settings.attention).to(world.device)
        if not model.classes:
            raise UsageError(f"{model_path}: contains no class names to compare with; save the model with its classes")
        found = read_detection_data(data, split, classes=model.classes, drop_faulty=bool(settings.drop_faulty))
        views = detector_views(model.design.short_side, model.design.max_side, settings)
        model.suppression = dataclasses.replace(model.suppression, soft=bool(settings.soft_nms))
        numbers = {
            "views": [dataclasses.asdict(view) for view in views],
            "suppression": dataclasses.asdict(model.suppression),
            "window": list(model.encoder.window),
        }
        record = make_record(
            "detection", model_path, card, data, split, found.check(), found.classes, numbers, settings, world
        )
        with own_folder(out, world):
            return _run(model, found, views, settings, record, out, world)


def _run(
    model: Detector,
    data: DetectionData,
    views: Sequence[View],
    settings: TestOverrides,
    record: dict[str, Any],
    out: Path,
    world: World,
) -> dict[str, Any]:
    if world.rank == 0:
        refuse_other_test(out / RESULTS, record)
        report_missing_bf16(settings.precision, world.device)
        boxes_only = "not every object of the data set has a segmentation, so boxes alone are compared"
        for note in (*data.notes, *([boxes_only] if model.design.has_masks and not data.has_masks else [])):
            print(for_terminal(f"test: {note}"), file=sys.stderr)
    started = time.perf_counter()
    shares = gather_shares(world, _detect(model, data, views, settings, world))
    images = sorted((image for share in shares for image in share), key=lambda image: image.found.place)
    failed = [image.fault for image in images if image.fault]
    if len(failed) == len(data):
        raise UserError(f"{failed[0]}; nor can any other image of the split be read")
    # The intervals take a minute, so rank 0 alone computes them.
    result: dict[str, Any] = {}
    if world.rank == 0:
        found = [image.found for image in images]
        mistakes = [_mistakes(data, item) for item in found]
        result = record | _figures(images, mistakes, data, model.design.has_masks and data.has_masks, settings.seed)
        result["seconds"] = round(time.perf_counter() - started, 3)
        for fault in failed:
            print(for_terminal(f"test: {fault}; all of its objects count as missed"), file=sys.stderr)
        with atomic_write(out / DETECTIONS) as part:
            part.write_text(json_text(data_set_results(found, data)) + "\n")
        _write_pictures(data, mistakes, [bool(image.fault) for image in images], out, settings.max_pixels)
        write_json(out / RESULTS, result)
        write_detection_report(out)
    # Nobody leaves before the files are written.
    return next(share for share in gather_shares(world, result) if share)


def _detect(
    model: Detector, data: DetectionData, views: Sequence[View], settings: TestOverrides, world: World
) -> list[ImageResult]:
    """What is found in the images of this process."""
    bf16, results = use_bf16(settings.precision, world.device), []
    for place in own_images(len(data), world):
        try:
            image = read_image(data.entries[place].path, settings.max_pixels)
            size = (image.shape[1], image.shape[2])
            if size != data.size(place):
                raise size_fault(data.entries[place].path, size, data.size(place))
        except DecodeError as error:
            nothing = np.zeros(0, dtype=np.float32)
            masks = () if model.design.has_masks else None
            missing = ImageDetections(place, nothing.reshape(0, 4), nothing.astype(np.int64), nothing, masks)
            results.append(ImageResult(missing, str(error)))
            continue
        with torch.inference_mode(), torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            found = model.detect(image.to(world.device), views)
        results.append(ImageResult(image_detections(place, found, size), ""))
    return results


def _mistakes(data: DetectionData, found: ImageDetections) -> Mistakes:
    sure = found.surer_than(SURE)
    return Mistakes(sure, *image_mistakes(data, sure))


def _figures(
    images: Sequence[ImageResult], mistakes: Sequence[Mistakes], data: DetectionData, masks: bool, seed: int
) -> dict[str, Any]:
    """The figures of boxes and, with `masks`, of masks."""
    found = [image.found for image in images]
    failed = sum(bool(image.fault) for image in images)
    figures = {
        kind: detection_figures(data, found, masks=kind == "masks", intervals=True, seed=seed)
        for kind in (("boxes", "masks") if masks else ("boxes",))
    }
    objects = np.bincount(data.labels[~data.ignored], minlength=len(data.classes) + 1)[1:]
    return {
        "images": {"listed": len(images), "scored": len(images) - failed, "failed": failed},
        **{
            kind: {**each.figures, "intervals": {name: list(bounds) for name, bounds in each.intervals.items()}}
            for kind, each in figures.items()
        },
        "per_class": [
            {"class": name, "objects": int(objects[number])}
            | {kind: {"ap": each.classes[number], "ap50": each.classes50[number]} for kind, each in figures.items()}
            for number, name in enumerate(data.classes)
        ],
        "sure_score": SURE,
        "per_image": [
            {
                "name": data.entries[image.found.place].name,
                "image_id": int(data.image_ids[image.found.place]),
                "objects": len(data.objects(image.found.place)),
                "detections": len(image.found.scores),
                "sure": len(each.found.scores),
                "sure_but_wrong": int(each.wrong.sum()),
                "missed": len(each.missed),
                "fault": image.fault,
            }
            for image, each in zip(images, mistakes, strict=True)
        ],
    }


def _write_pictures(
    data: DetectionData, mistakes: Sequence[Mistakes], failed: Sequence[bool], out: Path, max_pixels: int
) -> None:
    """Write the images with the surest wrong detections, and those with the most missed objects."""
    readable = [each for each, bad in zip(mistakes, failed, strict=True) if not bad]
    wrong = sorted((each for each in readable if each.wrong.any()), key=lambda each: -each.surest)
    missed = sorted((each for each in readable if len(each.missed)), key=lambda each: -len(each.missed))
    for name, chosen in ((MISTAKES, wrong), (MISSED, missed)):
        (out / name).unlink(missing_ok=True)  # of an earlier run of this test
        rows = [_picture(data, each, max_pixels) for each in chosen[:SHOWN_MISTAKES]]
        if rows:
            write_sheet(rows, out / name)


def _picture(data: DetectionData, each: Mistakes, max_pixels: int) -> Tensor:
    """An image with its objects (red: missed), and beside it with the sure detections (red: wrong): (3, h, w) uint8."""
    place = each.found.place
    image = read_image(data.entries[place].path, max_pixels)
    size = fitted_size((image.shape[1], image.shape[2]), TILE, 2 * TILE)
    objects = data.objects(place)
    true = {"boxes": torch.from_numpy(data.boxes[objects]), "labels": torch.from_numpy(data.labels[objects])}
    found = {key: torch.from_numpy(getattr(each.found, key)) for key in ("boxes", "labels", "scores")}
    tiles = []
    for shown, wrong in ((true, np.isin(objects, each.missed)), (found, each.wrong)):
        picture, scaled = resize(image, shown, size)
        colours = [WRONG if bad else RIGHT for bad in wrong]
        tiles.append(draw_detections(picture, scaled, data.classes, colours=colours))
    return torch.cat(tiles, dim=2)


def summarize_detection(result: dict[str, Any], out: Path | str) -> list[str]:
    """The result in a few lines to print."""
    lines = []
    for kind in ("boxes", "masks"):
        if kind in result:
            figures = result[kind]
            low, high = figures["intervals"]["ap"]
            lines += [
                f"{kind}: AP {_per_cent(figures['ap'])} % (95 % interval over images {_per_cent(low)} to "
                f"{_per_cent(high)} %), AP50 {_per_cent(figures['ap50'])} %, AP75 {_per_cent(figures['ap75'])} %",
                f"  small, medium, large {', '.join(_per_cent(figures[f'ap_{n}']) for n in SIZES)} %; recall with 100 "
                f"detections {_per_cent(figures['ar100'])} %",
            ]
    width = max(len(row["class"]) for row in result["per_class"])
    for row in result["per_class"]:
        shown = "  ".join(
            f"{kind} AP {_per_cent(row[kind]['ap'])} %, AP50 {_per_cent(row[kind]['ap50'])} %"
            for kind in ("boxes", "masks")
            if kind in row
        )
        lines.append(f"  {row['class']:{width}}  {shown}  ({row['objects']} objects)")
    images = result["images"]
    lines.append(f"{images['scored']} of {images['listed']} images scored, {result['seconds']:.1f} seconds")
    return [*lines, f"report: {Path(out) / REPORT}"]


def _per_cent(share: float) -> str:
    return "none" if np.isnan(share) else f"{100 * share:.1f}"
