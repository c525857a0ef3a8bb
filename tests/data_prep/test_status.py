"""The status of a preparation: all numbers add up, in the terminal, as JSON and on the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import main
from data_prep.outcomes import REASONS, VideoCounts
from data_prep.state import PlannedVideo, PreparationState
from data_prep.status import (
    as_text,
    counts_table,
    format_duration,
    open_states,
    progress_line,
    read_status,
    worst_classes,
)
from data_prep.status_page import class_yields, curve, histogram
from video_swinv2.errors import UserError

ATTACK = "<script>alert(1)</script>"
LABELS = ("plain", ATTACK, 'b "quoted" & it\'s')
REASON_OF = {0: None, 1: None, 2: "missing", 3: "empty", 4: "too_short", 5: None, 6: "pending"}


def fill(out: Path, count: int = 42, *, path: Path | None = None, step: int = 1, place: int = 0) -> None:
    """A state in which three in seven videos are lost, one in seven is pending, and the last one is excluded."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = [
        PlannedVideo("val" if n % 3 else "train", n, f"{n}.mp4", LABELS[n % 3], f"/raw/{n}.mp4", f"videos/{n}.mp4",
               excluded="duplicate" if n == count - 1 else "")
        for n in range(count)
    ][place::step]  # fmt: skip
    with PreparationState(out, create=True, path=path) as state:
        state.sync_with_plan(wanted)
        for row in list(state.rows("pending")):
            reason = REASON_OF[row["position"] % 7]
            if reason == "pending":
                continue
            measures = {
                "duration_seconds": 10.0 + row["id"] % 5,
                "source_size": 10**6 * (1 + row["id"]),
                "seconds": 2.0,
            }
            values = {"status": "ok"} | measures if reason is None else {"status": "failed", "reason": reason}
            state.record_outcome(row["id"], values)
            when = 1.7e9 + 10 * row["position"] + (5000 if row["position"] > 20 else 0)
            state._db.execute("UPDATE clips SET finished_at = ? WHERE id = ?", (when, row["id"]))


def run(*arguments: object) -> int:
    return main(["status", *map(str, arguments)])


def test_json_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    assert run(tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["splits"]) == ["train", "val"]
    for sums in (*found["splits"].values(), *found["classes"].values()):
        parts = ("ok", "missing", "broken", "too_short", "excluded", "pending")
        assert sums["listed"] == sum(sums[part] for part in parts)
    words = ("listed", "ok", "missing", "broken", "too_short", "excluded", "pending")
    whole = {word: sum(sums[word] for sums in found["splits"].values()) for word in words}
    assert whole == dict(zip(words, (42, 18, 6, 6, 6, 1, 5), strict=True))
    assert {word: sum(sums[word] for sums in found["classes"].values()) for word in words} == whole
    assert sum(sums["reasons"].get("duplicate", 0) for sums in found["splits"].values()) == 1
    assert set(found["classes"]) == set(LABELS)
    assert found["shards"] is None
    # The last is number 40. The five minutes before it contain those from 10 on; the pause leaves those from 21 on.
    assert found["clips_per_second"] == pytest.approx(17 / 190)
    assert found["seconds_left"] == pytest.approx(5 / (17 / 190))


def test_table_in_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    assert run(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["split", "listed", "ok", "missing", "broken", "too_short", "excluded", "pending"]
    assert lines[3].split() == ["all", "42", "18", "6", "6", "6", "1", "5"]
    assert any(line.startswith("empty") and line.endswith(REASONS["empty"]) for line in lines)
    assert any(line.startswith("duplicate") for line in lines)
    assert any(
        line.startswith("37 of 42 done (88.1%), 0.089 videos/s, about 56 s left, nothing finished") for line in lines
    )
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "nothing was prepared here" in capsys.readouterr().err


def test_table_of_nothing_and_of_one_split() -> None:
    assert counts_table({}) == "split"
    assert counts_table({"train": VideoCounts(2, 2, 0, {}, {})}).splitlines()[1].split() == ["train", *"2200000"]


def test_counts_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(UserError, match="but the state counts"):
        counts_table({"train": VideoCounts(3, 2, 0, {})})


def test_shards_are_summed_until_they_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "whole")
    (tmp_path / "out" / "shards").mkdir(parents=True)
    for place in range(2):
        fill(tmp_path / "out", path=tmp_path / "out" / "shards" / f"{place}-of-3.sqlite", step=3, place=place)
    with open_states(tmp_path / "out") as states:
        now = read_status(states)
    assert now.shards == (2, 3)
    assert "2 of 3 shards have begun" in as_text(now)
    fill(tmp_path / "out", path=tmp_path / "out" / "shards" / "2-of-3.sqlite", step=3, place=2)
    results = []
    for folder in ("whole", "out"):
        run(tmp_path / folder, "--json")
        results.append(json.loads(capsys.readouterr().out))
    assert results[1].pop("shards") == {"begun": 3, "of": 3}
    assert results[0].pop("shards") is None
    assert results[0] == results[1]
    fill(tmp_path / "out", 7)  # now there is a merged state, and those of the shards no longer count
    run(tmp_path / "out", "--json")
    assert json.loads(capsys.readouterr().out)["shards"] is None


