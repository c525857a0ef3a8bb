"""The scores of one test, the logits of every view of every video, and their file scores.npz.

The file holds plain arrays and no pickled objects, so that reading one from an unknown source runs no code. A report is
computed from it alone, except for film strips and the training run.

Letters: N videos, V views, K classes.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from video_swinv2.archives import open_archive
from video_swinv2.errors import UserError, first_line, nearest_name
from video_swinv2.files import atomic_write, name_unreadable
from video_swinv2.records import Record, parse_json, parse_record

OK = "ok"  # the values of the array `status`
FAILED = "failed"
VIEW_FIELDS = ("start", "top", "left", "height", "width")  # the columns of the array `views`
NO_VIEW = -1  # in every column of `views` for a video that failed
AGAIN = "run the test again"
MAX_VIEWS = 1000  # the curve over smaller numbers of views takes time and memory by the square of their number
MAX_CLASSES = 2**13  # more need as many videos: the confusion matrix, classes x classes, is to be no surprise

ArrayType = tuple[str, int]
"""What an array of a file has to be: kinds of its dtype as NumPy names them (U text, i and u integers, f), and axes."""
_ARRAYS: dict[str, ArrayType] = {
    "paths": ("U", 1),
    "labels": ("i", 1),
    "logits": ("f", 3),
    "views": ("i", 3),
    "status": ("U", 1),
    "reasons": ("U", 1),
    "classes": ("U", 1),
    "metadata": ("U", 0),
}

_Number = Annotated[int, Field(ge=0, le=10**9)]


class _TestedModel(Record, extra="allow"):
    path: str


class _ProtocolNumbers(Record, extra="allow"):
    clips: Annotated[int, Field(ge=1, le=MAX_VIEWS)] | None = None
    crops: Annotated[int, Field(ge=1, le=MAX_VIEWS)] | None = None


class TestedRecord(Record, extra="allow"):
    """What a report needs of the metadata of scores. The defaults are for files of older versions."""

    protocol: str
    data: str
    data_fingerprint: str
    split: str
    model: _TestedModel
    views: _Number
    frames: _Number | None
    frame_stride: _Number | None
    frame_order: str
    image_size: Annotated[list[_Number], Field(min_length=2, max_length=2)]
    average: Literal["prob", "logit"] = "prob"
    seed: _Number = 0
    unit: str = "videos"
    origins: list[str] | None = None
    lost_in_preparation: _Number = 0
    videos_with_damaged_frames: _Number = 0
    protocol_numbers: _ProtocolNumbers | None = None
    date: str = ""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    decode_wait_share: float = 0.0
    processes: _Number = 1
    device: str = ""
    precision: str = ""


@dataclass(frozen=True)
class Scores:
    """The logits of a model for each of V views of each of N listed videos.

    paths: N names as listed. labels: (N,) int64, indices into classes. logits: (N, V, K) float16, NaN for a failed
    video. views: (N, V, 5) int32, columns as in VIEW_FIELDS: the start in frames and the crop's box in pixels of the
    resized frame; NO_VIEW for a failed video. reasons: N texts that say why a video failed, empty for a scored one.
    classes: K names. metadata: plain JSON that records what was tested and how; its `origins`, if present, are the
    names of the recordings that the videos were cut from, '' if unknown.
    """

    paths: tuple[str, ...]
    labels: NDArray[np.int64]
    logits: NDArray[np.float16]
    views: NDArray[np.int32]
    reasons: tuple[str, ...]
    classes: tuple[str, ...]
    metadata: dict[str, Any]

    @property
    def scored(self) -> NDArray[np.bool_]:
        """(N,) bool, whether each video was read and scored."""
        return np.array([not reason for reason in self.reasons], dtype=bool)


def check_scores(scores: Scores, source: str) -> None:
    """Raise UserError, naming `source` and the fault, unless the arrays fit together and no score is missing.

    That is: every scored video has finite logits and a place for each view, and every failed one has neither.
    """
    fault = _fault(scores)
    if fault:
        raise UserError(f"{source}: {fault}; {AGAIN}")


def save_scores(scores: Scores, path: Path) -> None:
    """Check the scores and write them to an .npz file atomically. Raises UserError."""
    # np.str_ makes fixed-width text arrays, which need no pickling, even of an empty list, which would be float64
    # otherwise.
    check_scores(scores, str(path))
    arrays = {
        "paths": np.array(scores.paths, dtype=np.str_),
        "labels": scores.labels,
        "logits": scores.logits,
        "views": scores.views,
        "status": np.where(scores.scored, OK, FAILED),
        "reasons": np.array(scores.reasons, dtype=np.str_),
        "classes": np.array(scores.classes, dtype=np.str_),
        "metadata": np.array(json.dumps(scores.metadata, sort_keys=True, allow_nan=False)),
    }
    write_arrays(path, arrays)


def load_scores(path: Path) -> Scores:
    """Read and check a score file. Raises UserError if it is missing, is not a score file, or is incomplete."""
    arrays = read_arrays(path, "run `video-swinv2 test` first")
    require_arrays(arrays, _ARRAYS, f"{path}: not a score file", AGAIN)
    metadata = parse_json(str(arrays["metadata"]), f"{path}: metadata", AGAIN)
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: metadata: not a JSON object; {AGAIN}")
    scores = Scores(
        paths=tuple(arrays["paths"].tolist()),
        labels=arrays["labels"],
        logits=arrays["logits"],
        views=arrays["views"],
        reasons=tuple(arrays["reasons"].tolist()),
        classes=tuple(arrays["classes"].tolist()),
        metadata=metadata,
    )
    check_scores(scores, str(path))
    # `status` repeats what `reasons` imply, so a contradiction means that the file was changed or damaged.
    if arrays["status"].tolist() != np.where(scores.scored, OK, FAILED).tolist():
        raise UserError(f"{path}: status and reasons contradict each other; {AGAIN}")
    return scores


def load_test(path: Path) -> Scores:
    """Read the scores of a test for a report. Raises UserError as `load_scores`, and for a record that lacks a key.

    Also for more views or classes than a report is made for.
    """
    scores, where = load_scores(path), f"{path}: metadata"
    record = parse_record(scores.metadata, TestedRecord, where, AGAIN)
    videos, views, classes = scores.logits.shape
    if record.origins is not None and len(record.origins) != videos:
        raise UserError(f"{where}: origins: {len(record.origins)} names for {videos} videos; {AGAIN}")
    if views > MAX_VIEWS or classes > max(MAX_CLASSES, videos):
        raise UserError(f"{path}: {views} views and {classes} classes of {videos} videos are too many for a report")
    return scores


def title_of(record: dict[str, Any]) -> str:
    """Which test it is, for people: the model, the data set and its split, and the date if it is recorded."""
    # The last two parts of a path tell models apart that training calls model.safetensors.
    model = "/".join(Path(record["model"]["path"]).parts[-2:])
    date = f", {record['date']}" if record.get("date") else ""
    return f"{model} on {Path(record['data']).name} ({record['split']}){date}"


def reorder_classes(scores: Scores, classes: tuple[str, ...], source: str) -> Scores:
    """The same scores with logits and labels in the order of `classes`, matched by name.

    Raises UserError, naming `source` and a class, if the two lists are not the same classes.
    """
    if scores.classes == classes:
        return scores
    unknown = next((name for name in scores.classes if name not in set(classes)), None)
    if unknown is not None:
        nearest = nearest_name(unknown, classes)
        hint = f" (the nearest is {nearest!r})" if nearest else ""
        raise UserError(
            f"{source}: a test of other classes than the first: {unknown!r} is not among its {len(classes)} "
            f"classes{hint}; compare tests of the same data set"
        )
    if len(scores.classes) != len(classes):
        absent = next(name for name in classes if name not in scores.classes)
        raise UserError(
            f"{source}: a test of other classes than the first: it lacks {absent!r}; compare tests of the same data set"
        )
    index = {name: number for number, name in enumerate(scores.classes)}
    order = np.array([index[name] for name in classes], dtype=np.int64)  # (K,) new index -> old index
    labels = np.argsort(order)[scores.labels]  # argsort inverts a permutation: old index -> new index
    return replace(scores, classes=classes, labels=labels, logits=scores.logits[:, :, order])


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write named arrays to an .npz file atomically. Raises UserError."""
    with atomic_write(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)


