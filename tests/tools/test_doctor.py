"""The doctor: a sound machine, and real faults, each with its fix. Processes and resources have files of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from video_swinv2.bench.sample_clip import frame_number, write_clip
from video_swinv2.cli import main
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.decoders import OTHER_DECODERS, why_missing
from video_swinv2.errors import UsageError
from video_swinv2.tools import doctor
from video_swinv2.tools.doctor import check_decoders, check_device, plan_run
from video_swinv2.tools.findings import Finding, findings_text


def test_every_frame_of_the_generated_clip_encodes_its_number(tmp_path: Path) -> None:
    count = write_clip(tmp_path / "clip.mp4", size=(64, 96), seconds=1)
    with VideoReader(tmp_path / "clip.mp4") as video:
        frames = video.frames(range(len(video)))
    assert len(frames) == count == 30
    seen = [frame_number(float(frame[:, 30:34, 44:52].float().mean()), count) for frame in frames]
    assert seen == pytest.approx(range(30), abs=0.4)


def test_decoders_are_tried_on_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.name: finding for finding in check_decoders()}
    assert list(found) == ["PyAV", "torchcodec", "decord"], "each is named, installed or not"
    assert found["PyAV"].found.startswith("frames are exact")
    for decoder in OTHER_DECODERS:
        reason = why_missing(decoder)
        assert found[decoder].state == ("note" if reason else "ok")
        assert found[decoder].found == (reason or doctor.USES[decoder])
    monkeypatch.setitem(sys.modules, "decord", None)
    missing = check_decoders()[-1]
    assert (missing.state, missing.found) == ("note", "not installed")
    assert missing.fix == "none needed: PyAV reads everything; else install decord"
    monkeypatch.setattr(doctor, "TEST_FRAMES", (0, 8, 16, 29))
    real = doctor._read
    # A decoder that returns other frames than requested: 0, 16, 29, 29.
    monkeypatch.setattr(doctor, "_read", lambda *what: [real(*what)[0], *real(*what)[2:], real(*what)[-1]])
    wrong = next(finding for finding in check_decoders() if finding.name == "PyAV")
    assert (wrong.state, wrong.fix) == ("fault", "pip install av")
    assert wrong.found == "returns wrong frames for 8, 16"


def test_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_VERSIONS", {"torch": (99, 0), "nosuchpackage": (1, 0)})
    old, absent = doctor.check_packages()
    assert (old.state, old.fix) == ("fault", "pip install 'torch>=99.0'")
    assert (absent.state, absent.found) == ("fault", "not installed")


def test_the_run_that_the_machine_is_sized_for(monkeypatch: pytest.MonkeyPatch) -> None:
    run = plan_run(None, None, "cpu")
    assert (run.processes, run.micro_batch, run.config.data.workers) == (1, 8, 8)
    assert "as no CONFIG is given" in str(run)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert plan_run(None, None, "cuda").processes == 8
    assert plan_run(None, 2, "cuda").processes == 2
    with pytest.raises(UsageError, match="--processes 0"):
        plan_run(None, 0, "cpu")


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    few, enough = (check_device("cuda", processes)[0] for processes in (8, 4))
    assert (few.state, enough.state) == ("fault", "ok")
    assert few.found.startswith("4 GPUs for 8 processes")
    assert "at most 4 processes" in few.fix
    assert not torch.cuda.is_initialized()


def test_the_verb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever a check raises is a fault with a fix, and any fault makes the exit code 1."""
    for name in ("check_packages", "check_decoders"):
        monkeypatch.setattr(doctor, name, lambda: [])
    groups = []
    monkeypatch.setattr(doctor, "run_group", lambda *arguments: groups.append(arguments) or [])
    monkeypatch.setattr(doctor, "check_device", lambda *_: 1 / 0)
    assert main(["doctor", "--folder", str(tmp_path)]) == 1
    # Two processes on a CPU, and one that compiles.
    assert [(kind, processes) for _, kind, processes in groups] == [("cpu", 2), ("cpu", 1)]
    text = capsys.readouterr().out
    assert "fault device" in text
    assert "division by zero" in text
    assert "fix: install the packages again" in text
    monkeypatch.setattr(doctor, "check_device", lambda *_: [Finding("GPUs", "ok", "there")])
    for state, code in (("ok", 0), ("note", 0), ("fault", 1)):
        for name in ("disk", "shared_memory", "open_files", "memory"):
            monkeypatch.setattr(doctor, f"check_{name}", lambda *_, name=name: Finding(name, "ok", "enough"))
        monkeypatch.setattr(doctor, "check_disk", lambda folder, state=state: Finding("disk", state, str(folder), "x"))
        assert main(["doctor", "--folder", str(tmp_path), "--json"]) == code
        found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
        assert found["disk"] == {"name": "disk", "state": state, "found": str(tmp_path), "fix": "x"}
        assert found["memory"]["state"] == "ok"


def test_a_configuration_decides_folder_and_sizes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("check_packages", "check_decoders"):
        monkeypatch.setattr(doctor, name, lambda: [])
    monkeypatch.setattr(doctor, "run_group", lambda *_: [])
    file = tmp_path / "run.yaml"
    file.write_text(
        f"out: {tmp_path}/run\ninit: scratch\nmodel: {{name: swinv2_nano}}\ndata: {{source: x, image_size: 32}}\n"
        "optim: {epochs: 1, lr: 1.e-3, batch: 8, micro_batch: 4}\n"
    )
    arguments = ["doctor", str(file), "data.workers=5", "--processes", "4", "--device", "cpu", "--json"]
    main(arguments)
    found = {finding["name"]: finding["found"] for finding in json.loads(capsys.readouterr().out)}
    assert str(tmp_path) in found["disk"]
    assert (
        "4 process(es) x 5 workers x 4 batches of 2 x 1 frames of 32 pixels (your configuration)"
        in found["shared memory"]
    )
    assert "with 5 workers" in found["memory"]
    assert main(["doctor", str(file), "data.wrokers=5"]) == 2
    assert "did you mean data.workers?" in capsys.readouterr().err


def test_words_for_people() -> None:
    text = findings_text([Finding("a", "ok", "there"), Finding("b", "note", "odd", "look")])
    assert text.splitlines()[-1] == "this machine is fit to train"
    assert "fix: look" in text
