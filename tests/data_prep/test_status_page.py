"""What the status page shows of a real data set: thumbnails, frame rates, picture sizes, settings, fingerprints."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main
from data_prep.state import PlannedVideo, PreparationState
from data_prep.status_page import common_values, read_fingerprints, setting_rows
from data_prep.thumbnails import MAX_SIZE, MAX_THUMBNAILS, draw_thumbnail, make_thumbnails

ATTACK = "<b>bold"
COLOURS = {"red": (200, 30, 30), ATTACK: (30, 30, 200)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Two videos in the colour of their class except for a black first frame, and one that is empty."""
    root = tmp_path_factory.mktemp("status")
    for name, fps, label, width in (("a", 25, "red", 64), ("b", 10, ATTACK, 48)):
        frames = np.full((10, 32, width, 3), COLOURS[label], dtype=np.uint8)
        frames[0] = 0
        write_video(root / "raw" / label / f"{name}.mp4", frames, fps=fps)
    (root / "raw" / "red" / "empty.mp4").touch()
    options = ["--workers", "1", "--short-side", "32", "--max-fail-rate", "1"]
    assert main(["prepare", str(root / "raw"), str(root / "out"), *options]) == 0
    return root / "out"


def page_of(out: Path, path: Path) -> str:
    assert main(["status", str(out), "--html", str(path)]) == 0
    return path.read_text(encoding="utf-8")


def uris(page: str) -> list[str]:
    return re.findall(r'<img src="([^"]*)"', page)


def test_a_page_shows_how_a_data_set_was_prepared(prepared: Path, tmp_path: Path) -> None:
    page = page_of(prepared, tmp_path / "page.html")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    for words in ("10 1 25 1", "48 x 32 1 64 x 32 1", "short side at most 32 px", "frame rate as in the source"):
        assert words in text
    record = json.loads((prepared / "dataset.json").read_text())
    assert f"data set {record['fingerprint']}" in text
    assert f"train {record['splits']['train']['fingerprint']}" in text
    assert ATTACK not in page
    assert "&lt;b&gt;bold" in page
    # The middle frame of each class, in the order of their names, not the first one.
    assert [describe(uri) for uri in uris(page)] == [((48, 32), "blue"), ((64, 32), "red")]


