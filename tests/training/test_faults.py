"""Faults provoked for real: killed and failing processes, a full disk, NaN, exhausted memory.

Those of loader workers and decoders are in tests/data/test_loading.py, of checkpoints in
tests/engine/test_checkpoint.py.
"""

import json
import os
import resource
import signal
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from tests.training.runs import small_disk, write_noise_clips, write_recipe
from video_swinv2.config import load_config
from video_swinv2.engine.checkpoint import Checkpoints
from video_swinv2.errors import UserError
from video_swinv2.training.loop import StoppedError, run
from video_swinv2.training.metrics import read_metrics
from video_swinv2.training.tasks.classification import Classification

SECONDS = 600  # after which a test gives up waiting for the end of a process


@pytest.fixture(scope="module")
def clips(tmp_path_factory, write_video):
    labels = [number % 2 for number in range(8)]
    return write_noise_clips(tmp_path_factory.mktemp("clips"), write_video, labels, ("even", "odd"))


@pytest.fixture
def recipe(clips, tmp_path):
    """A function that writes a small recipe with changes."""

    def write(**changes):
        values = {
            "out": str(tmp_path / "run"),
            "init": "scratch",
            "model": {"name": "swinv2_nano", "window": [2, 4, 4]},
            "data": {"source": str(clips), "frames": 2, "image_size": 32, "workers": 0},
            "optim": {"epochs": 2, "lr": 1e-3, "batch": 4, "micro_batch": 2},
            "engine": {"engine": "plain", "precision": "fp32", "device": "cpu"},
            "log_every": 1,
            "checkpoint_minutes": 0,
            "keep_checkpoints": 2,
        }
        return write_recipe(tmp_path, values, changes)

    return write


@contextmanager
def small_files(folder):
    """A quota on the size of each file; yields a function that lifts it."""
    folder.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def raise_quota():
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        yield raise_quota
    finally:
        raise_quota()


@pytest.mark.parametrize("limit", [small_disk, small_files])
def test_a_full_disk_is_one_line_and_with_room_the_run_resumes(recipe, tmp_path, limit):
    with limit(tmp_path / "disk") as make_room:
        config = load_config(recipe(out=str(tmp_path / "disk" / "run")))
        with pytest.raises(UserError, match=r"disk/run.*(free space|another folder)") as caught:
            run(config, Classification)
        assert "\n" not in str(caught.value)
        make_room()
        folder = run(config, Classification)
        record = json.loads((folder / "run.json").read_text())
        assert record["step"] == record["steps"] == 4


def test_broken_clips_are_counted_and_named_across_a_resumption(recipe, clips, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in clips.iterdir():
        (copy / path.name).write_bytes(b"broken" if path.name == "3.mp4" else path.read_bytes())
    changes = {"data": {"source": str(copy), "max_broken": 0.5, "val_split": "none"}}
    for epochs in (1, 2):
        config = load_config(recipe(optim={"epochs": epochs}, **changes))
        folder = run(config, Classification, accept_changes=True)
    counted = [line["train/broken_samples"] for line in read_metrics(folder) if "train/broken_samples" in line]
    assert (counted[1], counted[-1]) == (1, 2)
    assert capsys.readouterr().out.count("broken: ") == 1, "reported once, not again after resuming"
    assert len(json.loads((folder / "run.json").read_text())["broken_files"]) == 1


class Poisoned(Classification):
    """One clip makes the loss NaN, as a broken normalisation or an overflow would."""

    number = 5

    def loss(self, forward, batch):
        loss = super().loss(forward, batch)
        return loss * torch.nan if self.number in batch.numbers else loss


def test_a_non_finite_step_is_skipped_counted_and_its_inputs_are_listed(recipe, capsys):
    folder = run(load_config(recipe()), Poisoned)
    record = json.loads((folder / "run.json").read_text())
    assert (record["step"], record["skipped_steps"]) == (4, 2)  # once an epoch
    lines = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        guilty = [piece for piece in line["micro_batches"] if piece["loss"] == "nan"]
        assert len(guilty) == 1
        assert any(name.endswith("/5.mp4") for name in guilty[0]["files"])
        assert len(guilty[0]["files"]) == 2
    step, portable, _ = Checkpoints(folder / "checkpoints").newest()
    assert (step, portable.optimizer_step) == (4, 2)
    assert all(tensor.isfinite().all() for tensor in portable.weights.values())
    assert "skipped steps 2, see skipped.jsonl" in capsys.readouterr().out


class Joined(Classification):
    """Fails if there is no process group in the middle of a run."""

    def loss(self, forward, batch):
        assert torch.distributed.is_initialized()
        return super().loss(forward, batch)


class Stopped(Joined):
    """Receives SIGTERM in the middle of its first step."""

    def loss(self, forward, batch):
        signal.raise_signal(signal.SIGTERM)
        return super().loss(forward, batch)


class Unforeseen(Joined):
    """Raises an error that the code does not expect."""

    def loss(self, forward, batch):
        super().loss(forward, batch)
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("task", "changes", "error"),
    [
        (Joined, {}, None),
        (Stopped, {}, StoppedError),
        (Unforeseen, {}, ZeroDivisionError),
        (Joined, {"data": {"source": "nowhere"}}, UserError),
    ],
)
def test_no_way_out_of_a_run_in_one_process_leaves_its_group_behind(recipe, task, changes, error):
    """With DeepSpeed, gloo's threads abort about every second process that exits with its group still open.

    Several processes destroy their group after success only: see test_no_way_to_hang.py.
    """
    config = load_config(recipe(optim={"epochs": 1}, **changes))
    with pytest.raises(error) if error else nullcontext():
        run(config, task)
    assert not torch.distributed.is_initialized()


def test_exhausted_memory_names_the_setting_to_change(recipe):
    config = load_config(recipe(data={"image_size": 448}, optim={"batch": 8, "micro_batch": 8, "epochs": 1}))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    task = Classification(config)
    resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, hard))
    try:
        with pytest.raises(
            UserError, match=r"out of memory on process 0 .* lower optim\.micro_batch from 8 to 4; the batch"
        ):
            run(config, lambda *_: task)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
