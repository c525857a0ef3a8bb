"""The files that make a folder of videos a data set: dataset.json, a list a split, failed.csv; whole or not at all."""

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
    """A video of the data set: path relative to it, class name ('' for none), sha256 of the file."""

    path: str
    label: str
    sha256: str


@dataclass(frozen=True)
class FailedVideo:
    """A video that did not make it: its source, one word from the list of reasons, what the decoder said last."""

    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class SplitContent:
    """What became of the videos of one split; `excluded` is how many of those listed were not wanted after all."""

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
    """Write SPLIT.csv, failed.csv, extra.csv (the files of the source that nothing lists, if any), last dataset.json.

    Raises UserError where the folder cannot be written.
    """
    record: dict[str, Any] = {"name": name, "classes": list(classes), "classes_sha256": class_list_hash(classes)}
    counts = {split: _write_list(out / f"{split}.csv", content) for split, content in splits.items()}
    failed = [(item.path, item.reason, item.detail) for content in splits.values() for item in content.failed]
    write_text(out / "failed.csv", _table(("path", "reason", "detail"), failed))
    if extra:
        write_text(out / "extra.csv", _table(("path",), [(path,) for path in extra]))
    else:
        (out / "extra.csv").unlink(missing_ok=True)
    prints = "\n".join(f"{split} {count['fingerprint']}" for split, count in counts.items())
    record["fingerprint"] = hashlib.sha256(prints.encode()).hexdigest()
    record |= {"splits": counts, "extra": len(extra), "settings": dict(settings), "versions": versions()}
    write_json(out / "dataset.json", record)


def _write_list(path: Path, content: SplitContent) -> dict[str, Any]:
    """Write the list of a split; returns what dataset.json says of it."""
    text = _table(("path", "label"), [(item.path, item.label) for item in content.ok])
    write_text(path, text)
    reasons = dict(Counter(item.reason for item in content.failed))
    ok, failed, excluded = len(content.ok), len(content.failed), content.excluded
    counts = VideoCounts(
        listed=ok + failed + excluded, ok=ok, pending=0, failed=reasons, excluded={"duplicate": excluded}
    )
    ends = outcome_counts(counts)
    return {
        "listed": ends["listed"],
        "ok": ok,
        "failed": failed,
        **{end: ends[end] for end in ("missing", "broken", "too_short", "excluded")},
        "fingerprint": content_fingerprint([(item.path, item.label, item.sha256) for item in content.ok]),
        "list_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def read_record(out: Path) -> dict[str, Any] | None:
    """The parsed dataset.json of a folder, None where there is none. Raises UserError where it is not readable."""
    path = out / "dataset.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise UserError(f"{path}: not readable as JSON ({fault}); prepare the data set again") from fault
    return record if isinstance(record, dict) else None


def versions() -> dict[str, str]:
    """Everything that decides the bytes of a prepared video."""
    codec = ".".join(str(number) for number in av.library_versions["libavcodec"])
    return {
        "video_swinv2": __version__,
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "av": av.__version__,
        "libavcodec": codec,
    }


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step, synced to disk. Raises UserError naming the file."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
