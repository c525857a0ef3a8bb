"""COCO's figures against pycocotools, intervals against resampled data sets, and every image counted exactly once."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from video_swinv2.dense.coco import read_coco
from video_swinv2.dense.detection_data import AnnotatedImage, AnnotatedObject, compact
from video_swinv2.dense.detection_metrics import (
    NAMES,
    ImageDetections,
    coco_results,
    coco_truth,
    detection_figures,
    each_image_once,
    image_detections,
    image_mistakes,
    matches,
    weighted_precision,
)
from video_swinv2.dense.outlines import encode_mask
from video_swinv2.errors import UsageError

HERE = Path(__file__)
CLASSES = ("cat", "dog", "cow")


def ellipse(box, size):
    """An ellipse that fills a box, as a mask."""
    left, top, right, bottom = box
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    inside = ((x - (left + right) / 2) / (right - left) * 2) ** 2 + ((y - (top + bottom) / 2) / (bottom - top) * 2) ** 2
    return (inside <= 1).astype(np.uint8)


def random_box(random, size):
    height, width = size
    side = np.exp(random.uniform(np.log(6), np.log(min(size)), 2))  # from small to large
    centre = random.uniform(0, 1, 2) * [width, height]
    left, top = np.maximum(centre - side / 2, 0)
    right, bottom = np.minimum(centre + side / 2, [width, height])
    return (float(left), float(top), float(max(right, left + 2)), float(max(bottom, top + 2)))


def random_data(seed, images=6):
    """Images of several sizes with objects of all sizes, crowds among them, and images without objects."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(images):
        size = (int(random.integers(80, 220)), int(random.integers(80, 220)))
        objects = []
        for _ in range(int(random.integers(0, 7))):
            box, ignored = random_box(random, size), bool(random.random() < 0.15)
            box = (box[0], box[1], min(box[2], size[1]), min(box[3], size[0]))
            mask = ellipse(box, size)
            label = int(random.integers(1, 3))  # there is no cow
            objects.append(AnnotatedObject(box, label, ignored, float(mask.sum()), encode_mask(mask), "object"))
        found.append(AnnotatedImage(f"{number}.png", HERE, size, 10 * number + 3, objects))
    return compact(HERE.parent, "val", CLASSES, found, (), "memory", drop_faulty=False)


