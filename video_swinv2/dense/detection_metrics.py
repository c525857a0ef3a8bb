"""Average precision of a detector: COCO's figures for boxes and masks, per class, with intervals over images.

Letters: D detections of an image, N detections of a class, G true objects, K classes, T thresholds of IoU, R recalls.

COCO's figures are computed by faster-coco-eval. The intervals need average precision on thousands of resampled data
sets, for which matching again each time would take days. But resampling images changes no match, because detections
are matched within their image. So what was matched is recorded once (`matches`), and average precision is computed from
it with a weight for each image (`weighted_precision`), which with equal weights is COCO's own figure.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from video_swinv2.dense.detection_data import DetectionData
from video_swinv2.dense.outlines import coco_masks, encode_mask
from video_swinv2.errors import UsageError

MAX_DETECTIONS = 100  # per image, as in COCO
OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MASK_THRESHOLD = 0.5  # of the probability inside
WORK = 2e9  # resampled detections x thresholds that one interval may take; about a minute
MAX_RESAMPLINGS, MIN_RESAMPLINGS = 1000, 100
NAMES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
WITH_INTERVALS = {"ap": slice(None), "ap50": slice(0, 1), "ap75": slice(5, 6)}
"""The figures that get an interval, and the thresholds of IoU that each is the mean over."""


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one image, as plain arrays that processes can send to each other."""

    place: int
    """The place of the image in its `DetectionData`."""
    boxes: NDArray[np.float32]
    """(D, 4) as x1, y1, x2, y2 in pixels."""
    labels: NDArray[np.int64]
    """(D,), from 1."""
    scores: NDArray[np.float32]
    """(D,), best first."""
    masks: tuple[dict[str, Any], ...] | None
    """The run lengths of each; None for a detector without masks."""

    def surer_than(self, score: float) -> ImageDetections:
        """Those of at least this score."""
        count = int((self.scores >= score).sum())
        masks = None if self.masks is None else self.masks[:count]
        return replace(
            self, boxes=self.boxes[:count], labels=self.labels[:count], scores=self.scores[:count], masks=masks
        )


@dataclass(frozen=True)
class DetectionFigures:
    """COCO's figures, from 0 to 1; NaN where there is nothing to find."""

    figures: dict[str, float]
    """ap (the mean over IoU from 0.50 to 0.95), ap50, ap75; ap_small (up to 32 x 32 pixels), ap_medium (to 96 x 96) and
    ap_large; ar1, ar10, ar100 (recall with so many detections per image), ar_small, ar_medium and ar_large."""
    classes: tuple[float, ...]
    """The ap of each class."""
    classes50: tuple[float, ...]
    """The ap50 of each class."""
    intervals: dict[str, tuple[float, float]]
    """Of ap, ap50 and ap75, over images; empty if none were asked for."""


def image_detections(place: int, found: Mapping[str, Tensor], size: tuple[int, int]) -> ImageDetections:
    """What `Detector.detect` found in an image of `size` (H, W), with masks of the whole image as run lengths.

    Masks are pasted one by one: all at once, those of a large image would take hundreds of megabytes.
    """
    masks = None
    if "masks" in found:
        pairs = zip(found["masks"].cpu(), found["boxes"].cpu(), strict=True)
        pasted = (paste_masks_in_image(mask[None], box[None], size)[0, 0] > MASK_THRESHOLD for mask, box in pairs)
        masks = tuple(encode_mask(mask.numpy().astype(np.uint8)) for mask in pasted)
    boxes, labels, scores = (found[key].detach().cpu().numpy() for key in ("boxes", "labels", "scores"))
    return ImageDetections(place, boxes.astype(np.float32), labels.astype(np.int64), scores.astype(np.float32), masks)


def each_image_once(data: DetectionData, found: Sequence[ImageDetections]) -> list[ImageDetections]:
    """What all processes found, in the order of the images. Raises ValueError unless there is one for every image."""
    by_place = {item.place: item for item in found}
    if len(found) != len(by_place) or by_place.keys() != set(range(len(data))):
        missing = len(set(range(len(data))) - by_place.keys())
        raise ValueError(
            f"detections of {len(found)} images, {len(found) - len(by_place)} of them twice and {missing} missing, for "
            f"a split of {len(data)}; every image counts exactly once"
        )
    return [by_place[place] for place in range(len(data))]


