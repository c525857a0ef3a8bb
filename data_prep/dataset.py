"""The files that turn a folder of videos into a data set: dataset.json, one list per split, failed.csv.

Each is replaced in one step, so a reader never sees half of one. dataset.json is written last: it records the hashes of
the lists, and a folder without it is not yet a data set.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av

from data_prep.outcomes import VideoCounts, outcome_counts
from video_swinv2 import __version__
from video_swinv2.data.manifest import class_list_hash, content_fingerprint
from video_swinv2.errors import UserError
from video_swinv2.files import atomic_write, write_json


@dataclass(frozen=True)
class PreparedVideo:
    """A video of the data set: its path relative to the data set, class name ('' for none), and sha256."""

    path: str
    label: str
    sha256: str


@dataclass(frozen=True)
class FailedVideo:
    """A video that could not be prepared: its source, the reason (a key of outcomes.REASONS), and the error message."""

    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class SplitContent:
    """The videos of one split by outcome; `excluded` is how many listed videos were not to be prepared."""

    ok: Sequence[PreparedVideo]
    failed: Sequence[FailedVideo] = ()
    excluded: int = 0


def write_dataset(
    out: Path,
    *,
    name: str,
    classes: Sequence[str],
    splits: Mapping[str, SplitContent],
    settings: Mapping[str, Any],
    extra: Sequence[str] = (),
) -> None:
    """Write SPLIT.csv, failed.csv, extra.csv (videos of the source on no list, if there are any), then dataset.json.

    Raises UserError if the folder cannot be written.
    """
    record: dict[str, Any] = {"name": name, "classes": list(classes), "classes_sha256": class_list_hash(classes)}
    counts = {split: _write_list(out / f"{split}.csv", content) for split, content in splits.items()}
    failed = [(item.path, item.reason, item.detail) for content in splits.values() for item in content.failed]
    write_text(out / "failed.csv", _csv_text(("path", "reason", "detail"), failed))
    if extra:
        write_text(out / "extra.csv", _csv_text(("path",), [(path,) for path in extra]))
    else:  # left by an earlier run
        (out / "extra.csv").unlink(missing_ok=True)
    # Computed from paths, labels and hashes only: the same videos have the same fingerprint on every machine.
    fingerprints = "\n".join(f"{split} {count['fingerprint']}" for split, count in counts.items())
    record["fingerprint"] = hashlib.sha256(fingerprints.encode()).hexdigest()
    record |= {"splits": counts, "extra": len(extra), "settings": dict(settings), "versions": versions()}
    write_json(out / "dataset.json", record)


def _write_list(path: Path, content: SplitContent) -> dict[str, Any]:
    """Write the list of a split. Returns its entry in dataset.json."""
    text = _csv_text(("path", "label"), [(item.path, item.label) for item in content.ok])
    write_text(path, text)
    reasons = dict(Counter(item.reason for item in content.failed))
    ok, failed, excluded = len(content.ok), len(content.failed), content.excluded
    counts = VideoCounts(
        listed=ok + failed + excluded, ok=ok, pending=0, failed=reasons, excluded={"duplicate": excluded}
    )
    groups = outcome_counts(counts)
    return {
        "listed": groups["listed"],
        "ok": ok,
        "failed": failed,
        **{group: groups[group] for group in ("missing", "broken", "too_short", "excluded")},
        "fingerprint": content_fingerprint([(item.path, item.label, item.sha256) for item in content.ok]),
        "list_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def read_record(out: Path) -> dict[str, Any] | None:
    """The parsed dataset.json of a folder; None if there is none. Raises UserError if it cannot be read."""
    path = out / "dataset.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); prepare the data set again") from error
    return record if isinstance(record, dict) else None


def versions() -> dict[str, str]:
    """The versions of everything that decides the bytes of a prepared video."""
    codec = ".".join(str(number) for number in av.library_versions["libavcodec"])
    return {
        "video_swinv2": __version__,
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "av": av.__version__,
        "libavcodec": codec,
    }


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, synced to disk. Raises UserError naming the file."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def _csv_text(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
