"""The doctor: a sound machine, and real faults, each with its fix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from video_swinv2.bench.sample_clip import frame_number, write_clip
from video_swinv2.cli import main
from video_swinv2.data.decode import VideoReader
from video_swinv2.tools import doctor
from video_swinv2.tools.doctor import Finding, check_decoders, check_disk, check_shared_memory, findings_text

BROKEN_IMPORT = "raise ImportError('libsomething.so.3: cannot open shared object file')\n"


def run(script: str, *, limit: int | None = None, shadow: Path | None = None) -> Finding:
    """The finding of a check in a fresh process that may open `limit` files and imports from `shadow` first."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if shadow:
        environment["PYTHONPATH"] = str(shadow)
    code = "import json, dataclasses\nfrom video_swinv2.tools.doctor import *\n"
    code += f"found = {script}\nprint(json.dumps([dataclasses.asdict(f) for f in found]))\n"
    command = f"ulimit -S -n {limit}; exec " if limit else "exec "
    done = subprocess.run(
        ["bash", "-c", command + '"$0" -c "$1"', sys.executable, code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return next(Finding(**values) for values in json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_every_frame_of_the_generated_clip_encodes_its_number(tmp_path: Path) -> None:
    count = write_clip(tmp_path / "clip.mp4", size=(64, 96), seconds=1)
    with VideoReader(tmp_path / "clip.mp4") as video:
        frames = video.frames(range(len(video)))
    assert len(frames) == count == 30
    seen = [frame_number(float(frame[:, 30:34, 44:52].float().mean()), count) for frame in frames]
    assert seen == pytest.approx(range(30), abs=0.4)


def test_decoders_are_tried_on_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.name: finding for finding in check_decoders()}
    assert found["PyAV"] == Finding("PyAV", "ok", "frames are exact")
    assert found["decord"].state in ("ok", "note")
    monkeypatch.setattr(doctor, "TEST_FRAMES", (0, 8, 16, 29))
    real = doctor._read_av
    # A decoder that returns other frames than requested: 0, 16, 29, 29.
    monkeypatch.setattr(doctor, "_read_av", lambda path: [real(path)[0], *real(path)[2:], real(path)[-1]])
    wrong = next(finding for finding in check_decoders() if finding.name == "PyAV")
    assert (wrong.state, wrong.fix) == ("fault", "pip install av")
    assert wrong.found == "returns wrong frames for 8, 16"


def test_a_full_disk(small_disk: Path) -> None:
    found = check_disk(small_disk / "runs")
    assert found.state == "fault"
    assert f"MB free in {small_disk}" in found.found
    assert "choose another folder" in found.fix


def test_a_disk_that_cannot_be_written() -> None:
    found = check_disk(Path("/proc/runs"))
    assert found.state == "fault"
    assert "/proc is not writable" in found.found


def test_little_shared_memory(small_disk: Path) -> None:
    found = check_shared_memory(small_disk)
    assert found.state == "fault"
    assert "--shm-size" in found.fix
    assert check_shared_memory(small_disk / "absent").state == "note"


def test_few_open_files() -> None:
    found = run("[check_open_files()]", limit=256)
    assert (found.state, found.found) == ("fault", "at most 256")
    assert found.fix.startswith("ulimit -n ")


def test_a_broken_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "deepspeed.py").write_text(BROKEN_IMPORT)
    found = run("check_deepspeed()", shadow=tmp_path)
    assert (found.name, found.state) == ("DeepSpeed", "fault")
    assert "libsomething.so.3" in found.found
    assert "engine.engine=plain" in found.fix


def test_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_VERSIONS", {"torch": (99, 0), "nosuchpackage": (1, 0)})
    old, absent = doctor.check_packages()
    assert (old.state, old.fix) == ("fault", "pip install 'torch>=99.0'")
    assert (absent.state, absent.found) == ("fault", "not installed")


def test_the_verb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever a check raises is a fault with a fix, and any fault makes the exit code 1."""
    slow = ("check_packages", "check_device", "check_processes", "check_deepspeed", "check_decoders")
    for name in slow:
        monkeypatch.setattr(doctor, name, lambda: [])
    monkeypatch.setattr(doctor, "check_bf16", lambda: 1 / 0)
    assert main(["doctor", "--folder", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "fault bf16" in text
    assert "division by zero" in text
    assert "fix: install the packages again" in text
    monkeypatch.setattr(doctor, "check_bf16", lambda: [Finding("bf16", "ok", "there")])
    for state, code in (("ok", 0), ("note", 0), ("fault", 1)):
        for name in ("disk", "shared_memory", "open_files", "memory"):
            monkeypatch.setattr(doctor, f"check_{name}", lambda *_, name=name: Finding(name, "ok", "enough"))
        monkeypatch.setattr(doctor, "check_disk", lambda folder, state=state: Finding("disk", state, str(folder), "x"))
        assert main(["doctor", "--folder", str(tmp_path), "--json"]) == code
        found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
        assert found["disk"] == {"name": "disk", "state": state, "found": str(tmp_path), "fix": "x"}
        assert found["memory"]["state"] == "ok"


def test_words_for_people() -> None:
    text = findings_text([Finding("a", "ok", "there"), Finding("b", "note", "odd", "look")])
    assert text.splitlines()[-1] == "this machine is fit to train"
    assert "fix: look" in text


@pytest.mark.slow
def test_this_machine_is_sound(tmp_path: Path) -> None:
    """Two processes meet, DeepSpeed takes a step."""
    assert [finding.state for finding in doctor.check_processes()] == ["ok"]
    assert run("check_deepspeed()").state == "ok"
