"""The scores of one test, the logits of every view of every video, and their file scores.npz.

The file holds plain arrays and no pickled objects, so that reading one from an unknown source runs no code. A report is
computed from it alone, except for film strips and the training run.

Letters: N videos, V views, K classes.
"""

from __future__ import annotations

import difflib
import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_swinv2.errors import UserError
from video_swinv2.files import atomic_write

OK = "ok"  # the values of the array `status`
FAILED = "failed"
VIEW_FIELDS = ("start", "top", "left", "height", "width")  # the columns of the array `views`
NO_VIEW = -1  # in every column of `views` for a video that failed
_ARRAYS = ("paths", "labels", "logits", "views", "status", "reasons", "classes", "metadata")


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
        raise UserError(f"{source}: {fault}; run the test again")


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
    missing = [name for name in _ARRAYS if name not in arrays]
    if missing:
        raise UserError(f"{path}: not a score file: it has no {', '.join(missing)}; run the test again")
    try:
        scores = Scores(
            paths=tuple(arrays["paths"].tolist()),
            labels=arrays["labels"],
            logits=arrays["logits"],
            views=arrays["views"],
            reasons=tuple(arrays["reasons"].tolist()),
            classes=tuple(arrays["classes"].tolist()),
            metadata=json.loads(str(arrays["metadata"])),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: not a score file ({error}); run the test again") from error
    check_scores(scores, str(path))
    # `status` repeats what `reasons` imply, so a contradiction means that the file was changed or damaged.
    if arrays["status"].tolist() != np.where(scores.scored, OK, FAILED).tolist():
        raise UserError(f"{path}: status and reasons contradict each other; run the test again")
    return scores


def reorder_classes(scores: Scores, classes: tuple[str, ...], source: str) -> Scores:
    """The same scores with logits and labels in the order of `classes`, matched by name.

    Raises UserError, naming `source` and a class, if the two lists are not the same classes.
    """
    if scores.classes == classes:
        return scores
    unknown = next((name for name in scores.classes if name not in set(classes)), None)
    if unknown is not None:
        nearest = difflib.get_close_matches(unknown, classes, n=1, cutoff=0.0)
        hint = f"the nearest is {nearest[0]!r}" if nearest else "there are none"
        raise UserError(
            f"{source}: class {unknown!r} is not among the {len(classes)} expected classes ({hint}); "
            "compare tests of the same classes"
        )
    if len(scores.classes) != len(classes):
        absent = next(name for name in classes if name not in scores.classes)
        raise UserError(f"{source}: class {absent!r} of the other tests is missing; compare tests of the same classes")
    index = {name: number for number, name in enumerate(scores.classes)}
    order = np.array([index[name] for name in classes], dtype=np.int64)  # (K,) new index -> old index
    labels = np.argsort(order)[scores.labels]  # argsort inverts a permutation: old index -> new index
    return replace(scores, classes=classes, labels=labels, logits=scores.logits[:, :, order])


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write named arrays to an .npz file atomically. Raises UserError."""
    with atomic_write(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)


def read_arrays(path: Path, fix: str) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz file. Raises UserError, whose message ends in `fix`, if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            # np.load returns the array itself for an .npy file.
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(f"{path}: not an .npz file; {fix}")
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {fix}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged or not an .npz file ({error}); {fix}") from error


def _fault(scores: Scores) -> str | None:
    """The first fault of the scores in words, or None. Later checks rely on the shapes that earlier ones confirmed."""
    n, n_classes = len(scores.paths), len(scores.classes)
    # shape[::2] of (N, V, K) is (N, K). The number of views is whatever the logits have, and `views` must agree with
    # it.
    if scores.logits.ndim != 3 or scores.logits.dtype != np.float16 or scores.logits.shape[::2] != (n, n_classes):
        return f"logits are {scores.logits.shape} {scores.logits.dtype}, not ({n}, views, {n_classes}) float16"
    n_views = scores.logits.shape[1]
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