def random_detections(data, seed, most=30):
    """Detections near the objects with errors of all sizes, some of the wrong class, duplicates and pure inventions.

    Scores have two digits, so that some are equal.
    """
    random = np.random.default_rng(1000 + seed)
    everything = []
    for place in range(len(data)):
        height, width = data.size(place)
        boxes, labels = [], []
        for number in data.objects(place, ignored=True):
            for _ in range(int(random.integers(0, 4))):
                box = data.boxes[number] + random.normal(0, random.choice([0.5, 3, 12]), 4)
                boxes.append(np.clip(box, 0, [width, height, width, height]))
                labels.append(int(data.labels[number]) if random.random() < 0.9 else int(random.integers(1, 4)))
        for _ in range(int(random.integers(0, most // 3))):
            boxes.append(np.array(random_box(random, (height, width))))
            labels.append(int(random.integers(1, 4)))
        kept = [i for i, box in enumerate(boxes) if box[2] - box[0] > 1 and box[3] - box[1] > 1]
        scores = np.round(random.random(len(kept)), 2)
        order = np.argsort(-scores, kind="stable")
        chosen = [boxes[kept[i]] for i in order]
        everything.append(
            ImageDetections(
                place,
                np.array(chosen, dtype=np.float32).reshape(-1, 4),
                np.array([labels[kept[i]] for i in order], dtype=np.int64),
                scores[order].astype(np.float32),
                tuple(encode_mask(ellipse(box, (height, width))) for box in chosen),
            )
        )
    return everything


def pycocotools(truth, results, masks):
    """pycocotools' evaluation."""
    results = [{k: v for k, v in result.items() if k != ("bbox" if masks else "segmentation")} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = json.loads(json.dumps(truth))
        reference.createIndex()
        evaluation = COCOeval(
            reference, reference.loadRes(json.loads(json.dumps(results))), "segm" if masks else "bbox"
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def same(got, expected):
    """Equal to 1e-9, with NaN for COCO's -1."""
    return np.allclose(got, np.where(np.asarray(expected) < 0, np.nan, expected), rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("masks", [False, True])
def test_the_figures_of_50_random_result_files(masks):
    values = []
    for seed in range(50):
        data = random_data(seed)
        found = random_detections(data, seed)
        expected = pycocotools(coco_truth(data), coco_results(found, data), masks)
        figures = detection_figures(data, found, masks=masks)
        assert tuple(figures.figures) == NAMES
        assert same(list(figures.figures.values()), expected.stats), seed
        precision = expected.eval["precision"][:, :, :, 0, -1]
        for label in range(3):
            mean, mean50 = precision[:, :, label].mean(), precision[0, :, label].mean()  # all -1, or none
            assert same([figures.classes[label], figures.classes50[label]], [mean, mean50]), (seed, label)
        # What the intervals are computed from is the same, without a library.
        ones = np.ones(len(data))
        own = np.stack([weighted_precision(found, ones) for found in matches(data, found, masks)], axis=1)  # (T, K)
        assert same(own, precision.mean(axis=1)), seed
        values.append(figures.figures["ap"])
    assert 0.2 < np.nanmean(values) < 0.8
    assert np.isnan(figures.classes[2])  # there is no cow


@pytest.mark.parametrize("masks", [False, True])
def test_weights_stand_for_copies_of_images(masks):
    data = random_data(3)
    found = random_detections(data, 3)
    for item in found:  # distinct scores: with equal ones, the order of copies would matter
        item.scores[:] = np.sort(np.random.default_rng(item.place).random(len(item.scores)))[::-1]
    weights = np.array([2, 0, 1, 3, 0, 1])
    truth, results = coco_truth(data), coco_results(found, data)
    copied = {"categories": truth["categories"], "images": [], "annotations": []}
    copied_results = []
    for place, times in enumerate(weights):
        number = int(data.image_ids[place])
        for copy in range(times):
            new = 1000 * (copy + 1) + number
            copied["images"] += [image | {"id": new} for image in truth["images"] if image["id"] == number]
            copied["annotations"] += [a | {"image_id": new} for a in truth["annotations"] if a["image_id"] == number]
            copied_results += [r | {"image_id": new} for r in results if r["image_id"] == number]
    copied["annotations"] = [a | {"id": number + 1} for number, a in enumerate(copied["annotations"])]
    expected = pycocotools(copied, copied_results, masks).eval["precision"][:, :, :, 0, -1].mean(axis=1)
    own = [weighted_precision(item, weights.astype(float)) for item in matches(data, found, masks)]
    assert same(np.stack(own, axis=1), expected)


def test_intervals():
    data = random_data(1, images=12)
    found = random_detections(data, 1)
    one = detection_figures(data, found, intervals=True)
    two = detection_figures(data, found[::-1], intervals=True)  # in any order
    assert (
        one == dataclasses.replace(two, classes=one.classes, classes50=one.classes50) or one.intervals == two.intervals
    )
    assert set(one.intervals) == {"ap", "ap50", "ap75"}
    for name, (low, high) in one.intervals.items():
        assert 0 <= low < one.figures[name] < high <= 1
    wide, narrow = (
        detection_figures(data, found, intervals=True, level=level).intervals["ap"] for level in (0.99, 0.5)
    )
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    # Against resampling the slow way: copies of images, evaluated again.
    parts = matches(data, each_image_once(data, found), False)
    random = np.random.default_rng(5)
    draws = [np.bincount(random.integers(0, 12, 12), minlength=12).astype(float) for _ in range(400)]
    plain = [np.nanmean([weighted_precision(part, draw) for part in parts]) for draw in draws]
    low, high = np.quantile(plain, [0.025, 0.975])
    spread = high - low
    assert abs(one.intervals["ap"][0] - low) < 0.15 * spread
    assert abs(one.intervals["ap"][1] - high) < 0.15 * spread
    assert detection_figures(data, found).intervals == {}


def test_intervals_without_anything():
    data = random_data(0)
    empty = [
        ImageDetections(place, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), ())
        for place in range(len(data))
    ]
    for masks in (False, True):
        figures = detection_figures(data, empty, masks=masks, intervals=True)
        assert figures.figures["ap"] == 0
        assert figures.intervals["ap"] == (0, 0)


def test_every_image_counts_exactly_once():
    data = random_data(0)
    found = random_detections(data, 0)
    assert each_image_once(data, found[::-1]) == found
    with pytest.raises(ValueError, match=r"detections of 5 images, 0 of them twice and 1 missing, for a split of 6"):
        detection_figures(data, found[:-1])
    with pytest.raises(ValueError, match="detections of 7 images, 1 of them twice and 0 missing"):
        detection_figures(data, [*found, found[0]])
    with pytest.raises(ValueError, match="1 of them twice and 1 missing"):
        detection_figures(data, [*found[1:], found[1]])


def test_masks_need_segmentations():
    data = random_data(0)
    found = [dataclasses.replace(item, masks=None) for item in random_detections(data, 0)]
    with pytest.raises(UsageError, match="either the data set has no segmentations or the detector finds none"):
        detection_figures(data, found, masks=True)
    assert detection_figures(data, found).figures["ap"] > 0


def test_a_perfect_detector(tmp_path):
    """The true boxes and masks, through files and tensors, have an AP of 1."""
    data = random_data(2)
    path = tmp_path / "annotations" / "instances_val.json"
    path.parent.mkdir()
    (tmp_path / "images").mkdir()
    truth = coco_truth(data)
    for image in truth["images"]:
        image["file_name"] = f"{image['id']}.png"
        (tmp_path / "images" / image["file_name"]).touch()
    path.write_text(json.dumps(truth))
    again = read_coco(tmp_path, "val", drop_faulty=False)
    assert np.array_equal(again.boxes, data.boxes)
    assert np.array_equal(again.areas, data.areas)
    found = []
    for place in range(len(again)):
        target = again.target(place)
        # Masks of 28 x 28 that cover the boxes of ellipses.
        small = torch.from_numpy(ellipse((0, 0, 28, 28), (28, 28))).float().expand(len(target["boxes"]), 1, 28, 28)
        result = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["boxes"]))}
        found.append(image_detections(place, result | {"masks": small}, again.size(place)))
    figures = detection_figures(again, found, intervals=True)
    assert figures.figures["ap"] == pytest.approx(1.0)
    assert figures.intervals["ap"] == pytest.approx((1.0, 1.0))
    assert detection_figures(again, found, masks=True).figures["ap50"] > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_the_mistakes_of_all_images_are_those_of_the_matches(seed):
    data, found = random_data(seed), random_detections(random_data(seed), seed)
    every = [image_mistakes(data, item) for item in found]
    by_class = matches(data, found, masks=False)
    assert sum(wrong.sum() for wrong, _ in every) == sum(item.wrong[0].sum() for item in by_class) > 0
    missed = sum(item.objects.sum() - item.right[0].sum() for item in by_class)
    assert sum(len(places) for _, places in every) == missed > 0
    for place, (_, places) in enumerate(every):
        assert not data.ignored[places].any(), "a crowd is never missed"
        assert set(places) <= set(data.objects(place))
    for item in found:
        sure = item.surer_than(0.5)
        assert np.array_equal(sure.scores, item.scores[item.scores >= 0.5])
        assert len(sure.masks) == len(sure.boxes) == len(sure.labels) == len(sure.scores)