def describe(uri: str) -> tuple[tuple[int, int], str]:
    """The size (width, height) of a thumbnail and the colour that it has most of."""
    assert uri.startswith("data:image/jpeg;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    means = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(axis=0)
    assert means.max() > 120, "not the black frame"
    return image.size, ("red", "green", "blue")[int(means.argmax())]


def test_a_page_is_written_although_files_are_damaged_missing_or_pipes(
    prepared: Path, tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    """A damaged video and a pipe, to which nobody writes, have no thumbnail; a broken dataset.json is told of."""
    (tmp_path / "out" / "videos").mkdir(parents=True)
    target = write_video(tmp_path / "out" / "videos" / "ok.mp4", np.full((9, 32, 32, 3), 200, dtype=np.uint8))
    (tmp_path / "out" / "videos" / "cut.mp4").write_bytes(target.read_bytes()[:300])
    names = ("ok", "cut", "gone", "pipe")

    os.mkfifo(tmp_path / "out" / "videos" / "pipe.mp4")
    with PreparationState(tmp_path / "out", create=True) as state:
        state.sync_with_plan([PlannedVideo("train", n, s, s, s, f"videos/{s}.mp4") for n, s in enumerate(names)])
        for row in list(state.rows("pending")):
            state.record_outcome(row["id"], {"status": "ok"})
    (tmp_path / "out" / "dataset.json").write_text('{"fingerprint": 3}')
    page = page_of(tmp_path / "out", tmp_path / "page.html")
    assert len(uris(page)) == 1
    assert page.count("cannot be read here") == 3
    assert "fingerprint: input should be a valid string" in page


def test_an_unfinished_preparation_has_no_fingerprint_yet(tmp_path: Path) -> None:
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan([PlannedVideo("train", 0, "a", "a", "a", "videos/a.mp4")])
    page = page_of(tmp_path, tmp_path / "page.html")
    assert "None yet: the lists are written when all videos are done." in page
    assert "No run has begun its work yet." in page
    (tmp_path / "dataset.json").write_text('{"fingerprint": "abc"}')
    assert "of the lists as last written; some videos are pending" in page_of(tmp_path, tmp_path / "page.html")


def test_thumbnails_are_few_and_small_however_many_videos(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    """Of 60 classes with 50 videos each, only as many files are chosen as are shown, from the index alone."""
    labels = [f"class {n:02d}" for n in range(60)]
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan(
            PlannedVideo("train", n, f"{n}", labels[n % 60], f"{n}", f"videos/{n}.mp4") for n in range(3000)
        )
        state._db.execute("UPDATE clips SET status = 'ok'")
        made = make_thumbnails(tmp_path, [state], ["train"], labels)
        assert len({thumbnail.label for thumbnail in made}) == len(made) == MAX_THUMBNAILS
        assert [thumbnail.label for thumbnail in made[:2]] == ["class 01", "class 03"], "evenly spaced"
        (one,) = state.sample_class(["val", "train"], "class 07", 1)
        assert one["position"] == 7 + 60 * 25
        assert [row["position"] for row in state.sample_class(["train"], "class 07", 2)] == [7 + 60 * 12, 7 + 60 * 37]
        assert len(make_thumbnails(tmp_path, [state], ["train"], labels[:2])) == 12, "several of few classes"
        query = "EXPLAIN QUERY PLAN SELECT id FROM clips WHERE split = ? AND label = ? AND status = 'ok'"
        (plan,) = state._db.execute(query, ("train", "class 07")).fetchall()
        assert "SEARCH clips USING COVERING INDEX clips_account (split=? AND label=? AND status=?)" in plan["detail"]
    noise = np.random.default_rng(0).integers(0, 256, (3, 480, 640, 3), dtype=np.uint8)
    jpeg = draw_thumbnail(write_video(tmp_path / "noise.mp4", noise), lambda seconds: None)
    assert Image.open(io.BytesIO(jpeg)).size == MAX_SIZE
    assert len(jpeg) < 16_000


def test_rare_values_are_counted_together() -> None:
    values = [f"v{n}" for n in range(12) for _ in range(20 - n)]
    rows = common_values(values, "other sizes")
    assert rows[0] == ("v0", 20, 20 / 42)
    assert rows[-1] == ("4 other sizes", 12 + 11 + 10 + 9, 42 / 42)
    assert len(rows) == 9
    assert rows[1] == ("v1", 19, 19 / 42)
    assert common_values([], "") == []


def test_settings_have_words_and_units() -> None:
    rows = setting_rows({"preset": "fast", "fps": 30.0, "copy": True, "short_side": 320, "later": 1, "crf": "x" * 1000})
    assert rows[:3] == [
        ("short side at most", "320 px"),
        ("frame rate", "30 frames/s"),
        ("copies sources of the prepared form", "yes"),
    ]
    assert [value for _, value in rows[3:]] == ["x" * 100, "fast"]


def test_no_record_has_no_fingerprints(tmp_path: Path) -> None:
    assert read_fingerprints(tmp_path) == ({}, "")


PROBE = """
<script>
addEventListener("load", () => {
  const line = document.createElement("p");
  const boxes = [document.documentElement, ...document.querySelectorAll(".overflow, section")];
  const hidden = Math.max(...boxes.map((box) => box.scrollWidth - box.clientWidth));
  const shown = [...document.images].filter((image) => image.naturalWidth > 0);
  line.textContent = `hidden ${hidden}, shown ${shown.length}`;
  document.body.append(line);
});
</script>
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.parametrize("window", ["1200,900", "500,900"])
def test_a_browser_shows_everything_and_reports_no_errors(prepared: Path, window: str, tmp_path: Path) -> None:
    """500 px is the narrowest window that Chromium opens; it gets the layout of a phone."""

    def browse(path: Path) -> subprocess.CompletedProcess[str]:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={window}", f"file://{path}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)

    page = page_of(prepared, tmp_path / "page.html")
    done = browse(tmp_path / "page.html")
    # A thumbnail that the policy of the page does not allow would be reported here.
    assert ":CONSOLE" not in done.stderr, done.stderr
    assert "Prepared videos by class" in done.stdout
    (tmp_path / "probe.html").write_text(re.sub(r"<meta http-equiv[^>]*>", "", page) + PROBE)
    assert "<p>hidden 0, shown 2</p>" in browse(tmp_path / "probe.html").stdout
