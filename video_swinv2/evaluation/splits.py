"""The samples a test or probe runs on: one split of videos or images, with every label checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from video_swinv2.data.collection import ALL_IMAGES, ImageCollection
from video_swinv2.data.images import is_image_file
from video_swinv2.data.index import AnyEntry, TarMember
from video_swinv2.data.manifest import Manifest, find_splits, read_manifest
from video_swinv2.data.sources import image_collection
from video_swinv2.errors import UsageError
from video_swinv2.evaluation.protocols import Protocol, protocol_for_images
from video_swinv2.weights.store import Preprocessing

ClassesBy = Literal["name", "index"]


def is_image(item: AnyEntry) -> bool:
    """Whether the item is read as a still image: by its file name, or because it is a member of a tar."""
    return isinstance(item, TarMember) or is_image_file(item.path)


def available_splits(data: Path) -> tuple[str, ...]:
    """The splits that the data set itself has; only `all` for images that are not divided into splits."""
    images = image_collection(str(data))
    if images is None:
        return find_splits(data)
    own = tuple(split for split in images.split_names if split in images.splits_with_images)
    return (ALL_IMAGES,) if own == ("train",) else own


def read_labelled_split(
    data: Path, split: str, classes: Sequence[str] | None = None, by: ClassesBy = "name"
) -> Manifest:
    """One split of a data set in which every sample has a label; labels index `classes` (default: its own classes).

    With by="index", image folders named by numbers are indices into `classes`, as the folders 0 to 999 of ImageNet-V2
    are. Raises UsageError for a split that cannot be read, a class missing from `classes`, and a missing label.
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
    return manifest


def protocol_for_split(manifest: Manifest, protocol: Protocol, preprocessing: Preprocessing) -> Protocol:
    """The protocol as it applies to this split: unchanged for videos, without its several clips for images.

    Raises UsageError for images with a clip model.
    """
    if not is_image(manifest.entries[0]):
        return protocol
    if preprocessing.frames is not None:
        raise UsageError(f"{manifest.root}: contains images, but the model takes clips; give it videos")
    return protocol_for_images(protocol)


def _check_folder_names(images: ImageCollection, classes: Sequence[str], by: ClassesBy) -> None:
    """Raise UsageError where it is unclear whether class folders are named by class or by index.

    A folder `7` may be the model's class 7 or the data set's own eighth class. It is taken as the former only if the
    user says so, since a wrong guess gives a plausible, wrong accuracy.
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
    # Labels of tars are indices by their format, and classes.txt or one shared name settles it as well.
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
