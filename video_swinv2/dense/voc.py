"""Reads annotations in Pascal VOC's format: one XML file per image.

    ROOT/Annotations/NAME.xml  ROOT/JPEGImages/NAME.jpg  ROOT/ImageSets/Main/train.txt, val.txt, test.txt, trainval.txt

Without lists, all annotations are the split train. A classes.txt in ROOT gives the classes and their order; without it,
they are the names in all annotations, sorted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from video_swinv2.data.images import shown_size
from video_swinv2.data.media import IMAGE_SUFFIXES
from video_swinv2.data.trees import SPLIT_SYNONYMS, SPLITS, suffix_of
from video_swinv2.dense.detection_data import AnnotatedImage, AnnotatedObject, DetectionData, compact
from video_swinv2.errors import UsageError
from video_swinv2.files import name_unreadable, path_under, read_class_list, read_text_lines
from video_swinv2.records import read_bytes

MAX_BYTES = 4 * 2**20  # of an annotation; those of VOC have a few KB
MAX_ELEMENTS = 10**5
FIX = "correct the file or write it again"


def is_voc(root: Path) -> bool:
    """Whether a folder has VOC's layout."""
    return (root / "Annotations").is_dir() and (root / "JPEGImages").is_dir()


def voc_lists(root: Path) -> dict[str, Path]:
    """The lists of names by split."""
    folder = root / "ImageSets" / "Main"
    found: dict[str, Path] = {}
    for word in (*SPLIT_SYNONYMS, *SPLITS, "trainval"):
        if (folder / f"{word}.txt").is_file():
            found[SPLIT_SYNONYMS.get(word, word)] = folder / f"{word}.txt"
    return found


def read_voc(root: Path, split: str, classes: Sequence[str] | None = None, *, drop_faulty: bool) -> DetectionData:
    """The annotations of a split; arguments and errors as in `read_detection_data`."""
    names = _names(root, split)
    with name_unreadable(root / "JPEGImages"):
        files = sorted((root / "JPEGImages").iterdir())
    pictures = {path.stem: path for path in files if suffix_of(path.name) in IMAGE_SUFFIXES}
    listed, notes = "the class list", []
    if classes is None and (root / "classes.txt").is_file():
        classes, listed = read_class_list(root / "classes.txt"), "classes.txt"
    if classes is None:
        # All annotations, so that every split has the same classes in the same order.
        classes = sorted(_class_names(root))
        notes.append(f"classes from the annotations, in this order: {', '.join(classes)}")
    images = []
    for number, name in enumerate(names, start=1):
        path = path_under(root / "Annotations", f"{name}.xml", f"the split {split}")
        annotation = parse_xml(path)
        picture = pictures.get(name, root / "JPEGImages" / f"{name}.jpg")
        objects = [
            _object(path, place, found, classes, listed)
            for place, found in enumerate(annotation.iterfind("object"), start=1)
        ]
        images.append(AnnotatedImage(name, picture, _size(path, annotation, picture), number, objects))
    where = str(root / "Annotations")
    return compact(root, split, classes, images, notes, where, drop_faulty=drop_faulty)


def _names(root: Path, split: str) -> list[str]:
    """The names of the images of a split, in the order of its list, or sorted."""
    if lists := voc_lists(root):
        if split not in lists:
            raise UsageError(f"{root}: has no ImageSets/Main/{split}.txt; it has the splits {', '.join(lists)}")
        return [line.split()[0] for line in read_text_lines(lists[split]) if line.split()]
    if split != "train":
        raise UsageError(f"{root}: has no list ImageSets/Main/{split}.txt; without lists, all images are in train")
    return _all_names(root)


def _all_names(root: Path) -> list[str]:
    with name_unreadable(root / "Annotations"):
        return sorted(path.stem for path in (root / "Annotations").iterdir() if path.suffix == ".xml")


def _class_names(root: Path) -> set[str]:
    found = set()
    for name in _all_names(root):
        path = root / "Annotations" / f"{name}.xml"
        found |= {_text(path, place, item, "name") for place, item in enumerate(parse_xml(path).iterfind("object"), 1)}
    return found


def _object(path: Path, place: int, found: Element, classes: Sequence[str], listed: str) -> AnnotatedObject:
    name = _text(path, place, found, "name")
    if name not in classes:
        raise UsageError(
            f"{path}: object {place} is a {name!r}, which is not among the {len(classes)} classes of {listed}; "
            "complete the list"
        )
    left, top, right, bottom = (
        _number(path, place, found, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")
    )
    return AnnotatedObject(
        # VOC counts pixels from 1, and its maxima are the last pixels inside: 1 to 1 is one pixel, from 0 to 1.
        (left - 1, top - 1, right, bottom),
        classes.index(name) + 1,
        (found.findtext("difficult") or "0").strip() == "1",
        None,
        None,
        f"{path.name}, object {place}",
    )


def _size(path: Path, annotation: Element, picture: Path) -> tuple[int, int]:
    """(H, W) as annotated. Some tools write 0 or nothing; then it is that of the image, if there is one."""
    texts = [(annotation.findtext(f"size/{key}") or "0").strip() for key in ("height", "width")]
    if not all(text.isdecimal() and len(text) < 6 for text in texts):
        raise UsageError(f"{path}: invalid size {' x '.join(texts)[:60]!r}; {FIX}")
    height, width = map(int, texts)
    if height and width:
        return height, width
    return shown_size(picture) if os.path.isfile(picture) else (1, 1)


def _text(path: Path, place: int, found: Element, key: str) -> str:
    text = (found.findtext(key) or "").strip()
    if not text:
        raise UsageError(f"{path}: object {place} has no {key}; {FIX}")
    return text


def _number(path: Path, place: int, found: Element, key: str) -> float:
    text = _text(path, place, found, key)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{path}: object {place}: {key} is {text[:60]!r}, which is no number; {FIX}")
    return number


def parse_xml(path: Path) -> Element:
    """The root element of a small XML file. Raises UserError if it is damaged, or has a document type.

    Entities that multiply ("billion laughs") or that name files can only be declared in a document type, which no
    annotation needs.
    """
    content = read_bytes(path, MAX_BYTES, FIX)
    builder = TreeBuilder()
    elements = 0

    def refuse(*_: object) -> None:
        raise UsageError(f"{path}: has a document type (DOCTYPE), which is not read; remove it")

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal elements
        elements += 1
        if elements > MAX_ELEMENTS:
            raise UsageError(f"{path}: has more than {MAX_ELEMENTS:,} elements; {FIX}")
        builder.start(tag, attributes)

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(content, True)
        return builder.close()
    except (expat.ExpatError, AssertionError, ValueError) as error:  # an AssertionError for an element that never ends
        raise UsageError(f"{path}: not valid XML ({error}); {FIX}") from error
