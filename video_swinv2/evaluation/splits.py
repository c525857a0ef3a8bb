"""What a test or a probe is run on: a split of videos or of images, its labels checked, and the views it is seen in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from video_swinv2.data.collection import EVERYTHING, Collection
from video_swinv2.data.datasets import images_of
from video_swinv2.data.images import IMAGE_SUFFIXES
from video_swinv2.data.index import Item, Member
from video_swinv2.data.manifest import Manifest, find_splits, read_manifest
from video_swinv2.errors import UsageError
from video_swinv2.evaluation.protocols import Protocol, protocol_for_images
from video_swinv2.weights.store import Preprocessing

ClassesBy = Literal["name", "index"]


def is_image(item: Item) -> bool:
    """True for what is read as a still image: a file of such a name, or a member of a tar."""
    return isinstance(item, Member) or item.path.suffix.lower() in IMAGE_SUFFIXES


def available_splits(data: Path) -> tuple[str, ...]:
    """The splits that the data set itself has; one, `all`, for images that are not in splits."""
    images = images_of(str(data))
    if images is None:
        return find_splits(data)
    own = tuple(split for split in images.split_names if split in images.filled)
    return (EVERYTHING,) if own == ("train",) else own


def read_labelled_split(
    data: Path, split: str, classes: Sequence[str] | None = None, by: ClassesBy = "name"
) -> Manifest:
    """One labelled split of a data set, labels in the order of `classes` (its own order by default).

    by: "index" takes class folders of images that are called by numbers as places in `classes`, as ImageNet-V2's 0 to
    999 are meant. Raises UsageError for what cannot be read, a class that is not one of `classes`, and a missing label.
    """
    images = images_of(str(data))
    if images is not None:
        if classes is not None:
            _check_words(images, classes, by)
        return images.manifest(split, classes)
    if by == "index":
        raise UsageError(f"{data}: --classes-by index is for folders of images; lists have numbers of their own")
    manifest = read_manifest(data, split, classes)
    unlabelled = [entry.name for entry in manifest.entries if entry.label < 0]
    if unlabelled:
        raise UsageError(
            f"{data}: {len(unlabelled)} of {len(manifest.entries)} videos of split {split!r} have no label "
            f"(the first: {unlabelled[0]}); a test needs labels, `video-swinv2 predict` does not"
        )
    return manifest


def protocol_for_split(manifest: Manifest, protocol: Protocol, preprocessing: Preprocessing) -> Protocol:
    """The protocol, or what is left of it for stills; raises UsageError for a clip model that is given stills."""
    if not is_image(manifest.entries[0]):
        return protocol
    if preprocessing.frames is not None:
        raise UsageError(f"{manifest.root}: holds images, and this model takes videos; give it clips")
    return protocol_for_images(protocol)


def _check_words(images: Collection, classes: Sequence[str], by: ClassesBy) -> None:
    """Numbers as folder names are places in the model's classes only where the user says so."""
    if by == "index":
        for word in images.words:
            if word in classes:
                raise UsageError(
                    f"{images.root}: class {word!r} is one of the model's by its name; leave --classes-by index away"
                )
            if not word.isdecimal() or int(word) >= len(classes):
                raise UsageError(
                    f"{images.root}: class {word!r} is no place in the model's {len(classes)} classes; leave "
                    "--classes-by index away"
                )
        return
    named = images.numbered or (images.root / "classes.txt").is_file() or set(images.words) & set(classes)
    if not named and all(word.isdecimal() for word in images.words):
        raise UsageError(
            f"{images.root}: its class folders are called by numbers, the model's classes by names such as "
            f"{classes[0]!r}; where a number is a place in the model's list, add --classes-by index"
        )