def test_classes_that_lost_most_come_first() -> None:
    classes = {
        "none lost": VideoCounts(5, 5, 0, {}),
        "half": VideoCounts(5, 2, 1, {"empty": 1, "missing": 1}),
        "most": VideoCounts(3, 1, 0, {"too_short": 2}),
        "": VideoCounts(3, 1, 0, {"too_short": 2}),
        "unknown": VideoCounts(3, 0, 3, {}),
    }
    assert worst_classes(classes) == [("most", 2, 3), ("half", 2, 4)]
    rows = class_yields(classes)
    assert [row.label for row in rows] == ["most", "no label", "half", "none lost", "unknown"]
    assert [(row.ok, row.finished, row.share) for row in rows][-1] == (0, 0, None)


def test_durations() -> None:
    seconds = (40, 100, 3600 * 3 + 60 * 20, 3600 * 53, 59.9 * 60)
    assert [format_duration(number) for number in seconds] == ["40 s", "2 min", "3 h 20 min", "2 d 5 h", "1 h 0 min"]


def test_curve_cuts_out_pauses() -> None:
    moments = np.array([0.0, 1800.0, 1800.0 + 9 * 3600, 3600.0 + 9 * 3600])
    assert curve(moments[:1], np.ones(1, bool), 4) is None
    drawn = curve(np.array([0, 360, 720, 20_000, 20_360, 20_720.0]), np.array([1, 1, 0, 1, 1, 1], bool), 10)
    assert drawn is not None
    assert (drawn.times[-1].text, drawn.unit) == ("20", "min")
    for seconds, last in ((3 * 3600.0, ("3", "h")), (100.0, ("100", "s")), (1.0, ("1", "s"))):
        steps = curve(np.linspace(0, seconds, 60), np.ones(60, bool), 60)
        assert steps is not None
        assert (steps.times[-1].text, steps.unit) == last
    assert drawn.breaks == (50.0,)
    corners = [tuple(map(float, point.split(","))) for point in drawn.ok.split()]
    assert corners[0] == (0, 100)
    assert corners[-2] == (100, 50), "five of ten prepared"
    assert [float(point.split(",")[1]) for point in drawn.done.split()][-2] == 40, "six of ten done"
    heights = [height for _, height in corners[1:-1]]
    assert heights == sorted(heights, reverse=True)


def test_histogram_holds_every_video() -> None:
    values = np.concatenate([np.full(50, 10.0), np.linspace(1, 9, 49), [5000.0]])
    drawn = histogram("x", values, "s")
    assert drawn is not None
    assert sum(int(bar.text.rpartition(": ")[2]) for bar in drawn.bars) == 100
    assert max(bar.height for bar in drawn.bars) == 1
    assert "or more" in drawn.bars[-1].text
    assert "median 10 s, 1 to 5000 s, 100 videos" in drawn.summary
    assert histogram("x", values[:0], "s") is None
    assert histogram("x", np.zeros(3), "s") is not None


class Page(HTMLParser):
    """Tags with attributes, and text outside style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_page_is_self_contained_and_escapes_everything(tmp_path: Path) -> None:
    out = tmp_path / f"x {ATTACK.replace('/', '')}"
    fill(out)
    assert run(out, "--html", tmp_path / "page.html") == 0
    raw = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in raw
    assert "//" not in raw, "no address of any kind"
    page = Page(raw)
    assert ATTACK in page.texts
    assert any(attributes.get("title") == LABELS[2] for _, attributes in page.tags)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base", "img", "script")
        assert not set(attributes) & {"href", "src", "onload", "onclick"}
    text = " ".join(page.texts)
    for words in ("18", "of 42 listed", REASONS["too_short"], "duplicate", "18 videos", "Prepared videos by class"):
        assert words in text
    assert len([tag for tag, _ in page.tags if tag == "polygon"]) == 2
    assert len([tag for tag, _ in page.tags if tag == "line"]) == 1, "one stop"


def test_page_before_anything_is_finished(tmp_path: Path) -> None:
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan([PlannedVideo("train", 0, "a", "", "a", "videos/b")])
    assert run(tmp_path, "--html", tmp_path / "page.html") == 0
    text = " ".join(Page((tmp_path / "page.html").read_text()).texts)
    assert "Nothing to show yet" in text
    assert "No video has failed" in text
    with open_states(tmp_path) as states:
        assert progress_line(read_status(states)) == "0 of 1 done (0.0%)"


def test_page_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    assert run(tmp_path, "--html", tmp_path / "none" / "page.html") == 1
    assert "page.html: cannot be written" in capsys.readouterr().err
