"""Opens a data set of images with boxes, for training loops of your own and for ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from video_swinv2.data.datasets import Target
from video_swinv2.data.display import MAX_PIXELS
from video_swinv2.data.images import read_image
from video_swinv2.data.trees import SPLITS
from video_swinv2.dense.coco import coco_files, read_coco
from video_swinv2.dense.detection_data import DetectionData, size_fault
from video_swinv2.dense.voc import is_voc, read_voc, voc_lists
from video_swinv2.errors import UsageError


def read_detection_data(
    path: Path | str, split: str, *, classes: Sequence[str] | None = None, drop_faulty: bool = False
) -> DetectionData:
    """Find and check the annotations of a split. `coco.py` and `voc.py` describe the two layouts.

    Args:
        path: a folder.
        split: such as train, val or test.
        classes: the names of the classes in the order of the labels, such as `model.classes`; by default the data set's
            own.
        drop_faulty: leave out missing images and faulty objects (no width or height, outside the image, a damaged
            segmentation), with a note in the result, instead of raising UsageError for the first.

    No image is opened; `check` of the result does that. Raises UsageError for a folder of another layout, a split that
    it lacks, a class that is not among `classes`, and annotations that are damaged or faulty.
    """
    root = Path(path).absolute()
    if not root.is_dir():
        raise UsageError(f"{path}: no such folder; give a data set in COCO's or VOC's layout")
    if is_voc(root):
        return read_voc(root, split, classes, drop_faulty=drop_faulty)
    if coco_files(root):
        return read_coco(root, split, classes, drop_faulty=drop_faulty)
    raise UsageError(
        f"{path}: has neither annotations/instances_*.json (COCO) nor Annotations and JPEGImages (VOC); "
        "docs/data-formats.md shows the layouts"
    )


def detection_splits(path: Path | str) -> tuple[str, ...]:
    """The splits of a data set, in the order train, val, test, others."""
    root = Path(path)
    names = set((voc_lists(root) or {"train": root}) if is_voc(root) else coco_files(root))
    return (*(name for name in SPLITS if name in names), *sorted(names - set(SPLITS)))


class DetectionDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """The images of one split with their boxes, and masks if there are any, as torchvision's detectors and ours train.

    Item i is (image, target): uint8 (3, H, W), RGB, and a dictionary of

        boxes     float32 (N, 4), x1, y1, x2, y2 in pixels; N may be 0
        labels    int64 (N,), from 1 in the order of `classes`: 0 is the background
        masks     uint8 (N, H, W), 1 inside; only if every object of the split has a segmentation
        area      float32 (N,), in pixels
        iscrowd   int64 (N,), 0: crowds of COCO and difficult objects of VOC are left out, unless `ignored` is set
        image_id  int64 ()

    Args:
        path, split, classes, drop_faulty: as in `read_detection_data`, which also says what is raised.
        transform: a function of image, target and a generator to image and target, such as a `DetectionAugment`. The
            generator is seeded from torch's global one, so that `torch.manual_seed` makes the items reproducible.
        ignored: whether objects that are not to be learned are in the target, too, with `iscrowd` 1.

    On access, raises DecodeError for an image that cannot be read or has another size than annotated. `check` looks for
    such images beforehand.
    """

    def __init__(
        self,
        path: Path | str,
        split: str,
        *,
        transform: Callable[[Tensor, Target, torch.Generator], tuple[Tensor, Target]] | None = None,
        classes: Sequence[str] | None = None,
        drop_faulty: bool = False,
        ignored: bool = False,
    ) -> None:
        self.data = read_detection_data(path, split, classes=classes, drop_faulty=drop_faulty)
        self.transform = transform
        self.ignored = ignored

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes: label k is number k - 1."""
        return self.data.classes

    @property
    def notes(self) -> tuple[str, ...]:
        """What was noticed in the annotations, and what was left out."""
        return self.data.notes

    @property
    def paths(self) -> list[Path]:
        """The image of every item."""
        return [entry.path for entry in self.data.entries]

    def check(self) -> None:
        """Raise DecodeError for the first image that cannot be read or that has another size than annotated."""
        self.data.check()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        entry = self.data.entries[index]
        image = read_image(entry.path, MAX_PIXELS)
        if (size := (image.shape[1], image.shape[2])) != self.data.size(entry.label):
            raise size_fault(entry.path, size, self.data.size(entry.label))
        target: Target = self.data.target(entry.label, ignored=self.ignored)
        if self.transform is not None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
            image, target = self.transform(image, target, generator)
        return image, dict(target)
