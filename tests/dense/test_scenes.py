"""The drawn images of the how-to pages: both forms of them show the same cells."""

from __future__ import annotations

from pathlib import Path

import torch

import video_swinv2 as vs
from tests.dense.scenes import CLASSES, SPLITS, write_scenes


def test_boxes_and_masks_show_the_same_cells(tmp_path: Path) -> None:
    write_scenes(tmp_path)
    for split, count in SPLITS.items():
        objects = vs.DetectionDataset(tmp_path / "boxes", split)
        classes = vs.SegmentationDataset(tmp_path / "masks", split)
        assert len(objects) == len(classes) == count
        assert (tuple(objects.classes), tuple(classes.classes)) == (CLASSES, ("ground", *CLASSES))
    covered = 0
    for place in range(5):  # of the last split
        (image, target), (same_image, mask) = objects[place], classes[place]
        assert torch.equal(image, same_image)
        for (left, top, right, bottom), label in zip(
            target["boxes"].round().int().tolist(), target["labels"], strict=True
        ):
            covered += bool((mask[top:bottom, left:right] == label).any())
        assert set(mask.unique().tolist()) - {0} <= set(target["labels"].tolist())
    assert covered >= 40, "later cells hide a few of the earlier ones, not most"