def coco_results(found: Sequence[ImageDetections], data: DetectionData) -> list[dict[str, Any]]:
    """Detections in COCO's format of results: image_id, category_id (the label), bbox (x, y, width, height), score, and
    segmentation if there are masks."""
    results = []
    for item in found:
        boxes = _with_sides(item.boxes).tolist()
        for number, (box, label, score) in enumerate(zip(boxes, item.labels, item.scores, strict=True)):
            result = {
                "image_id": int(data.image_ids[item.place]),
                "category_id": int(label),
                "bbox": box,
                "score": float(score),
            }
            if item.masks is not None:
                result["segmentation"] = item.masks[number]
            results.append(result)
    return results


def data_set_results(found: Sequence[ImageDetections], data: DetectionData) -> list[dict[str, Any]]:
    """`coco_results` with the category ids of the data set, as its own tools read them.

    Detections of classes that it does not have are left out, as its tools do not know them.
    """
    results = coco_results(found, data)
    ids = (int(data.category_ids[result["category_id"] - 1]) for result in results)
    return [result | {"category_id": number} for result, number in zip(results, ids, strict=True) if number >= 0]


def coco_truth(data: DetectionData) -> dict[str, Any]:
    """The annotations of a split in COCO's format, with labels for category ids and without what was left out."""
    outlines = data.outlines_of(range(len(data.boxes)))
    image_of = np.repeat(np.arange(len(data)), np.diff(data.first))
    annotations = []
    for number, box in enumerate(_with_sides(data.boxes).tolist()):
        annotation = {
            "id": number + 1,
            "image_id": int(data.image_ids[image_of[number]]),
            "category_id": int(data.labels[number]),
            "bbox": box,
            "area": float(data.areas[number]),
            "iscrowd": int(data.ignored[number]),
        }
        annotations.append(annotation | ({"segmentation": outlines[number]} if outlines else {}))
    images = [
        {"id": int(number), "height": data.size(place)[0], "width": data.size(place)[1]}
        for place, number in enumerate(data.image_ids)
    ]
    categories = [{"id": label, "name": name} for label, name in enumerate(data.classes, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def detection_figures(
    data: DetectionData,
    found: Sequence[ImageDetections],
    *,
    masks: bool = False,
    intervals: bool = False,
    seed: int = 0,
    level: float = 0.95,
) -> DetectionFigures:
    """COCO's figures of what was found in a split.

    Args:
        found: one item per image of the split, in any order.
        masks: whether masks are compared instead of boxes.
        intervals: whether to compute intervals too: images are drawn with replacement, 100 to 1,000 times (fewer for
            more detections), ap is computed for each, and the interval has `level` of the results, by percentiles.
        seed: of the resampling.

    Raises ValueError unless every image was looked at exactly once, and UsageError if masks are asked for but the data
    set or the detector has none.
    """
    found = each_image_once(data, found)
    if masks and not (data.has_masks and all(item.masks is not None for item in found)):
        raise UsageError(
            "masks: either the data set has no segmentations or the detector finds none; compare the boxes"
        )
    evaluated = _evaluate(data, found, masks)
    # (T, R, K) of objects of all sizes and the most detections; COCO's code has -1 where there is nothing to find.
    precision = _known(np.asarray(evaluated.eval["precision"])[:, :, :, 0, -1])
    return DetectionFigures(
        dict(zip(NAMES, _known(np.array(evaluated.stats[: len(NAMES)])).tolist(), strict=True)),
        tuple(_mean(precision[:, :, label]) for label in range(len(data.classes))),
        tuple(_mean(precision[0, :, label]) for label in range(len(data.classes))),
        ap_intervals(matches(data, found, masks), len(data), seed, level) if intervals else {},
    )


def _known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(values < 0, np.nan, values)


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of the values that are numbers; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _evaluate(data: DetectionData, found: Sequence[ImageDetections], masks: bool) -> Any:
    """faster-coco-eval's evaluation, run."""
    library = _library()
    # With a box, COCO's code would take the area of a mask to be that of its box.
    unwanted = "bbox" if masks else "segmentation"
    results = [{k: v for k, v in result.items() if k != unwanted} for result in coco_results(found, data)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = library.COCO(coco_truth(data))
        evaluation = library.COCOeval_faster(truth, truth.loadRes(results), "segm" if masks else "bbox")
        evaluation.run()
    return evaluation


def _library() -> ModuleType:
    coco_masks()  # says how to install it
    import faster_coco_eval

    module: ModuleType = faster_coco_eval
    return module


@dataclass(frozen=True)
class ClassMatches:
    """All detections of one class, best first, and what each was matched to."""

    images: NDArray[np.int64]
    """(N,): the place of the image."""
    right: NDArray[np.bool_]
    """(T, N): matched to an object."""
    wrong: NDArray[np.bool_]
    """(T, N): matched to nothing. A detection of a crowd is neither."""
    objects: NDArray[np.int64]
    """(images,): the objects to be found in each image."""


def matches(data: DetectionData, found: Sequence[ImageDetections], masks: bool) -> list[ClassMatches]:
    """COCO's matching of detections to objects: the best detection first, each to the free object of its class that it
    overlaps most, or else to a crowd.

    found: one item per image, in the order of the images.
    """
    labels = range(1, len(data.classes) + 1)
    parts: dict[int, list[tuple[int, NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]]] = {
        k: [] for k in labels
    }
    objects = np.zeros((len(data.classes) + 1, len(data)), dtype=np.int64)
    for item in found:
        for label, chosen, true in _by_label(data, item):
            objects[label, item.place] = (~data.ignored[true]).sum()
            right, wrong, _ = _match(_overlaps(data, item, chosen, true, masks), data.ignored[true])
            parts[label].append((item.place, item.scores[chosen], right, wrong))
    return [_joined(parts[label], objects[label]) for label in labels]


def image_mistakes(data: DetectionData, item: ImageDetections) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which detections of an image are wrong, (D,), and the places of the objects that none of them found.

    Boxes are compared, at an IoU of 0.5 and otherwise as in `matches`.
    """
    wrong, missed = np.zeros(len(item.labels), dtype=bool), [np.zeros(0, dtype=np.int64)]
    for _, chosen, true in _by_label(data, item):
        _, unmatched, free = _match(_overlaps(data, item, chosen, true, False), data.ignored[true])
        wrong[chosen] = unmatched[0]
        missed.append(true[: free.shape[1]][free[0]])
    return wrong, np.sort(np.concatenate(missed))


def _by_label(data: DetectionData, item: ImageDetections) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Each label in an image, with the places of its detections, best first, and those of its objects, crowds last."""
    truth = data.objects(item.place, ignored=True)
    for label in np.union1d(item.labels, data.labels[truth]):
        true = truth[data.labels[truth] == label]
        true = true[np.argsort(data.ignored[true], kind="stable")]
        chosen = np.flatnonzero(item.labels == label)
        chosen = chosen[np.argsort(-item.scores[chosen], kind="stable")][:MAX_DETECTIONS]
        yield int(label), chosen, true


def _joined(
    parts: Sequence[tuple[int, NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]], objects: NDArray[np.int64]
) -> ClassMatches:
    """The matches of all images for one class: (T, D) of each -> (T, N), best first."""
    if not parts:
        nothing = np.zeros((len(OVERLAPS), 0), dtype=bool)
        return ClassMatches(np.zeros(0, dtype=np.int64), nothing, nothing, objects)
    images = np.concatenate([np.full(len(scores), place) for place, scores, _, _ in parts])
    order = np.argsort(-np.concatenate([scores for _, scores, _, _ in parts]), kind="stable")
    right = np.concatenate([part for _, _, part, _ in parts], axis=1)[:, order]
    wrong = np.concatenate([part for _, _, _, part in parts], axis=1)[:, order]
    return ClassMatches(images[order], right, wrong, objects)


def _overlaps(
    data: DetectionData, item: ImageDetections, chosen: NDArray[np.int64], true: NDArray[np.int64], masks: bool
) -> NDArray[np.float64]:
    """The IoU of detections and objects of one image, (D, G); with a crowd, the share of the detection inside it."""
    if not len(chosen) or not len(true):
        return np.zeros((len(chosen), len(true)))
    library = coco_masks()
    crowd = data.ignored[true].astype(np.uint8).tolist()
    if masks and item.masks is not None:
        height, width = data.size(item.place)
        outlines = [library.segmToRle(outline, width, height) for outline in data.outlines_of(true)]
        overlaps = library.iou([item.masks[place] for place in chosen], outlines, crowd)
    else:
        overlaps = library.iou(_with_sides(item.boxes[chosen]), _with_sides(data.boxes[true]), crowd)
    return np.asarray(overlaps, dtype=np.float64).reshape(len(chosen), len(true))


def _with_sides(boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, 4) as x1, y1, x2, y2 -> x, y, width, height. In float64, as pycocotools computes."""
    corners = boxes.astype(np.float64)
    return np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1)


def _match(
    overlaps: NDArray[np.float64], ignored: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """(D, G) best first, and (G,) crowds last -> which detections are right and which are wrong, (T, D) each, and which
    objects were not found, (T, objects that are no crowds)."""
    count, objects = overlaps.shape
    right = np.zeros((len(OVERLAPS), count), dtype=bool)
    wrong = np.ones((len(OVERLAPS), count), dtype=bool)
    own = int((~ignored).sum())  # objects to be found come first
    free = np.ones((len(OVERLAPS), own), dtype=bool)
    rows = np.arange(len(OVERLAPS))
    limits = np.minimum(OVERLAPS, 1 - 1e-10)
    for number in range(count if objects else 0):
        in_crowd = (overlaps[number, own:] >= limits[:, None]).any(axis=1)  # a crowd is never used up
        if own:
            available = np.where(free, overlaps[number, :own], -1.0)  # (T, own)
            # Of equal overlaps, COCO takes the last.
            best = own - 1 - np.argmax(available[:, ::-1], axis=1)
            hit = available[rows, best] >= limits
            free[rows[hit], best[hit]] = False
            right[:, number] = hit
        wrong[:, number] = ~right[:, number] & ~in_crowd
    return right, wrong, free


def weighted_precision(found: ClassMatches, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The average precision of a class at each threshold, (T,), with a weight for each image, (images,).

    With whole weights it is that of a data set that has each image so many times. NaN if there is nothing to find.
    """
    objects = float(weights @ found.objects)
    if not objects:
        return np.full(len(OVERLAPS), np.nan)
    weight = weights[found.images]  # (N,)
    right = np.cumsum(found.right * weight, axis=1)
    wrong = np.cumsum(found.wrong * weight, axis=1)
    precision = right / np.maximum(right + wrong, np.spacing(1))
    # From each recall on, the best precision at this or any higher recall.
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    result = np.zeros(len(OVERLAPS))
    for threshold, recall in enumerate(right / objects):
        places = np.searchsorted(recall, RECALLS, side="left")
        result[threshold] = precision[threshold, places[places < len(recall)]].sum() / len(RECALLS)
    return result


def ap_intervals(
    found: Sequence[ClassMatches], images: int, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """The bootstrap intervals of ap, ap50 and ap75 over images, by percentiles; see `detection_figures`.

    It says how much the figures would differ on other images of this kind; how similar images of one scene are, it
    cannot know.
    """
    work = len(OVERLAPS) * max(sum(len(item.images) for item in found), 1)
    times = int(np.clip(WORK / work, MIN_RESAMPLINGS, MAX_RESAMPLINGS))
    random = np.random.default_rng(seed)
    results = []
    for _ in range(times):
        weights = random.multinomial(images, np.full(images, 1 / images)).astype(np.float64)
        precision = np.stack([weighted_precision(item, weights) for item in found])  # (K, T)
        results.append([_mean(precision[:, thresholds]) for thresholds in WITH_INTERVALS.values()])
    columns = np.array(results).T
    ends = [(1 - level) / 2, (1 + level) / 2]
    bounds = {}
    for name, values in zip(WITH_INTERVALS, columns, strict=True):
        known = values[~np.isnan(values)]
        low, high = np.quantile(known, ends) if len(known) else (np.nan, np.nan)
        bounds[name] = (float(low), float(high))
    return bounds
