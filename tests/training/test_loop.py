"""The loop on real clips: it learns, resumes exactly, names broken files and refuses wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import video_swinv2 as vs
from data_prep.jobs import TranscodeSettings
from data_prep.prepare import prepare
from tests.training.runs import write_recipe
from video_swinv2.cli import main
from video_swinv2.config import load_config
from video_swinv2.errors import UserError
from video_swinv2.training.loop import run
from video_swinv2.training.metrics import read_metrics
from video_swinv2.training.tasks.classification import Classification
from video_swinv2.training.tasks.simmim import Pretraining
from video_swinv2.weights.store import read_tensors


@pytest.fixture(scope="module")
def clips(tmp_path_factory, write_video):
    """A bar that moves down or up: 16 clips to train, 5 to validate (an odd number, so that shares are uneven)."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 5)):
        lines = []
        for i in range(count):
            frames = rng.integers(0, 60, (8, 32, 32, 3), dtype=np.uint8)
            for t in range(8):
                row = 3 * t if i % 2 else 24 - 3 * t
                frames[t, row : row + 6] = 230
            write_video(folder / split / f"{i}.mp4", frames)
            lines.append(f"{split}/{i}.mp4 {i % 2}")
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (folder / "classes.txt").write_text("up\ndown\n")
    return folder


@pytest.fixture
def recipe(clips, tmp_path):
    """A function that writes a small recipe, everything random switched on, with changes."""

    def write(**changes):
        values = {
            "out": str(tmp_path / "run"),
            "init": "scratch",
            "model": {"name": "swinv2_nano", "window": [4, 4, 4], "drop_path": 0.2},
            "data": {"source": str(clips), "frames": 4, "frame_stride": 2, "image_size": 32, "workers": 0},
            "augment": {"flip": 0, "crop_area": [0.6, 1.0], "mixup": 0.3},
            "optim": {"epochs": 3, "lr": 1e-3, "batch": 4, "micro_batch": 2, "clip_norm": 5, "layer_decay": 0.9},
            "engine": {"engine": "plain", "precision": "fp32", "device": "cpu"},
            "log_every": 1,
            "checkpoint_minutes": 0,
        }
        return write_recipe(tmp_path, values, changes)

    return write


def losses(folder):
    return [line["train/loss"] for line in read_metrics(folder) if "train/loss" in line]


def test_the_files_that_a_run_leaves_behind(recipe, tmp_path):
    folder = run(load_config(recipe()), Classification)
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "run.json", "metrics.jsonl", "checkpoints", "model.safetensors", "last.safetensors"} <= names
    assert any(name.startswith("events.out") for name in names)
    assert len(losses(folder)) == 12
    record = json.loads((folder / "run.json").read_text())
    assert (record["step"], record["steps"], record["batch"], record["accumulation"]) == (12, 12, 4, 2)
    assert record["precision"] == "fp32"
    measured = {line["step"]: line["val/top1"] for line in read_metrics(folder) if "val/top1" in line}
    assert sorted(measured) == [0, 4, 8, 12]
    assert record["best"] == max(top1 for step, top1 in measured.items() if step)
    card = vs.read_card(folder / "model.safetensors")
    assert card.classes == ("up", "down")
    assert card.preprocessing.frames == 4
    assert card.provenance["init"] == "scratch"
    assert vs.load_model(folder)(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 2)
    assert load_config(folder / "config.yaml") == load_config(tmp_path / "0.yaml")


def test_the_record_names_the_decoder_that_reads(recipe, clips, tmp_path):
    pytest.importorskip("decord")
    prepare(clips, tmp_path / "prepared", TranscodeSettings(short_side=32), workers=1, log=lambda text: None)
    for source, decoder, used in ((clips, "decord", "pyav"), (tmp_path / "prepared", "decord", "decord")):
        out = tmp_path / f"run {used}"
        data = {"source": str(source), "decoder": decoder}
        run(load_config(recipe(out=str(out), data=data, optim={"epochs": 1}, val_epochs=1)), Classification)
        assert json.loads((out / "run.json").read_text())["decoder"] == used


