"""Checkpoints of other DeepSpeed runs: the output of DeepSpeed's own tools is read, and training resumes from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards

import video_swinv2 as vs
from tests.engine import engine_worker
from tests.engine.engine_worker import LR, batch
from tests.engine.harness import SINGLE, read_outcome, worker_environment
from video_swinv2.config import EngineConfig
from video_swinv2.engine.base import StepSettings
from video_swinv2.engine.checkpoint import Checkpoints, TrainingState
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.foreign_checkpoints import newest_checkpoint
from video_swinv2.engine.optimizer import parameter_groups
from video_swinv2.errors import UserError
from video_swinv2.weights.formats import read_checkpoint

WORKER = Path(__file__).with_name("foreign_worker.py")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    environment = worker_environment(folder)
    command = [sys.executable, str(WORKER), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_training_resumes_from_a_universal_checkpoint(foreign: Path, stage: int) -> None:
    """With groups by layer: at ZeRO-3 DeepSpeed's own loading corrupts their settings and Adam's step count."""
    expected, _ = read_outcome(foreign, f"expected-{stage}")
    found = newest_checkpoint(foreign / f"zero-{stage}")
    assert found is not None
    step, state, run_state = found
    assert (step, state.optimizer_step, run_state) == (2, 2, None)
    alone = engine_worker.build(SINGLE, seed=7, engine="plain", precision="fp32", clip_norm=1.0)
    engine = _all_trained() if stage == 3 else alone
    engine.load(state)
    for number in (2, 3):
        engine.set_lr(LR)
        images, labels = batch(number)
        engine.backward(torch.nn.functional.cross_entropy(engine.forward(images), labels))
        engine.step()
    for name, tensor in engine.weights().items():
        torch.testing.assert_close(tensor, expected.weights[name], rtol=1e-5, atol=1e-6, msg=name)
    assert {path.name for path in (foreign / f"zero-{stage}" / "fp32").iterdir()} >= {"pytorch_model.bin"}


def _all_trained() -> object:
    module = engine_worker.Tiny(7)
    module.patch_embed["norm"].requires_grad_(True)
    groups = parameter_groups(module, engine_worker.DEPTHS, weight_decay=0.1, layer_decay=0.75)
    config, step = EngineConfig(engine="plain", precision="fp32"), StepSettings(clip_norm=1.0)
    return make_engine(module, groups, config, step, SINGLE, lr=LR, betas=(0.9, 0.95), eps=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_partitioned_checkpoint_is_refused_with_the_command_to_convert_it(
    foreign: Path, tmp_path: Path, stage: int
) -> None:
    """Both the partitioned folder itself and the one above it, whose `latest` file names it."""
    for name in ("global_step2", "latest"):
        (tmp_path / name).symlink_to(foreign / f"zero-{stage}" / name)
    for folder in (tmp_path, tmp_path / "global_step2"):
        with pytest.raises(
            UserError, match="a partitioned DeepSpeed checkpoint; convert it with `python -m deepspeed"
        ) as caught:
            newest_checkpoint(folder)
        assert "\n" not in str(caught.value)


def test_an_incomplete_universal_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "zero" / "head.weight"
    folder.mkdir(parents=True)
    (folder / "fp32.pt").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt: cannot be read as part"):
        newest_checkpoint(tmp_path)
    torch.save(
        {"global_steps": 7, "skipped_steps": 2, "param_shapes": [{"head.weight": torch.Size([2, 3])}]},
        tmp_path / "a_model_states.pt",
    )
    with pytest.raises(UserError, match=r"head.weight/fp32.pt: cannot be read as part"):
        newest_checkpoint(tmp_path)
    torch.save(torch.zeros(5), folder / "fp32.pt")
    with pytest.raises(UserError, match=r"has 5 elements, which does not fit shape \(2, 3\)"):
        newest_checkpoint(tmp_path)
    torch.save({"param": torch.ones(6)}, folder / "fp32.pt")
    with pytest.raises(UserError, match="has no Adam moments, so it cannot be resumed"):
        newest_checkpoint(tmp_path)
    for moment in ("exp_avg", "exp_avg_sq"):
        torch.save(torch.ones(6), folder / f"{moment}.pt")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found[0], found[1].optimizer_step, found[1].weights["head.weight"].shape) == (7, 5, (2, 3))


def test_our_own_checkpoints_and_a_folder_without_any(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    tensors = {"a": torch.ones(2)}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(TrainingState(tensors, {}, {}, optimizer_step=1), {"best": None}, step=1)
    checkpoints.wait()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found[0], found[2]) == (1, {"best": None})


@pytest.mark.parametrize("sharded", [False, True])
def test_the_output_of_zero_to_fp32_is_read_as_weights(tmp_path: Path, sharded: bool) -> None:
    """A folder with `pytorch_model.bin`, or with shards and their index, as DeepSpeed's tool writes them."""
    model = vs.create_model("swinv2_nano", num_classes=3, image_size=32, window=4)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()} if sharded else model.state_dict()
    parts = split_torch_state_dict_into_shards(
        state, filename_pattern="pytorch_model{suffix}.bin", max_shard_size="1MB" if sharded else "1GB"
    )
    for name, keys in parts.filename_to_tensors.items():
        torch.save({key: state[key] for key in keys}, tmp_path / name)
    if sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert len(parts.filename_to_tensors) > 1 if sharded else len(parts.filename_to_tensors) == 1
    found = read_checkpoint(tmp_path).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
