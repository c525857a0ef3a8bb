"""Progress on lines of 80 columns and on bars, and times as people say them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from video_swinv2.progress import LINE_WIDTH, Progress, duration_text, fitting
from video_swinv2.training.record import run_title


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.0123, "0.0123 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (0.0441 * 3600, "2 min 39 s"),
        (3599.6, "1 h 0 min"),
        (11_100.0, "3 h 5 min"),
        (100 * 3600.0, "4 d 4 h"),
        (1e8, "1,157 d 9 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize("out", ["runs/ut/seed-0", "runs/a-rather-long-name-of-a-data-set/and-of-a-recipe"])
def test_a_line_has_the_run_per_cent_time_left_and_epoch_in_80_columns(
    out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("video_swinv2.progress.LINE_EVERY_SECONDS", -1.0)
    title = run_title(Path(out))
    with Progress(title, 246_534, unit="samples", shown=True, done=246_000) as progress:
        progress.advance(64, 0.0, "epoch 29.9 of 30, loss 10.1234")
        progress.advance(470)
    first, last = capsys.readouterr().err.splitlines()
    assert re.match(rf"{re.escape(title)}: 99 %, 1 s left, epoch 29.9 of 30, loss 10.1234", first)
    assert last.startswith(f"{title}: 100 %, ")
    assert "left" not in last
    assert max(len(first), len(last)) <= LINE_WIDTH
    assert out.endswith(title.removeprefix("..."))


def test_a_bar_fits_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    with Progress("kinetics400/tiny", 100, unit="samples", shown=True) as progress:
        progress.advance(40, 0.0, "epoch 0.4 of 1, loss 1.2345")
    shown = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", capsys.readouterr().err).replace("\r", "\n").splitlines()
    assert any("40 %" in line and "epoch 0.4 of 1, loss 1.2345" in line for line in shown), shown
    assert max(map(len, shown)) <= 80
    assert not any("\u2026" in line for line in shown), "nothing is cut off"


def test_what_does_not_fit_is_left_out_from_the_end() -> None:
    assert fitting(["40 %", "", "5 s left", "1 item/s"], 14) == "40 %, 5 s left"
    assert fitting(["40 %", "5 s left", "1"], 13) == "40 %"
    assert fitting(["40 %"], 1) == "40 %"