def read_arrays(path: Path, fix: str) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz file, which together are no larger than the file.

    Raises UserError, whose message ends in `fix`, if it is missing, damaged, or would be larger once it is read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; {fix}")
    try:
        with name_unreadable(path), open_archive(path) as archive:
            return {name.removesuffix(".npy"): _read_array(archive, name) for name in archive.namelist()}
    except UserError:
        raise
    except Exception as error:  # in a damaged file, almost anything may fail
        raise UserError(f"{path}: damaged or not an .npz file ({first_line(error)}); {fix}") from error


def require_arrays(arrays: Mapping[str, NDArray[Any]], types: Mapping[str, ArrayType], where: str, fix: str) -> None:
    """Raise UserError, beginning with `where`, unless all arrays in `types` are there and are of their types."""
    missing = [name for name in types if name not in arrays]
    if missing:
        raise UserError(f"{where}: holds no {', '.join(missing)}; {fix}")
    for name, (kinds, axes) in types.items():
        array = arrays[name]
        if array.dtype.kind not in kinds or array.ndim != axes:
            raise UserError(f"{where}: {name} is {array.dtype} with {array.ndim} axes; {fix}")


def require_rows(arrays: Mapping[str, NDArray[Any]], types: Mapping[str, ArrayType], where: str, fix: str) -> None:
    """As `require_arrays`, and all arrays with axes must have one row for each of the same files, of finite numbers."""
    require_arrays(arrays, types, where, fix)
    lengths = {len(arrays[name]) for name, (_, axes) in types.items() if axes}
    if len(lengths) > 1 or not all(np.isfinite(arrays[name]).all() for name, (kind, _) in types.items() if kind == "f"):
        raise UserError(f"{where}: its arrays differ in length or hold NaN; {fix}")


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array of an archive. Raises ValueError unless its shape and type account for the bytes of its entry."""
    with archive.open(name) as stream:
        shape, dtype = _read_header(stream)
        held = archive.getinfo(name).file_size - stream.tell()
    # Objects would have to be unpickled, and elements without bytes may be of any number.
    if dtype.hasobject or not dtype.itemsize or math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{name} declares {shape} {dtype}, but holds {held:,} bytes")
    with archive.open(name) as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and the type at the beginning of an .npy file."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array in version {version} of the format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _fault(scores: Scores) -> str | None:
    """The first fault of the scores in words, or None. Later checks rely on the shapes that earlier ones confirmed."""
    n, n_classes = len(scores.paths), len(scores.classes)
    # shape[::2] of (N, V, K) is (N, K). The number of views is whatever the logits have, and `views` must agree with
    # it.
    if scores.logits.ndim != 3 or scores.logits.dtype != np.float16 or scores.logits.shape[::2] != (n, n_classes):
        return f"logits are {scores.logits.shape} {scores.logits.dtype}, not ({n}, views, {n_classes}) float16"
    n_views = scores.logits.shape[1]
    if n and not n_views * n_classes:
        return f"{n_views} views and {n_classes} classes"
    if scores.views.shape != (n, n_views, len(VIEW_FIELDS)):
        return f"views are {scores.views.shape}, not ({n}, {n_views}, {len(VIEW_FIELDS)})"
    if scores.labels.shape != (n,) or len(scores.reasons) != n:
        return f"{scores.labels.size} labels and {len(scores.reasons)} reasons for {n} videos"
    if n and not (scores.labels.min() >= 0 and scores.labels.max() < n_classes):
        return f"labels range from {scores.labels.min()} to {scores.labels.max()}, but there are {n_classes} classes"
    repeated = _first_repeated(scores.paths)
    if repeated is not None:
        return f"{repeated} is scored more than once"
    return _row_fault(scores)


def _row_fault(scores: Scores) -> str | None:
    """The first row that is not complete, in words, or None.

    A scored video needs finite logits and a recorded place for each view. A failed one must have neither.
    """
    scored = scores.scored
    finite = np.isfinite(scores.logits)
    placed: NDArray[np.bool_] = np.all(scores.views != NO_VIEW, axis=2)
    # `present` is (N, V): whether a view has all K logits, or all five numbers of its place.
    for name, present in (("finite logits", np.all(finite, axis=2)), ("recorded place", placed)):
        lacking = scored & ~present.all(axis=1)
        if lacking.any():
            row = int(lacking.argmax())  # argmax of a bool array is the index of the first True
            return f"{scores.paths[row]} has no {name} for view {int((~present[row]).argmax())}"
    surplus = ~scored & (finite.any(axis=(1, 2)) | placed.any(axis=1))
    if surplus.any():
        return f"{scores.paths[int(surplus.argmax())]} failed but has scores"
    return None


def _first_repeated(names: tuple[str, ...]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