def test_a_killed_run_resumes_bit_for_bit(recipe, tmp_path):
    """Always in a fresh process: earlier tests in this one may have changed threads, and so how sums are rounded."""
    command = [sys.executable, "-m", "video_swinv2", "train"]
    subprocess.run([*command, str(recipe(out=str(tmp_path / "straight")))], check=True)
    command.append(str(recipe(out=str(tmp_path / "killed"))))
    checkpoints = tmp_path / "killed" / "checkpoints"
    for wanted in (2, 7):  # steps after which it is killed: inside the first and the second epoch
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not any(int(p.name[5:]) >= wanted for p in checkpoints.glob("step-??????")):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    expected, _ = read_tensors(tmp_path / "straight" / "last.safetensors")
    for name, tensor in read_tensors(tmp_path / "killed" / "last.safetensors")[0].items():
        assert torch.equal(tensor, expected[name]), name


def test_a_signal_stops_the_run_with_a_checkpoint_and_says_how_to_resume(recipe, tmp_path):
    config = recipe(optim={"epochs": 500}, checkpoint_minutes=60, val_epochs=1000)
    command = [sys.executable, "-m", "video_swinv2", "train", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=600)
    assert process.returncode == 75
    assert (tmp_path / "run" / "start-again").exists()
    last = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(last) == 1
    assert "by SIGTERM; the checkpoint is saved" in last[0]
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-??????"))) == 1


def test_two_deepspeed_processes_equal_one_plain_one(recipe, tmp_path):
    """Same global batch, ZeRO-1: the same losses to rounding (no drop path and mixing, which depend on the rank)."""
    same = {"model": {"drop_path": 0.0}, "augment": {"mixup": 0.0}}
    plain = run(load_config(recipe(out=str(tmp_path / "plain"), **same)), Classification)
    config = recipe(out=str(tmp_path / "two"), engine={"engine": "deepspeed", "zero_stage": 1}, **same)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "video_swinv2", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, str(config)], check=True, env=environment, timeout=600)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(plain), rtol=1e-4)
    for a, b in zip(read_metrics(tmp_path / "two"), read_metrics(plain), strict=True):
        if "val/top1" in a:
            assert a["val/top1"] == b["val/top1"]
            assert a["val/loss"] == pytest.approx(b["val/loss"], rel=1e-3)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2


def test_pretraining_then_inflation_then_clips(recipe, tmp_path):
    image = {"frames": None, "image_size": 32}
    mask = {"unit": 8, "normalise_target": 7}
    augment = {"mixup": 0.0}
    before = recipe(
        out=str(tmp_path / "image"), data=image, mask=mask, augment=augment, model={"window": 4, "drop_path": 0}
    )
    folder = run(load_config(before), Pretraining)
    assert all(np.isfinite(losses(folder)))
    config = load_config(
        recipe(out=str(tmp_path / "clip"), init=str(folder / "model.safetensors"), optim={"epochs": 1})
    )
    clip = run(config, Classification)
    card = vs.read_card(clip / "model.safetensors")
    assert card.provenance["init"].endswith("image/model.safetensors")
    assert [ancestor["task"] for ancestor in card.provenance["ancestors"]] == ["SimMIM on images"]
    assert card.architecture["cpb_norm"][0] == [2, 4, 4]


def test_it_learns(recipe):
    folder = run(
        load_config(recipe(optim={"epochs": 25, "lr": 2e-3}, augment={"mixup": 0}, val_epochs=25)), Classification
    )
    assert np.mean(losses(folder)[-10:]) < 0.2
    assert read_metrics(folder)[-1]["val/top1"] == 1.0


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"optim": {"batch": 8}}, r"\(batch 4 then, 8 now\)"),
        ({"model": {"window": [2, 4, 4]}}, r"\(window \[4, 4, 4\] then, \[2, 4, 4\] now\)"),
        ({"data": {"image_size": 64}}, r"\(image_size \[32, 32\] then, \[64, 64\] now\)"),
        ("classes", r"\(data_fingerprint \w+ then, \w+ now; classes_sha256 \w+ then, \w+ now\)"),
        ("labels", r"\(data_fingerprint \w+ then, \w+ now\)"),
    ],
)
def test_a_run_does_not_resume_with_other_data_or_another_model(recipe, clips, tmp_path, changes, found):
    data = shutil.copytree(clips, tmp_path / "data")
    source = {"source": str(data)}
    folder = run(load_config(recipe(data=source, optim={"epochs": 0.25})), Classification)
    if changes == "classes":
        (data / "classes.txt").write_text("down\nup\n")
    if changes == "labels":
        lines = (data / "train.txt").read_text().splitlines()
        (data / "train.txt").write_text("\n".join([lines[0][:-1] + "1", *lines[1:]]) + "\n")
    others = changes if isinstance(changes, dict) else {}
    config = recipe(
        **others | {"data": source | others.get("data", {}), "optim": {"epochs": 2} | others.get("optim", {})}
    )
    with pytest.raises(
        UserError, match=f"{folder}: its checkpoint was written with other data or another model {found}"
    ):
        run(load_config(config), Classification)


