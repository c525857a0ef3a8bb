"""Writing the files that make a folder of videos a data set: dataset.json, one list per split, and failed.csv.

    SPLIT.csv      path,label of every prepared video of a split, in order; path,label,group if groups are known
    failed.csv     path,reason,detail of every video that could not be prepared
    extra.csv      the videos of the source that no list names; absent if there are none
    dataset.json   the classes, counts, hashes, settings and versions

Each file is replaced atomically, so a reader never sees an incomplete one. dataset.json is written last, because it
records the hashes of the lists: a folder without it is not a data set yet, and if a run is killed between two files,
`verify` notices that a list does not match it.
"""

from __future__ import annotations

import csv
import hashlib
import io
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
from video_swinv2.escaping import for_csv
from video_swinv2.files import atomic_write, path_under, write_json


@dataclass(frozen=True)
class PreparedVideo:
    """A prepared video: its path relative to the data set, its class name, its sha256, and its group; '' for none."""

    path: str
    label: str
    sha256: str
    group: str = ""


@dataclass(frozen=True)
class FailedVideo:
    """A video that could not be prepared: its name in the source, the reason (a key of outcomes.REASONS), a detail."""

    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class SplitContent:
    """The videos of one split by outcome. `excluded` is the number of videos that are listed but not to be prepared."""

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
    """Write the lists of all `splits`, failed.csv, extra.csv and finally dataset.json to the folder `out`.

    `classes` are in label order. `settings` are stored in dataset.json unchanged. `extra` are the videos of the source
    that no list names. Raises UserError if the folder cannot be written.
    """
    record: dict[str, Any] = {"name": name, "classes": list(classes), "classes_sha256": class_list_hash(classes)}
    counts = {split: _write_list(path_under(out, f"{split}.csv"), content) for split, content in splits.items()}
    # Nothing reads these two lists back. Names in them are escaped for the people who open them.
    failed = [
        tuple(map(for_csv, (item.path, item.reason, item.detail)))
        for content in splits.values()
        for item in content.failed
    ]
    write_text(out / "failed.csv", csv_text(("path", "reason", "detail"), failed))
    if extra:
        write_text(out / "extra.csv", csv_text(("path",), [(for_csv(path),) for path in extra]))
    else:  # there may be one of an earlier run
        (out / "extra.csv").unlink(missing_ok=True)
    # The fingerprint depends on paths, labels and hashes only, not on settings or versions: the same videos have the
    # same fingerprint on every machine.
    fingerprints = "\n".join(f"{split} {count['fingerprint']}" for split, count in counts.items())
    record["fingerprint"] = hashlib.sha256(fingerprints.encode()).hexdigest()
    record |= {"splits": counts, "extra": len(extra), "settings": dict(settings), "versions": versions()}
    write_json(out / "dataset.json", record)


def _write_list(path: Path, content: SplitContent) -> dict[str, Any]:
    """Write the list of a split. Returns its entry in dataset.json."""
    # The text is built in memory, since its hash is needed as well.
    columns = 3 if any(item.group for item in content.ok) else 2
    rows = [(item.path, item.label, item.group)[:columns] for item in content.ok]
    text = csv_text(("path", "label", "group")[:columns], rows)
    write_text(path, text)
    reasons = dict(Counter(item.reason for item in content.failed))
    ok, failed, excluded = len(content.ok), len(content.failed), content.excluded
    # outcome_counts checks that the groups add up to the number listed. "duplicate" stands for all excluded videos,
    # since only their total is used.
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


def versions() -> dict[str, str]:
    """The versions of all software that influences the bytes of a prepared video."""
    # PyAV's wheels contain their own FFmpeg, so the version of libavcodec is not that of the system.
    codec = ".".join(str(number) for number in av.library_versions["libavcodec"])
    return {
        "video_swinv2": __version__,
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "av": av.__version__,
        "libavcodec": codec,
    }


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and sync it to disk. Raises UserError naming the file."""
    # newline="" writes the text unchanged, so that the hash of the text is also that of the file.
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def csv_text(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The text of a CSV file with `\\n` line ends, in place of the csv module's default `\\r\\n`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
