"""Reads annotations in COCO's format: one JSON file per split, and a folder of images.

    ROOT/annotations/instances_SPLIT*.json   with ROOT/SPLIT*/NAME.jpg, ROOT/images/SPLIT*/ or ROOT/images/
    ROOT/SPLIT/_annotations.coco.json        with the images beside it

SPLIT is train, val or test, or a synonym of it, and * is anything that belongs to the name, such as 2017.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from video_swinv2.data.trees import SPLIT_SYNONYMS, SPLITS
from video_swinv2.dense.detection_data import AnnotatedImage, AnnotatedObject, DetectionData, compact
from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import path_under
from video_swinv2.records import Record, parse_json, parse_record, read_bytes

MAX_BYTES = 2 * 2**30  # COCO's largest file has 450 MB
FIX = "correct the file or download it again"
BESIDE = "_annotations.coco.json"
Id = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=1, le=2**16)]


class _Image(Record, extra="ignore"):
    id: Id
    file_name: str
    height: Side
    width: Side


class _Category(Record, extra="ignore"):
    id: Id
    name: str


class _Annotation(Record, extra="ignore"):
    id: Id = 0
    image_id: Id
    category_id: Id
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)]
    area: float | None = None
    iscrowd: Annotated[int, Field(ge=0, le=1)] = 0
    segmentation: Any = None


class _Instances(Record, extra="ignore"):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def coco_files(root: Path) -> dict[str, list[Path]]:
    """The annotation files of a folder by split; empty if it has none."""
    found: dict[str, list[Path]] = defaultdict(list)
    words = {word: SPLIT_SYNONYMS.get(word, word) for word in (*SPLITS, *SPLIT_SYNONYMS)}
    for path in sorted(root.glob("annotations/instances_*.json")):
        rest = path.stem.removeprefix("instances_")
        # The longest word that the rest begins with: "training" before "train".
        for word in sorted(words, key=len, reverse=True):
            if rest.startswith(word):
                found[words[word]].append(path)
                break
    for word, split in words.items():
        if (root / word / BESIDE).is_file():
            found[split].append(root / word / BESIDE)
    return dict(found)


def read_coco(root: Path, split: str, classes: Sequence[str] | None = None, *, drop_faulty: bool) -> DetectionData:
    """The annotations of a split; arguments and errors as in `read_detection_data`."""
    files = coco_files(root).get(split, [])
    if len(files) != 1:
        what = f"{files[0].name} and {files[1].name} are both" if files else "has no annotations for"
        raise UsageError(f"{root}: {what} the split {split}; keep one file, such as annotations/instances_{split}.json")
    path = files[0]
    content = parse_json(read_bytes(path, MAX_BYTES, FIX), str(path), FIX, MAX_BYTES)
    record = parse_record(content, _Instances, str(path), FIX)
    names, label_of, notes = _classes(path, record.categories, classes)
    folder = _image_folder(root, path, record.images)
    by_image: dict[int, list[AnnotatedObject]] = {image.id: [] for image in record.images}
    if len(by_image) < len(record.images):
        raise UsageError(f"{path}: two images have the same id; {FIX}")
    for item in record.annotations:
        if item.image_id not in by_image:
            raise UsageError(f"{path}: annotation {item.id}: there is no image {item.image_id}; {FIX}")
        if item.category_id not in label_of:
            raise UsageError(f"{path}: annotation {item.id}: there is no category {item.category_id}; {FIX}")
        left, top, width, height = item.bbox
        outline = item.segmentation or None  # some tools write an empty list for none
        by_image[item.image_id].append(
            AnnotatedObject(
                (left, top, left + width, top + height),
                label_of[item.category_id],
                bool(item.iscrowd),
                item.area,
                outline,
                f"annotation {item.id}",
            )
        )
    images = []
    for image in record.images:
        try:
            file = path_under(folder, image.file_name, str(path))
        except UserError as error:
            raise UsageError(str(error)) from error
        images.append(AnnotatedImage(image.file_name, file, (image.height, image.width), image.id, by_image[image.id]))
    id_of = {label: number for number, label in label_of.items()}
    ids = [id_of.get(label, -1) for label in range(1, len(names) + 1)]
    return compact(root, split, names, images, notes, str(path), drop_faulty=drop_faulty, category_ids=ids)


def _classes(
    path: Path, categories: Sequence[_Category], wanted: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[int, int], list[str]]:
    """The class names, the label of each category id, and notes. The order is that of the ids, or as wanted."""
    ordered = sorted(categories, key=lambda category: category.id)
    ids = [category.id for category in ordered]
    if len(set(ids)) < len(ids):
        raise UsageError(f"{path}: two categories have the same id; {FIX}")
    names = tuple(category.name for category in ordered)
    if not names:
        raise UsageError(f"{path}: has no categories; {FIX}")
    if wanted is not None:
        absent = [name for name in names if name not in wanted]
        if absent:
            raise UsageError(
                f"{path}: its category {absent[0]!r} is not among the {len(wanted)} classes asked for"
                + (f" (nor are {len(absent) - 1} more)" if absent[1:] else "")
                + "; complete the class list"
            )
        return tuple(wanted), {category.id: wanted.index(category.name) + 1 for category in ordered}, []
    notes = []
    if ids != list(range(1, len(ids) + 1)):
        notes.append(f"{path.name}: category ids from {ids[0]} to {ids[-1]} became labels 1 to {len(ids)}")
    return names, {number: place for place, number in enumerate(ids, start=1)}, notes


def _image_folder(root: Path, path: Path, images: Sequence[_Image]) -> Path:
    """The folder that the file names are relative to: the first likely one that exists."""
    if path.name == BESIDE:
        return path.parent
    name = path.stem.removeprefix("instances_")
    folders = [root / name, root / "images" / name, root / "images"]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None and images:
        raise UsageError(f"{root}: has no folder {name}, images/{name} or images for the images of {path.name}; add it")
    return found or root
