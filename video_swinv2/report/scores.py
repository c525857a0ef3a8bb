"""The scores of one test, kept for every video and view, and the file they live in (`scores.npz`, never pickle)."""

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

OK = "ok"
FAILED = "failed"
VIEW_FIELDS = ("start", "top", "left", "height", "width")
NO_VIEW = -1
_ARRAYS = ("paths", "labels", "logits", "views", "status", "reasons", "classes", "metadata")


@dataclass(frozen=True)
class Scores:
    """What a model answered to each view of each listed video. N videos, V views, K classes.

    paths: N names as listed. labels: (N,) int64, indices in classes. logits: (N, V, K) float16, NaN for a failed video.
    views: (N, V, 5) int32, columns as VIEW_FIELDS, in frames and in pixels of the resized frame; -1 for a failed video.
    reasons: N texts, empty for a scored video. metadata: plain JSON that says what the scores are; `origins` in it is
    the video each was cut from ('' unknown), absent where nothing is known.
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
        """(N,) true where the video was read and scored."""
        return np.array([not reason for reason in self.reasons], dtype=bool)


def check_scores(scores: Scores, source: str) -> None:
    """Raise UserError, naming `source` and the fault, unless there is one finite row for each video and view."""
    fault = _fault(scores)
    if fault:
        raise UserError(f"{source}: {fault}; run the test again")


def save_scores(scores: Scores, path: Path) -> None:
    """Write the scores to an `.npz` file, whole or not at all."""
    check_scores(scores, str(path))
    arrays = {
        "paths": np.array(scores.paths, dtype=np.str_),
        "labels": scores.labels,
        "logits": scores.logits,
        "views": scores.views,
        "status": np.where(scores.scored, OK, FAILED),
        "reasons": np.array(scores.reasons, dtype=np.str_),
        "classes": np.array(scores.classes, dtype=np.str_),
        "metadata": np.array(json.dumps(scores.metadata, sort_keys=True)),
    }
    write_arrays(path, arrays)


def load_scores(path: Path) -> Scores:
    """Read and check a score file; raises UserError where it is missing, not a score file, or not whole."""
    arrays = read_arrays(path, "run `video-swinv2 test` first")
    missing = [name for name in _ARRAYS if name not in arrays]
    if missing:
        raise UserError(f"{path}: not a score file, it has no {', '.join(missing)}; run the test again")
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
    if arrays["status"].tolist() != np.where(scores.scored, OK, FAILED).tolist():
        raise UserError(f"{path}: status and reasons disagree; run the test again")
    return scores


def in_class_order(scores: Scores, classes: tuple[str, ...], source: str) -> Scores:
    """The same scores with columns and labels in the order of `classes`, matched by name.

    UserError naming `source` and a class where the two are not the same classes.
    """
    if scores.classes == classes:
        return scores
    for name, those in ((name, classes) for name in scores.classes if name not in set(classes)):
        nearest = difflib.get_close_matches(name, those, n=1, cutoff=0.0)
        hint = f"the nearest is {nearest[0]!r}" if nearest else "there are none"
        raise UserError(f"{source}: its class {name!r} is not one of the {len(those)} wanted ({hint}); rename it")
    if len(scores.classes) != len(classes):
        absent = next(name for name in classes if name not in scores.classes)
        raise UserError(f"{source}: has no class {absent!r}, which the others have; compare tests of the same classes")
    place = {name: number for number, name in enumerate(scores.classes)}
    order = np.array([place[name] for name in classes], dtype=np.int64)
    labels = np.argsort(order)[scores.labels]
    return replace(scores, classes=classes, labels=labels, logits=scores.logits[:, :, order])


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write named arrays: a reader sees the old file or the new one. Raises UserError."""
    with atomic_write(path) as part, part.open("wb") as stream:
        np.savez(stream, **arrays)


def read_arrays(path: Path, mend: str) -> dict[str, NDArray[Any]]:
    """All arrays of an `.npz` file; raises UserError, ending in `mend` where it is missing."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(f"{path}: not an .npz file")
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {mend}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged or not an .npz file ({error}); {mend}") from error


def _fault(scores: Scores) -> str | None:
    """The first thing that is wrong with the scores, in words, or None."""
    n, n_classes = len(scores.paths), len(scores.classes)
    if scores.logits.ndim != 3 or scores.logits.dtype != np.float16 or scores.logits.shape[::2] != (n, n_classes):
        return f"logits are {scores.logits.shape} {scores.logits.dtype}, not ({n}, views, {n_classes}) float16"
    n_views = scores.logits.shape[1]
    if scores.views.shape != (n, n_views, len(VIEW_FIELDS)):
        return f"views are {scores.views.shape}, not ({n}, {n_views}, {len(VIEW_FIELDS)})"
    if scores.labels.shape != (n,) or len(scores.reasons) != n:
        return f"{scores.labels.size} labels and {len(scores.reasons)} reasons for {n} videos"
    if n and not (scores.labels.min() >= 0 and scores.labels.max() < n_classes):
        return f"labels go from {scores.labels.min()} to {scores.labels.max()} with {n_classes} classes"
    repeated = _first_repeated(scores.paths)
    if repeated is not None:
        return f"{repeated} is scored more than once"
    return _row_fault(scores)


def _row_fault(scores: Scores) -> str | None:
    """A scored video has finite logits and a place for each view; a failed one has neither."""
    scored = scores.scored
    finite = np.isfinite(scores.logits)
    placed: NDArray[np.bool_] = np.all(scores.views != NO_VIEW, axis=2)
    for name, present in (("score", np.all(finite, axis=2)), ("view", placed)):
        lacking = scored & ~present.all(axis=1)
        if lacking.any():
            row = int(lacking.argmax())
            return f"{scores.paths[row]} has no finite {name} for view {int((~present[row]).argmax())}"
    surplus = ~scored & (finite.any(axis=(1, 2)) | placed.any(axis=1))
    if surplus.any():
        return f"{scores.paths[int(surplus.argmax())]} failed and has scores"
    return None


def _first_repeated(names: tuple[str, ...]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
