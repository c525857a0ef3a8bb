"""Outcomes: every listed video ends up in exactly one group, and the files of a data set record that."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from data_prep.dataset import FailedVideo, PreparedVideo, SplitContent, write_dataset
from data_prep.outcomes import REASONS, VideoCounts, outcome_counts
from video_swinv2.data.manifest import read_manifest
from video_swinv2.errors import UserError


def test_every_reason_is_counted_once() -> None:
    failed = {reason: place + 1 for place, reason in enumerate(REASONS)}
    total = sum(failed.values()) + 10 + 3 + 4
    ends = outcome_counts(VideoCounts(listed=total, ok=10, pending=3, failed=failed, excluded={"duplicate": 4}))
    assert ends == {
        "listed": total,
        "ok": 10,
        "missing": failed["missing"],
        "broken": sum(failed.values()) - failed["missing"] - failed["too_short"],
        "too_short": failed["too_short"],
        "excluded": 4,
        "pending": 3,
    }


def test_counts_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(UserError, match="5 videos are listed, but the state counts 3 ok, 0 missing, 1 broken"):
        outcome_counts(VideoCounts(listed=5, ok=3, pending=0, failed={"crashed": 1}, excluded={}))


def test_the_data_set_records_the_counts(tmp_path: Path) -> None:
    ok = [PreparedVideo("videos/a.mp4", "run", "1" * 64), PreparedVideo("videos/b.mp4", "walk", "2" * 64)]
    failed = [
        FailedVideo(f"{n}.mp4", reason, "") for n, reason in enumerate(("missing", "missing", "timeout", "too_short"))
    ]

    def write(extra: list[str], train: list[PreparedVideo]) -> dict[str, object]:
        splits = {"train": SplitContent(train), "test": SplitContent(ok, failed, excluded=3)}
        write_dataset(tmp_path, name="x", classes=["run", "walk"], splits=splits, settings={}, extra=extra)
        return dict(json.loads((tmp_path / "dataset.json").read_text()))

    record = write(['say "a", b.mp4', "c.mp4"], ok[:1])
    test = record["splits"]["test"]  # type: ignore[index]  # JSON
    numbers = {key: value for key, value in test.items() if isinstance(value, int)}
    assert numbers == {"listed": 9, "ok": 2, "failed": 4, "missing": 2, "broken": 1, "too_short": 1, "excluded": 3}
    assert record["extra"] == 2
    with (tmp_path / "extra.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["path"], ['say "a", b.mp4'], ["c.mp4"]]
    manifest = read_manifest(tmp_path, "test")
    assert (manifest.failed_in_preparation, manifest.fingerprint) == (4, test["fingerprint"])
    assert [entry.label for entry in manifest.entries] == [0, 1]
    # The fingerprint depends only on the videos that are there and their order, not on what was lost or listed besides.
    again = write([], ok)
    assert not (tmp_path / "extra.csv").exists()
    assert again["extra"] == 0
    assert again["splits"]["test"]["fingerprint"] == test["fingerprint"]  # type: ignore[index]  # JSON
    ok.reverse()
    assert write([], ok)["splits"]["test"]["fingerprint"] != test["fingerprint"]  # type: ignore[index]  # JSON
