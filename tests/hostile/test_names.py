"""What a name can do: nothing to the terminal, to a spreadsheet, or to a page of Markdown."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

import video_swinv2 as vs
from data_prep.cli import main as data_prep_main
from video_swinv2.cli import main
from video_swinv2.errors import UserError, error_line
from video_swinv2.escaping import for_csv, for_markdown, for_terminal
from video_swinv2.progress import Progress

RETITLE = "\x1b]0;owned\x07"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (RETITLE, r"\x1b]0;owned\x07"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x9b31m\x7f\x85", r"\x9b31m\x7f\x85"),
        ("gpj\u202efdp.exe\u2066", r"gpj\u202efdp.exe\u2066"),
        ("a\u2028b", r"a\u2028b"),
        (b"caf\xe9".decode(errors="surrogateescape"), r"caf\udce9"),
        ("Größe 山 👩‍🚀 שלום", "Größe 山 👩‍🚀 שלום"),
        (r"C:\new", r"C:\new"),
        (3, "3"),
    ],
)
def test_for_terminal(name, shown):
    assert for_terminal(name) == shown
    assert for_terminal(shown) == shown, "escaping twice changes nothing more"


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1+cmd", "'+1+cmd"),
        ("-x.mp4", "'-x.mp4"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\uff1d1", "'\uff1d1"),
        ("\t=1", r"\t=1"),
        ("\r=1", r"\r=1"),
        (RETITLE, r"\x1b]0;owned\x07"),
        ("a=b", "a=b"),
        ("-", "-"),
        ("", ""),
    ],
)
def test_for_csv(name, cell):
    assert for_csv(name) == cell


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a | b", r"a \| b"),
        ("<script>", r"\<script\>"),
        ("`x` *y* _z_ $w$", r"\`x\` \*y\* \_z\_ \$w\$"),
        ("[a](b)", r"\[a\](b)"),
        ("a\n\n# b", r"a \# b"),
        ("see http://a.b and www.c.d or e@f.g", r"see http\://a.b and www\.c.d or e\@f.g"),
        (RETITLE, r"\\x1b\]0;owned\\x07"),
        ("10:30, videoswin-4x3", "10:30, videoswin-4x3"),
    ],
)
def test_for_markdown(name, text):
    assert for_markdown(name) == text


EVIL = f"=cmd|{RETITLE}\n<script>`[a](b)"
BROKEN = f"{EVIL}/{EVIL}-broken.mp4"


def is_plain(text: str) -> bool:
    """Whether a text has no control characters but the line breaks at the ends of its lines."""
    return text.replace("\n", "") == for_terminal(text.replace("\n", ""))


def check_cells(text: str) -> list[list[str]]:
    """The rows of a CSV, in which no cell is a formula or has a control character."""
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert len({len(row) for row in rows}) == 1
    assert all(cell == for_terminal(cell) and not cell.startswith(("=", "@")) for row in rows for cell in row)
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small clip model, one class of which has the hostile name."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    network = vs.create_model("swinv2_nano", num_classes=2, frames=2, image_size=32, window=(2, 4, 4))
    preprocessing = vs.Preprocessing(frames=2, frame_stride=1, image_size=(32, 32))
    vs.save_model(network, path, classes=(EVIL, "plain"), preprocessing=preprocessing)
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> tuple[Path, str]:
    """A data set prepared from hostile names, one file of which is broken, and what the preparation has printed."""
    folder = tmp_path_factory.mktemp("data")
    frames = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    for name in (f"{EVIL}/{EVIL}.mp4", "plain/a.mp4"):
        write_video(folder / "raw" / name, frames)
    (folder / "raw" / BROKEN).write_bytes(b"no video")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        arguments = ["prepare", str(folder / "raw"), str(folder / "out"), "--workers", "1", "--max-fail-rate", "1"]
        assert data_prep_main(arguments) == 0
    return folder / "out", out.getvalue() + err.getvalue()


def test_preparation(prepared: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    out, printed = prepared
    assert is_plain(printed)
    rows = check_cells((out / "failed.csv").read_bytes().decode())
    assert rows[1][0] == for_csv(BROKEN)
    # The lists are read back, so they have the names as they are.
    listed = list(csv.reader(io.StringIO((out / "train.csv").read_bytes().decode(), newline="")))
    assert sorted(row[1] for row in listed) == [EVIL, "label", "plain"]

    assert data_prep_main(["status", str(out)]) == 0
    text = capsys.readouterr().out
    assert is_plain(text)
    assert for_terminal(EVIL) in text


def test_verification(prepared: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(prepared[0], tmp_path / "out")
    for path in out.rglob("*.mp4"):
        path.write_bytes(b"no video")
    (out / "videos" / f"{EVIL}.mp4").write_bytes(b"on no list")
    assert data_prep_main(["verify", str(out), "--workers", "1"]) == 1
    said = capsys.readouterr()
    assert is_plain(said.out + said.err)
    assert for_terminal(EVIL) in said.out
    assert any("cmd|" in row[0] for row in check_cells((out / "verify.csv").read_bytes().decode()))


def test_prediction(model: Path, prepared: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    videos = sorted(map(str, prepared[0].rglob("*.mp4")))
    for form in ([], ["--csv"], ["--every", "0.1"], ["--every", "0.1", "--csv"], ["--json"]):
        arguments = ["predict", str(model), *videos, f"{EVIL}.mp4", *form, "--protocol", "center-1x1"]
        assert main(arguments) == 1, "the last file does not exist"
        said = capsys.readouterr()
        assert is_plain(said.out + said.err), form
        if form == ["--json"]:
            answers = [answer["name"] for entry in json.loads(said.out) for answer in entry["answers"]]
            assert EVIL in answers, "JSON has exact values"
        elif "--csv" in form:
            rows = check_cells(said.out)
            assert {row[4] for row in rows} == {"class", for_csv(EVIL), "plain", ""}
            assert rows[-1][0] == for_csv(f"{EVIL}.mp4")
        else:
            assert for_terminal(f"{EVIL}.mp4: ") in said.out


def test_testing(model: Path, prepared: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shutil.copytree(prepared[0], tmp_path / "data")
    next(data.rglob("*.mp4")).write_bytes(b"no video")
    out = tmp_path / for_terminal(EVIL)
    arguments = ["test", str(model), str(data), "--split", "train", "--protocol", "center-1x1", "--out", str(out)]
    assert main([*arguments, "data.workers=0"]) == 0
    said = capsys.readouterr()
    assert is_plain(said.out + said.err)

    report = (out / "report.md").read_text(encoding="utf-8")
    assert is_plain(report)
    assert for_markdown(EVIL) in report
    assert not re.search(r"(?<!\\)[<`\[]", report), "all markup is escaped"
    tables = [part.splitlines() for part in report.split("\n\n") if part.startswith("|")]
    assert len(tables) >= 4
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, "a name adds no column"
        assert all(line.startswith("| ") for line in lines), "a name adds no row"


def test_an_error_is_one_line_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", EVIL]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {for_terminal(EVIL)}")
    assert is_plain(said)
    assert said.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["report", f"--{EVIL}", "x"])
    assert is_plain(capsys.readouterr().err)


class Broken(Dataset[int]):
    """A data set whose samples cannot be read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> int:
        raise UserError(f"{EVIL}: cannot be read")


def test_an_error_of_a_loader_worker_is_the_same_line() -> None:
    lines = []
    for workers in (0, 1):
        with pytest.raises(UserError) as caught:
            next(iter(DataLoader(Broken(), num_workers=workers)))
        lines.append(error_line(caught.value))
    assert lines == [for_terminal(f"{EVIL}: cannot be read")] * 2


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with Progress(EVIL, 1, unit="files", shown=True) as progress:
        progress.advance(1)
    said = capsys.readouterr().err
    assert said.startswith(for_terminal(EVIL))
    assert said.count("\n") == 1

    # The bar of a terminal.
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    with Progress(f"{EVIL}[red]", 1, unit="files", shown=True) as progress:
        progress.advance(1, note="[/nothing]")
    said = capsys.readouterr().err
    assert for_terminal(f"{EVIL}[red]") in said
    assert "[/nothing]" in said
    assert RETITLE not in said
