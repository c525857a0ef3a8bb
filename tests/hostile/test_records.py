"""JSON that is damaged or hostile is one line that names the file and the key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import Field
from safetensors.torch import save_file

import video_swinv2 as vs
from tests.hostile.tampering import assert_no_faults
from tests.training.runs import small_config
from video_swinv2.distributed.world import alone
from video_swinv2.engine.checkpoint import Checkpoints, TrainingState
from video_swinv2.errors import UserError
from video_swinv2.escaping import for_terminal
from video_swinv2.records import Record, read_bytes, read_json, read_record
from video_swinv2.training.faults import Faults
from video_swinv2.training.metrics import MetricLog, read_metrics
from video_swinv2.training.start import ancestors_of, continue_history, find_start
from video_swinv2.weights.formats import read_checkpoint
from video_swinv2.weights.pretrained import RequestedSizes, open_model, preprocessing_of
from video_swinv2.weights.store import CARD_KEY, read_tensors

BIG = "9" * 5000
FAULTY = {
    "empty": b"",
    "binary": b"\x80\x02}q\x00.",
    "not UTF-8": b'{"a": "\xff"}',
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep, but within the limit of json": b"[" * 500 + b"]" * 500,
    "deep objects": b'{"a":' * 100_000,
    "5,000 digits": BIG.encode(),
    "65 bits": b"18446744073709551616",
    "too large for a float": b'{"a": 1e999}',
    "half": b'{"a": [1, 2',
}


class Numbers(Record):
    """A small record."""

    count: int
    shares: list[float] = Field(default_factory=list)


@pytest.mark.parametrize("content", FAULTY.values(), ids=FAULTY.keys())
def test_faulty_json_is_one_line_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    """Whatever Python's json raises, and what it should refuse."""
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}: .*; write, copy or download it again$") as raised:
        read_json(path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_record_names_the_key(tmp_path: Path) -> None:
    """Missing, unknown and wrongly typed keys; nothing is converted."""
    path = tmp_path / "numbers.json"
    faults = {
        "{}": "count: field required",
        "[]": "not a JSON object",
        '{"count": "3"}': "count: input should be a valid integer",
        '{"count": 3.0}': "count: input should be a valid integer",
        '{"count": true}': "count: input should be a valid integer",
        '{"count": null}': "count: input should be a valid integer",
        '{"count": 3, "shares": [0.5, "x"]}': "shares.1: input should be a valid number",
        '{"count": NaN}': "count: input should be a valid integer",
        '{"count": 3, "shares": [-Infinity]}': "shares.0: input should be a valid number",
        '{"count": 3, "more": 1}': "more: extra inputs are not permitted",
    }
    for text, fault in faults.items():
        path.write_text(text)
        with pytest.raises(UserError, match=f"^{path}: {fault}; "):
            read_record(path, Numbers)
    path.write_text('{"count": 3, "shares": [1, 0.5]}')
    assert read_record(path, Numbers) == Numbers(count=3, shares=[1, 0.5])


def test_only_files_of_a_stated_size_are_read(tmp_path: Path) -> None:
    """A pipe would block for ever and a device has no end; a sparse file is larger than the memory."""
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    for path, fault in (
        (tmp_path / "pipe", "is a device, a pipe"),
        (Path("/dev/zero"), "is a device, a pipe"),
        (tmp_path, "cannot be read .Is a directory"),
        (tmp_path / "large", "is larger than the 67,108,864 bytes"),
        (tmp_path / "absent", "cannot be read .No such file"),
    ):
        with pytest.raises(UserError, match=f"^{path}: {fault}"):
            read_json(path)
    (tmp_path / "small").write_bytes(b"12345")
    assert read_bytes(tmp_path / "small", 5) == b"12345"
    with pytest.raises(UserError, match="is larger than the 4 bytes"):
        read_bytes(tmp_path / "small", 4)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small clip model of this project."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    arguments: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "num_classes": 2}
    model = vs.SwinV2(**arguments, frames=4, image_size=32, window=(2, 4, 4))
    ancestors = [{"file": "init.safetensors", "task": "simmim"}]
    provenance = {"task": "classification", "step": 3, "ancestors": ancestors}
    vs.save_model(
        model, path, classes=["a", "b"], preprocessing=vs.Preprocessing(4, 1, (32, 32)), provenance=provenance
    )
    return path


def test_cards_that_were_tampered_with(model_file: Path, tmp_path: Path) -> None:
    """The card of a model file, through everything that reads it."""
    tensors, metadata = read_tensors(model_file)
    path = tmp_path / "tampered.safetensors"

    def read(card: Any) -> None:
        save_file(tensors, path, metadata={CARD_KEY: json.dumps(card)})
        found = vs.read_card(path)
        vs.load_model(path)
        checkpoint = read_checkpoint(path)
        model, account = open_model(checkpoint, RequestedSizes())
        assert preprocessing_of(model, checkpoint) == found.preprocessing
        ancestors_of(str(path), {}, account.provenance)

    assert_no_faults(json.loads(metadata[CARD_KEY]), read, str(path), 200)


def test_hub_folders_that_were_tampered_with(model_file: Path, tmp_path: Path) -> None:
    """config.json and the index of a folder of Hugging Face."""
    state = {name: tensor for name, tensor in read_tensors(model_file)[0].items() if tensor.ndim != 5}
    state["patch_embed.proj.weight"] = torch.zeros(8, 3, 4, 4)
    save_file(state, tmp_path / "a.safetensors")
    index = {"weight_map": dict.fromkeys(list(state)[:3], "a.safetensors"), "metadata": {"total_size": 1}}
    config = {
        "model_type": "swinv2",
        "architecture": "swinv2_tiny_window8_256",
        "model_args": {"img_size": 256},
        "image_size": 32,
        "window_size": 4,
        "depths": [1, 1],
        "pretrained_window_sizes": [0, 0],
        "id2label": {"0": "a", "1": "b"},
        "label_names": ["a", "b"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    def read_index(value: Any) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(value))
        read_checkpoint(tmp_path)

    def read_config(value: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps(value))
        assert read_checkpoint(tmp_path).classes in ((), ("a", "b"), ("a",)) or "id2label" in str(value)

    assert_no_faults(index, read_index, str(tmp_path), 40)
    read_index(index)
    assert_no_faults(config, read_config, str(tmp_path), 20)
    assert_no_faults({key: config[key] for key in ("architecture", "model_args")}, read_config, str(tmp_path), 10)
    # Python refuses to convert a number of so many digits.
    read_config({"id2label": {"1" * 5000: "a"}})


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Checkpoints, dict[str, Any]]:
    """A run's checkpoints, and the state of the run in the only one."""
    found = Checkpoints(tmp_path / "checkpoints")
    weights, first, second, ema = ({"w": torch.full((2,), float(i))} for i in range(4))
    state = TrainingState(weights, first, second, 3, ema, (1024.0, 2))
    run = {
        "best": 0.5,
        "best_by": {"best_metric": "val/top1"},
        "best_step": 2,
        "improved_step": 2,
        "configs": [{"since_step": 0, "config": {"out": "x", "optim": {"lr": 1e-3}, "engine": {"deepspeed": {}}}}],
        "seconds": 9.0,
        "identity": {"samples": 10, "batch": 2},
        "provenance": {"init": "scratch"},
        "arithmetic": {"processes": "1"},
        "cpb_norm": [[2, 4, 4], [2, 4, 4]],
        "faults": {"skipped": 1, "skipped_in_row": 0, "broken_samples": 2.0, "broken": ["a"], "slowest": [0.5, "b"]},
    }
    found.save(state, run, step=3)
    found.wait()
    return found, run


def test_checkpoint_records_that_were_tampered_with(checkpoints: tuple[Checkpoints, dict[str, Any]]) -> None:
    """state.json, whose values agree with the files unless they are changed."""
    path = checkpoints[0].record(3)
    record = json.loads(path.read_text())

    def read(value: Any) -> None:
        path.write_text(json.dumps(value))
        checkpoints[0].read(3)

    assert_no_faults({key: value for key, value in record.items() if key != "state"}, read, str(path.parent), 100)
    read(record)
    # A folder is read by whoever resumes from it.
    outside = {name: entry for name, entry in record["files"].items()} | {"../../x": {"bytes": 1, "sha256": ""}}
    with pytest.raises(UserError, match=r"state\.json: files: '\.\./\.\./x'"):
        read(record | {"files": outside})


def test_run_states_that_were_tampered_with(
    checkpoints: tuple[Checkpoints, dict[str, Any]], model_file: Path, tmp_path: Path
) -> None:
    """The run's own state in a checkpoint, through the search for a start and the count of faults."""
    world = alone("cpu")
    # All that the search for a start reads of a task.
    task: Any = SimpleNamespace(encoder=vs.load_model(model_file))
    config = small_config(out=str(tmp_path))
    samples: Any = None  # which the count of faults does not look at before a step
    (tmp_path / "model.safetensors").touch()
    found, run = checkpoints
    path = found.record(3)
    record = json.loads(path.read_text())

    def read(value: Any) -> None:
        path.write_text(json.dumps(record | {"state": value}))
        start = find_start(task, config, found, {"samples": 10, "batch": 2}, {"best_metric": "val/top1"}, 9, world)
        for change in continue_history(start, config, accept_changes=True)[1]:
            assert for_terminal(change).startswith(change.key)
        Faults(config, world, samples).restore(start.faults)

    assert_no_faults(run, read, str(tmp_path), 100)


def test_metrics_that_were_tampered_with(tmp_path: Path) -> None:
    """metrics.jsonl, which a resumed run reads."""
    path = tmp_path / "metrics.jsonl"

    def read(value: Any) -> None:
        path.write_text(json.dumps(value) + '\n{"step": 2, "train/loss": 0.5}\n{"step": 3, "tr')
        MetricLog(tmp_path, 2).close()
        assert [line["step"] for line in read_metrics(tmp_path)][-1] == 2

    read({"step": 1, "train/loss": 0.5})
    assert len(read_metrics(tmp_path)) == 2
    path.write_text('{"step": 1, "train/loss": NaN}\n')  # as older versions wrote it
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert_no_faults({"step": 1, "train/loss": 0.5}, read, f"{path}, line 1", 20)
