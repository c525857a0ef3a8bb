"""Opens `data.source` of a configuration: a manifest for supervised runs, a mixture for self-supervised ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from video_swinv2.config import DataConfig, WeightedSource
from video_swinv2.data.collection import ALL_IMAGES, ImageCollection
from video_swinv2.data.images import image_tree
from video_swinv2.data.index import AnyEntry, compact_entries
from video_swinv2.data.manifest import Entry, Manifest, find_splits, notes_on_leaks, read_manifest
from video_swinv2.data.mixture import Mixture, MixtureSource
from video_swinv2.data.shards import shard_collection
from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import refuse_inside_source

# A folder with one of these files is a data set of videos, whatever else it contains.
VIDEO_LISTS = ("dataset.json", "train.csv", "train.txt")


def labelled_manifest(data: DataConfig, split: str, classes: Sequence[str] | None = None) -> Manifest:
    """The data set of a supervised run. Raises UsageError for several sources, or for a sample without a label.

    Images in folders or tar shards always have a split `all`, and a split `val` even if the source has only train: one
    image in twenty of each class is then held out. Notes on the training split say if another split shares its groups.
    """
    source = _single_source(data)
    if images := image_collection(source):
        return images.manifest(split, classes)
    manifest = read_manifest(Path(source), split, classes)
    unlabelled = next((entry for entry in manifest.entries if entry.label < 0), None)
    if unlabelled:
        raise UsageError(f"{unlabelled.path}: has no label in split {split}; add one, or remove the file from the list")
    check_files_exist(manifest.entries)
    if split != data.train_split:
        return manifest
    return replace(manifest, notes=(*manifest.notes, *notes_on_leaks(Path(source), manifest, split)))


def labelled_splits(data: DataConfig) -> tuple[str, ...]:
    """The splits that `labelled_manifest` can read."""
    source = _single_source(data)
    images = image_collection(source)
    return images.split_names if images else find_splits(Path(source))


def unlabelled_mixture(data: DataConfig, validation: bool, repeats: int = 1) -> Mixture:
    """All samples of a self-supervised run: images, frames or clips of all sources, but never of a test split.

    In training, sources are weighted, each video gives `data.frames_per_video` samples, and each of these is repeated
    `repeats` times (`augment.repeats`). In validation, every entry of the validation split gives one sample.
    """
    repeats = 1 if validation else repeats
    split = data.val_split if validation else data.train_split
    refusal = "data.train_split, data.val_split: must not name the test split, nor include its samples"
    if split == "test":
        raise UsageError(refusal)
    mixed = []
    for source in data.source:
        path = os.fspath(source)
        if images := image_collection(path):
            if data.frames is not None:
                raise UsageError(
                    f"{path}: contains images, but data.frames asks for clips; remove the source or omit data.frames"
                )
            # `all` includes the images of a test split, so it is refused like `test` itself if there is one.
            if split == ALL_IMAGES and "test" in images.splits_with_images:
                raise UsageError(refusal)
            entries: Sequence[AnyEntry] = images.entries(split)
            per_entry, fingerprint = repeats, images.fingerprint(split)
        else:
            # A source of videos without this split contributes nothing; only if all are empty is that an error.
            manifest = read_manifest(Path(path), split) if split in find_splits(Path(path)) else None
            videos, fingerprint = (manifest.entries, manifest.fingerprint) if manifest else ((), "")
            check_files_exist(videos)
            entries, per_entry = compact_entries(videos), 1 if validation else data.frames_per_video * repeats
        # Weights balance training. In validation, each sample counts once.
        weight = source.weight if isinstance(source, WeightedSource) and not validation else None
        if len(entries):
            mixed.append(MixtureSource(entries, per_entry, weight, fingerprint))
        elif weight is not None:
            raise UserError(f"{path}: nothing to train on, but it has a weight; remove it from data.source")
    if not mixed:
        asked = ", ".join(map(str, data.source))
        raise UserError(f"{asked}: nothing to {'validate' if validation else 'train'} on")
    return Mixture(mixed)


def image_collection(source: str) -> ImageCollection | None:
    """The images of a folder or of tar shards; None for a data set of videos, which has lists or contains no images."""
    path = Path(source)
    if _has_lists(path) or (path.is_file() and path.suffix != ".tar"):
        return None
    if path.is_dir():
        return image_tree(path.absolute()) or shard_collection(source)
    shards = shard_collection(source)
    if shards is None:
        raise UserError(f"{source}: no such data set or folder (data.source)")
    return shards


def refuse_inside_tree(out: Path, sources: Iterable[str | os.PathLike[str]]) -> None:
    """Raise UsageError if `out` is inside a folder tree of samples, of which it would become a part.

    A data set of videos with lists may hold the folders of its runs, since it consists of what the lists name.
    """
    refuse_inside_source(out, [source for source in sources if not _has_lists(Path(source))])


def _has_lists(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VIDEO_LISTS)


def check_files_exist(entries: Sequence[Entry]) -> None:
    """Raise UserError naming the first listed file that does not exist.

    Checked at the start, because a run would otherwise meet the missing file only when the epoch reaches it.
    """
    missing = [entry.location for entry in entries if not os.path.isfile(entry.location)]
    if missing:
        raise UserError(
            f"{missing[0]}: is listed but does not exist ({len(missing)} of {len(entries)} files are missing); "
            "prepare the data set again or remove them from the list"
        )


def _single_source(data: DataConfig) -> str:
    if len(data.source) != 1:
        raise UsageError(f"data.source: training with labels takes one data set, not {len(data.source)}")
    return os.fspath(data.source[0])