@pytest.mark.parametrize("planted", ["inputs", "weights"])
def test_non_finite_steps_stop_the_run(recipe, tmp_path, monkeypatch, planted):
    config = load_config(recipe())
    task = Classification(config)
    if planted == "inputs":
        monkeypatch.setattr("video_swinv2.training.tasks.base.IMAGENET_STD", (0.0, 0.0, 0.0))
    else:
        task.encoder.head.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite in 3 steps in a row"):
        run(config, lambda *_: task)


def test_too_many_broken_clips_stop_the_run(recipe, clips, tmp_path):
    copy = tmp_path / "copy"
    (copy / "train").mkdir(parents=True)
    for path in (clips / "train").iterdir():
        (copy / "train" / path.name).write_bytes(path.read_bytes() if path.stem != "3" else b"broken")
    for name in ("train.txt", "classes.txt"):
        (copy / name).write_text((clips / name).read_text())
    with pytest.raises(UserError, match=r"more than data\.max_broken=0\.01 allows"):
        run(load_config(recipe(data={"source": str(copy), "max_broken": 0.01})), Classification)
    folder = run(
        load_config(recipe(out=str(tmp_path / "b"), data={"source": str(copy), "max_broken": 0.1})), Classification
    )
    record = json.loads((folder / "run.json").read_text())
    assert len(record["broken_files"]) == 1
    assert json.loads((folder / "run.json").read_text())["best"] is None, "that copy has no validation split"
    assert "3.mp4" in record["broken_files"][0]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"optim": {"lrr": 1}}, 2, "did you mean optim.lr?"),
        ({"init": "absent.pth"}, 1, "absent.pth: no such checkpoint"),
        ({"data": {"source": "nowhere"}}, 1, "nowhere"),
        ({"model": {"name": "swinv2_smal"}}, 2, "did you mean 'swinv2_small'"),
        ({"model": {"window": [4, 4]}}, 2, "model: window"),
        ({"optim": {"batch": 0}}, 2, "optim.batch"),
        ({"init_time_noise": 1.0}, 2, "init_time_noise"),
        ({"model": {"attention": "flex"}}, 2, "flex trains on CUDA only"),
        ({"resume": "elsewhere"}, 1, "elsewhere: no checkpoint to resume from"),
    ],
)
def test_bad_input_is_one_line(recipe, capfd, changes, code, words):
    assert main(["train", str(recipe(**changes))]) == code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert words in lines[0]


def test_a_label_that_is_not_in_the_class_list_is_one_line(recipe, clips, tmp_path, capfd):
    (tmp_path / "train.csv").write_text(f"path,label\n{clips}/train/0.mp4,up\n{clips}/train/1.mp4,dwon\n")
    (tmp_path / "classes.txt").write_text("up\ndown\n")
    assert main(["train", str(recipe(data={"source": str(tmp_path)}))]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "'dwon'" in line
    assert "down" in line


def test_a_checkpoint_of_another_size_is_one_line(recipe, tmp_path, capfd):
    tiny = vs.create_model("swinv2_tiny", num_classes=2, image_size=32)
    preprocessing = vs.Preprocessing(None, 1, (32, 32))
    vs.save_model(tiny, tmp_path / "tiny.safetensors", classes=["up", "down"], preprocessing=preprocessing)
    assert main(["train", str(recipe(init=str(tmp_path / "tiny.safetensors")))]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "swinv2_tiny" in line
    assert not Path(tmp_path / "run" / "checkpoints").exists()
