"""The samples that a test or probe runs on: one split of a data set of videos or images, every label checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from video_swinv2.data.collection import ALL_IMAGES, ImageCollection
from video_swinv2.data.images import is_image
from video_swinv2.data.index import IndexedEntries
from video_swinv2.data.manifest import Manifest, find_splits, notes_on_leaks, read_manifest
from video_swinv2.data.sources import image_collection
from video_swinv2.errors import UsageError
from video_swinv2.evaluation.protocols import Protocol, protocol_for_images
from video_swinv2.weights.store import Preprocessing

ClassesBy = Literal["name", "index"]


def has_only_images(manifest: Manifest) -> bool:
    """Whether a split is one of images: a folder or tars of images always, a list if every file on it is an image."""
    return isinstance(manifest.entries, IndexedEntries) or all(map(is_image, manifest.entries))


def available_splits(data: Path) -> tuple[str, ...]:
    """The splits that the data set itself has; just `all` for images that are not divided into splits.

    Training holds out a val split where a collection of images has none. It does not count here: a probe of such a
    collection divides the images itself.
    """
    images = image_collection(str(data))
    if images is None:
        return find_splits(data)
    # `split_names` includes a val split held out of train, `splits_with_images` does not. Images without split folders
    # are all train.
    own = tuple(split for split in images.split_names if split in images.splits_with_images)
    return (ALL_IMAGES,) if own == ("train",) else own


def read_labelled_split(
    data: Path,
    split: str,
    classes: Sequence[str] | None = None,
    by: ClassesBy = "name",
    train: str | None = "train",
) -> Manifest:
    """Read a split whose samples all have labels; labels index `classes`, by default the data set's own.

    With by="index", class folders of images are named by indices into `classes`, as the folders 0 to 999 of ImageNet-V2
    are. Notes say if the split `train`, unless it is None, shares groups with this one. Raises UsageError for a split
    that cannot be read, a class missing from `classes`, and a missing label.
    """
    images = image_collection(str(data))
    if images is not None:
        if classes is not None:
            _check_folder_names(images, classes, by)
        return images.manifest(split, classes)
    if by == "index":
        raise UsageError(f"{data}: --classes-by index applies to image folders only; lists hold their own indices")
    manifest = read_manifest(data, split, classes)
    unlabelled = [entry.name for entry in manifest.entries if entry.label < 0]
    if unlabelled:
        raise UsageError(
            f"{data}: {len(unlabelled)} of {len(manifest.entries)} videos of split {split!r} have no label "
            f"(first: {unlabelled[0]}); add the labels, or use `video-swinv2 predict`, which needs none"
        )
    if train is None:
        return manifest
    return replace(manifest, notes=(*manifest.notes, *notes_on_leaks(data, manifest, train)))


def protocol_for_split(manifest: Manifest, protocol: Protocol, preprocessing: Preprocessing) -> Protocol:
    """The protocol as it applies to this split: unchanged for videos, with a single clip for images.

    Raises UsageError for nothing but images and a model that takes clips. Among the videos of a list, an image fails
    alone, when it is read.
    """
    if not has_only_images(manifest):
        return protocol
    if preprocessing.frames is not None:
        raise UsageError(f"{manifest.root}: contains images, but the model takes clips; give it videos")
    return protocol_for_images(protocol)


def _check_folder_names(images: ImageCollection, classes: Sequence[str], by: ClassesBy) -> None:
    """Raise UsageError if it is unclear whether class folders are named by class or by index, or if `by` is wrong.

    A folder `7` may mean the model's class with index 7, or a class of the data set that is called "7". Numbers are
    taken as indices only if the user says so, because a wrong guess gives a plausible but wrong accuracy.
    """
    if by == "index":
        for name in images.label_names:
            if name in classes:
                raise UsageError(
                    f"{images.root}: class folder {name!r} is the name of a class of the model; omit --classes-by index"
                )
            if not name.isdecimal() or int(name) >= len(classes):
                raise UsageError(
                    f"{images.root}: class folder {name!r} is not an index into the model's {len(classes)} classes; "
                    "omit --classes-by index"
                )
        return
    # Labels in tars are indices by format. A classes.txt says what the numbers of folders mean, and a name that folders
    # share with the model's classes shows that folders are named by class.
    unambiguous = (
        images.labels_are_numbers
        or (images.root / "classes.txt").is_file()
        or bool(set(images.label_names) & set(classes))
    )
    if not unambiguous and all(name.isdecimal() for name in images.label_names):
        raise UsageError(
            f"{images.root}: its class folders are named by numbers, the model's classes by names such as "
            f"{classes[0]!r}; if the numbers are indices into the model's classes, add --classes-by index"
        )
