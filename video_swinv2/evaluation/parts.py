"""The finished parts of a test on disk, so that a killed test resumes, and how they are joined into one.

The videos of a test form groups (a group is about one batch, see `reading.py`), and consecutive groups form parts.
Which videos a part holds depends only on the list, the protocols and the batch size, never on the number of processes.
So a part is computed from the same batches whichever process computes it, and its scores are the same to the bit. A
part is written once it is complete: a process that is killed loses at most the part it was working on.

Letters: N videos, G videos in a group, V views of each (of all protocols), K classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_swinv2.errors import UserError
from video_swinv2.evaluation.explanation import explanation_strip
from video_swinv2.evaluation.forward import ScoredViews
from video_swinv2.evaluation.planning import TestPlan
from video_swinv2.evaluation.reading import Group, VideoRecord
from video_swinv2.files import create_folder, name_unwritable, path_under
from video_swinv2.report.metrics import video_probabilities
from video_swinv2.report.mistakes import MAX_MISTAKES, Strip, film_strip, surest_mistakes
from video_swinv2.report.scores import (
    NO_VIEW,
    VIEW_FIELDS,
    ArrayType,
    Scores,
    read_arrays,
    require_arrays,
    write_arrays,
)

MAX_PARTS = 256
"""More parts would mean less work lost when a process is killed, but more files to sync and read in every test."""

FOLDER = "shards"
"""The name of the folder in `out`. It is older than the word *part* and stays, so that interrupted tests can resume."""


_ROWS = ("videos", "logits", "views", "stand_ins", "reasons")  # the arrays with a row for each video
_ARRAYS: dict[str, ArrayType] = {
    "videos": ("i", 1),
    "logits": ("f", 3),
    "views": ("i", 3),
    "stand_ins": ("i", 1),
    "reasons": ("U", 1),
    "seconds": ("f", 1),
    "strip_places": ("i", 2),
    "strip_bytes": ("i", 2),
    "strips": ("u", 1),
}


@dataclass(frozen=True)
class ScoredVideos:
    """The scores of N videos of a test, those of one part or of all parts joined, with what the report needs of them.

    One row per video: videos: (N,) positions in the list. logits: (N, V, K) float16. views: (N, V, 5) int32, columns as
    VIEW_FIELDS. stand_ins: (N,) how many damaged frames were replaced. reasons: (N,) why a video failed, empty if it
    did not.

    seconds: (2,) seconds spent in all, and how many of these were spent waiting for the readers.

    strip_places: (M, 2), the (video, view) of each of M strips. strips: their JPEG files back to back in one array of
    bytes, film, explanation, film, ... strip_bytes: (M, 2) the length of each file, 0 without an explanation.
    """

    videos: NDArray[np.int64]
    logits: NDArray[np.float16]
    views: NDArray[np.int32]
    stand_ins: NDArray[np.int32]
    reasons: NDArray[np.str_]
    seconds: NDArray[np.float64]
    strip_places: NDArray[np.int64]
    strip_bytes: NDArray[np.int64]
    strips: NDArray[np.uint8]

    def strips_by_view(self) -> dict[tuple[int, int], Strip]:
        """The strips by (video, view)."""
        # 2 M - 1 cuts give 2 M files. For M = 0, np.split still returns one empty piece, which no place asks for.
        files = [file.tobytes() for file in np.split(self.strips, np.cumsum(self.strip_bytes)[:-1])]
        places = enumerate(self.strip_places.tolist())
        return {(video, view): Strip(*files[2 * row : 2 * row + 2]) for row, (video, view) in places}


class PartFolder:
    """The parts of one test on disk, in a folder named by a hash of everything that its scores depend on (`identity`).

    A test with another model, other data or other settings looks in another folder and so never reuses these parts.
    """

    def __init__(self, out: Path, identity: dict[str, Any], groups: int) -> None:
        # With the arrays of a part: those that an earlier version wrote with others are computed again.
        text = json.dumps([identity, _ARRAYS], sort_keys=True, allow_nan=False)
        self._parent = path_under(out, FOLDER, str(out))  # everything in it is deleted in the end
        self._folder = self._parent / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._groups = groups
        # Rounded up, so there are at most MAX_PARTS; up to MAX_PARTS groups, each is a part of its own.
        self._groups_per_part = math.ceil(groups / MAX_PARTS)

    @property
    def count(self) -> int:
        """The number of parts."""
        return math.ceil(self._groups / self._groups_per_part)

    def groups_in(self, part: int) -> range:
        """The groups of a part."""
        return range(part * self._groups_per_part, min((part + 1) * self._groups_per_part, self._groups))

    def part_of(self, group: int) -> int:
        """The part that a group belongs to."""
        return group // self._groups_per_part

    def open(self) -> list[int]:
        """Create the folder, delete the parts that other tests left beside it, and return the parts still to compute.

        Raises UserError if the folder cannot be created.
        """
        create_folder(self._folder, "--out")
        with name_unwritable(self._parent, "choose another --out"):
            for other in self._parent.iterdir():
                if other != self._folder:
                    shutil.rmtree(other) if other.is_dir() else other.unlink()
        # Parts are written atomically, so a file that exists is complete.
        return [part for part in range(self.count) if not self._path(part).is_file()]

    def save(self, part: int, scored: ScoredVideos) -> None:
        """Write a finished part atomically."""
        write_arrays(self._path(part), {name: getattr(scored, name) for name in ScoredVideos.__dataclass_fields__})

    def join(self, videos: int) -> ScoredVideos:
        """All parts as one, in the order of the list of `videos` videos.

        Raises UserError if a part cannot be read, and as `join_scored_videos` does.
        """
        # The likely cause of a missing part: processes on several machines, each with its own local folder `out`.
        fix = "`out` must be a folder that all processes share; run the test again"
        return join_scored_videos([_read_part(self._path(part), videos, fix) for part in range(self.count)], videos)

    def remove(self) -> None:
        """Delete all parts, once the results are written or if they are of no use."""
        shutil.rmtree(self._parent)

    def _path(self, part: int) -> Path:
        return self._folder / f"{part:05d}.npz"


def _read_part(path: Path, videos: int, fix: str) -> ScoredVideos:
    """One part of a test of `videos` videos. Raises UserError if its arrays do not fit together."""
    arrays = read_arrays(path, fix)
    require_arrays(arrays, _ARRAYS, str(path), fix)
    rows, strips = len(arrays["videos"]), len(arrays["strip_bytes"])
    found = {name: array.shape for name, array in arrays.items()}
    fits = all(found[name][0] == rows for name in _ROWS) and found["seconds"] == (2,)
    fits &= (
        found["strip_places"] == found["strip_bytes"] == (strips, 2)
        and int(arrays["strip_bytes"].sum()) == found["strips"][0]
    )
    positions = arrays["videos"]
    if not fits or (rows and not (positions.min() >= 0 and positions.max() < videos)):
        raise UserError(f"{path}: its arrays do not fit together; remove it and run the test again")
    return ScoredVideos(**{name: arrays[name] for name in _ARRAYS})


def join_scored_videos(parts: Sequence[ScoredVideos], n: int) -> ScoredVideos:
    """Concatenate the parts and sort their rows into the order of the list of `n` videos.

    This is where a test makes sure that it has exactly one score per (video, view). Raises UserError if a video is
    missing or occurs twice, or if the parts differ in their number of views or classes.
    """
    shapes = {(part.logits.shape[1:], part.views.shape[1]) for part in parts}
    if len(shapes) > 1:
        raise UserError(f"parts have different numbers of views or classes ({sorted(shapes)}); run the test again")
    videos = np.concatenate([part.videos for part in parts])
    # times[i] is how many rows video i has. A position >= n, which no video has, makes the array longer than n.
    times = np.bincount(videos, minlength=n)
    if times.size != n or (times != 1).any():
        missing, repeated = int((times == 0).sum()), int((times > 1).sum())
        raise UserError(
            f"of {n} videos {missing} were not scored and {repeated} were scored more than once; run the test again"
        )
    # The rows of videos are sorted; strips carry their (video, view) with them and may stay in any order.
    order = np.argsort(videos)
    back_to_back = ("strip_places", "strip_bytes", "strips")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ROWS + back_to_back}
    joined |= {name: joined[name][order] for name in _ROWS}
    return ScoredVideos(**joined, seconds=np.sum([part.seconds for part in parts], axis=0))


class PartBuilder:
    """Collects scored groups until their part is complete, with strips of the most confident mistakes in them.

    The report shows a few mistakes with their frames and where in them the evidence lies. Frames and features are in
    memory only while their group is being scored, and which mistakes will be shown is known only at the end. So a strip
    is made for every mistake that is among the MAX_MISTAKES most confident of its protocol *so far*, from what the
    model has computed anyway. Strips of mistakes that are displaced later remain in their part, and the report ignores
    them.
    """

    def __init__(self, plan: TestPlan) -> None:
        self._plan = plan
        # By group number: the records of its videos, their logits, and strips by (video, view).
        self._groups: dict[int, tuple[tuple[VideoRecord, ...], NDArray[np.float16], dict[tuple[int, int], Strip]]] = {}
        # For each protocol, the probabilities of this process's most confident mistakes by (video, view). A mistake
        # that is less confident than all of these cannot be among the most confident of the whole test.
        self._surest: list[dict[tuple[int, int], float]] = [{} for _ in plan.protocols]
        self._started, self._waited = time.perf_counter(), 0.0

    def add(self, group: Group, logits: NDArray[np.float16], scored: ScoredViews) -> None:
        """Add a group with its (G, V, K) logits, and G * V scored views. Adding it again changes nothing."""
        views = logits.shape[1]
        strips: dict[tuple[int, int], Strip] = {}
        for (protocol, columns), surest in zip(self._plan.columns(), self._surest, strict=True):
            scores = self._scores_of(group, logits[:, columns])
            for mistake in surest_mistakes(scores, video_probabilities(scores, protocol.average)):
                # From the view's number within its protocol to its number among all views of the video.
                view = columns.start + mistake.view
                place = (group.videos[mistake.position].position, view)
                surest[place] = mistake.answer_probability
                if len(surest) > MAX_MISTAKES:
                    # Drop the least confident; of equals the one later in the list, as `surest_mistakes` would.
                    del surest[min(surest, key=lambda other: (surest[other], -other[0]))]
                # Unless it was the one just dropped. pixels are (G * V, 3, [T,] H, W), video after video.
                if place in surest:
                    row, label = mistake.position * views + view, self._plan.card.classes.index(mistake.answer)
                    pixels, evidence = group.pixels[row], scored.evidence(row, label)
                    strips[place] = Strip(film_strip(pixels), explanation_strip(pixels, evidence))
        self._groups[group.number] = group.videos, logits, strips

    def has(self, numbers: Sequence[int]) -> bool:
        """Whether all groups `numbers` have been added."""
        return all(number in self._groups for number in numbers)

    def build(self, numbers: Sequence[int], waited: float) -> ScoredVideos:
        """Build the part that consists of the groups `numbers`.

        waited: the seconds that the whole test has waited for the readers so far. The part gets the time since the
        previous part was built.
        """
        groups = [self._groups[number] for number in numbers]
        records = [record for videos, _, _ in groups for record in videos]
        strips = {place: strip for _, _, strips in groups for place, strip in strips.items()}
        files = [file for strip in strips.values() for file in (strip.film, strip.explanation)]
        logits, now = np.concatenate([logits for _, logits, _ in groups]), time.perf_counter()
        scored = ScoredVideos(
            videos=np.array([record.position for record in records], dtype=np.int64),
            logits=logits,
            views=_view_rows(records, logits.shape[1]),
            stand_ins=np.array([record.stand_ins for record in records], dtype=np.int32),
            reasons=np.array([record.reason for record in records], dtype=np.str_),
            seconds=np.array([now - self._started, waited - self._waited]),
            strip_places=np.array(list(strips), dtype=np.int64).reshape(-1, 2),
            strip_bytes=np.array([len(file) for file in files], dtype=np.int64).reshape(-1, 2),
            strips=np.frombuffer(b"".join(files), dtype=np.uint8),
        )
        self._started, self._waited = now, waited
        return scored

    def forget(self, numbers: Sequence[int]) -> None:
        """Free the memory of the groups of a part that has been saved."""
        for number in numbers:
            self._groups.pop(number, None)

    def _scores_of(self, group: Group, logits: NDArray[np.float16]) -> Scores:
        """The (G, V, K) logits of one protocol as scores. The places of the views are zero; nothing here needs them."""
        entries = [self._plan.manifest.entries[record.position] for record in group.videos]
        return Scores(
            paths=tuple(entry.name for entry in entries),
            labels=np.array([entry.label for entry in entries], dtype=np.int64),
            logits=logits,
            views=np.zeros((*logits.shape[:2], len(VIEW_FIELDS)), dtype=np.int32),
            reasons=tuple(record.reason for record in group.videos),
            classes=self._plan.card.classes,
            metadata={},
        )


def _view_rows(records: Sequence[VideoRecord], n_views: int) -> NDArray[np.int32]:
    """(N, V, 5) int32, where each view lies: columns as VIEW_FIELDS, NO_VIEW throughout for videos that failed."""
    views = np.full((len(records), n_views, len(VIEW_FIELDS)), NO_VIEW, dtype=np.int32)
    for row, record in zip(views, records, strict=True):
        if not record.reason:
            row[:] = [(view.start, *view.box) for view in record.views]
    return views
