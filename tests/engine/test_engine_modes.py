"""The engine's modes in two real processes: fp16 and its loss scale, rounded gradients, offloading, compiled blocks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import video_swinv2 as vs
from tests.engine import engine_worker
from tests.engine.engine_modes_worker import OFFLOADED, held_at_the_head
from tests.engine.harness import SINGLE, STAGES, identical, largest_difference, read_outcome, run_workers, train_plain
from video_swinv2.config import EngineConfig
from video_swinv2.config.deepspeed_keys import DERIVED, TUNABLE, ZERO
from video_swinv2.engine.base import StepSettings
from video_swinv2.engine.deepspeed_config import build_deepspeed_config, offload_section
from video_swinv2.engine.factory import compile_blocks
from video_swinv2.engine.gradients import GROWTH_INTERVAL, INITIAL_SCALE, LossScale
from video_swinv2.engine.offload import MappedFolder
from video_swinv2.errors import UsageError, UserError
from video_swinv2.models.swinv2 import SwinV2

WORKER = Path(__file__).with_name("engine_modes_worker.py")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modes")
    run_workers(WORKER, folder, "fp16,offloaded,held", 2)
    assert not (folder / "extensions").exists(), "something was compiled"
    return folder


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded")
    run_workers(WORKER, folder, "rounded", 2)
    return folder


def _applied(records: list[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records if record["applied"]]


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_finds_its_loss_scale_and_learns_what_fp32_learns(outcomes: Path, stage: int) -> None:
    """Norms equal to those in fp32 show that they are unscaled; a step lost to the scale is not taken for a data fault.

    DeepSpeed's own scale never falls at stages 1-3, and the worker gives up after 20 attempts at a step.
    """
    reference, expected = train_plain()
    found, records = read_outcome(outcomes, f"fp16-{stage}")
    lost = [record for record in records if not record["applied"]]
    assert lost, "the first scale must be too large here"
    assert all(record["rescaled"] for record in lost)
    assert found.loss_scale is not None
    assert found.loss_scale[0] == INITIAL_SCALE / 2 ** len(lost)
    for key in ("loss", "norm"):
        wanted = [record[key] for record in expected]
        torch.testing.assert_close(_applied(records, key), wanted, rtol=0.01, atol=0.0)
    assert found.optimizer_step == 4
    assert largest_difference(found, reference) > 0, "it must have been fp16"
    moved = torch.cat([(found.weights[n] - reference.weights[n]).flatten() for n in found.weights])
    assert float(moved.abs().max()) < 4 * engine_worker.LR


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_resumes_with_its_loss_scale(outcomes: Path, stage: int) -> None:
    straight, records = read_outcome(outcomes, f"fp16-{stage}")
    resumed, again = read_outcome(outcomes, f"fp16-resumed-{stage}")
    assert again == records[-2:]
    assert identical(resumed, straight)


def test_no_half_precision_copies_of_weights_are_kept(outcomes: Path) -> None:
    """Autocast's cache would keep 2 bytes per weight until the end of the pass: 6 GB for the giant, also at ZeRO-3."""
    kept = [json.loads((outcomes / f"held-{stage}.json").read_text()) for stage in STAGES]
    kept.append(held_at_the_head(SINGLE, engine="plain"))
    assert max(kept) < 0.5


def test_the_plain_engine_scales_the_loss_alike() -> None:
    engine = engine_worker.build(SINGLE, engine="plain", precision="fp16", accumulation=2)
    (lost,) = engine_worker.train(engine, SINGLE, 2, 0, 1, lambda step, micro, loss: loss * math.inf)
    assert (lost["applied"], lost["rescaled"]) == (False, True)
    (record,) = engine_worker.train(engine, SINGLE, 2, 0, 1)
    assert record["norm"] == pytest.approx(train_plain()[1][0]["norm"], rel=0.01)
    state = engine.training_state()
    assert state.loss_scale == (INITIAL_SCALE / 2, 1)
    other = engine_worker.build(SINGLE, engine="plain", precision="fp16")
    other.load(state)
    assert other.training_state().loss_scale == state.loss_scale


def test_the_loss_scale_grows_after_2000_steps_and_cannot_hide_a_fault_for_ever() -> None:
    scale = LossScale()
    assert not any(scale.update(True) for _ in range(GROWTH_INTERVAL))
    assert scale.state() == (2 * INITIAL_SCALE, 0)
    assert [scale.update(False) for _ in range(19)] == [True] * 17 + [False] * 2
    assert scale.state() == (1.0, 0)
    scale.restore(None)
    assert scale.state() == (INITIAL_SCALE, 0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_can_be_exchanged_in_bf16(rounded: Path, stage: int, precision: str) -> None:
    reference, expected = train_plain(clip_norm=None)
    found, records = read_outcome(rounded, f"rounded-{precision}-{stage}")
    losses = [[record["loss"] for record in run] for run in (records, expected)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.0)
    if precision == "fp32":
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6), "only the gradients are rounded"
    moment = found.exp_avg["head.weight"] - reference.exp_avg["head.weight"]
    assert float(moment.abs().max()) > 1e-5, "they must have been rounded"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_does_not_inherit_the_communication_type_of_an_earlier_one(rounded: Path, stage: int) -> None:
    found, _ = read_outcome(rounded, f"afterwards-{stage}")
    assert largest_difference(found, train_plain()[0]) < 1e-4


@pytest.mark.parametrize("name", OFFLOADED)
def test_offloading_does_not_change_what_is_learned(outcomes: Path, name: str) -> None:
    """With accumulation, where DeepSpeed once kept the last micro-batch only, and across a skipped step."""
    reference, expected = train_plain(ema=0.6)
    found, records = read_outcome(outcomes, f"offloaded-{name}")
    assert [record["applied"] for record in records] == [True, True, False, True, True]
    del records[2]
    assert largest_difference(found, reference) < 1e-4
    for key in ("loss", "norm"):
        torch.testing.assert_close([r[key] for r in records], [r[key] for r in expected], rtol=1e-5, atol=1e-6)
    resumed, _ = read_outcome(outcomes, f"offloaded-resumed-{name}")
    assert identical(resumed, found)


def test_offloading_leaves_no_files_behind(outcomes: Path, tmp_path: Path) -> None:
    assert not [path for path in (outcomes / "2-nvme").rglob("*") if path.is_file()]
    tensor = torch.randn(3, 5)
    mapped = MappedFolder(str(tmp_path), SINGLE).map_copy(tensor)
    assert torch.equal(mapped, tensor)
    assert str(tmp_path) in Path("/proc/self/maps").read_text(), "the memory is a file's"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"name another engine\.offload_folder"):
        MappedFolder(str(tmp_path / "file"), SINGLE)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_under_the_same_names() -> None:
    """Through AOT autograd without a code generator: what matters is what gets compiled, inside checkpointing."""
    torch.manual_seed(0)
    model = vs.create_model(
        "swinv2_nano", num_classes=3, image_size=32, window=4, checkpoint_blocks=2, attention="eager"
    )
    images = torch.randn(2, 3, 32, 32)
    names = list(model.state_dict())
    runs = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(model, backend="aot_eager")
        model.zero_grad()
        logits = model.train()(images)
        logits.square().sum().backward()
        runs.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert list(model.state_dict()) == names
    assert any(block._compiled_call_impl for block in model.modules())
    for first, second in zip(*runs, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_all_blocks_stay_compiled() -> None:
    """In training and in validation on images of two sizes, in which PyTorch would give up compiling by default."""
    model = SwinV2(
        embed_dim=32, depths=(2, 2), num_heads=(1, 2), num_classes=3, image_size=64, window=4, attention="eager"
    )
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        compile_blocks(model, backend="eager")
        for size in (64, 96):
            with torch.no_grad():
                model.eval()(torch.randn(2, 3, size, size))
        model.train()(torch.randn(2, 3, 64, 64)).sum().backward()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"engine": "plain", "offload_optimizer": "cpu"}, "engine.offload_optimizer: needs DeepSpeed"),
        ({"offload_optimizer": "cpu", "zero_stage": 0}, "engine.offload_optimizer: ZeRO-0"),
        ({"offload_parameters": "cpu", "zero_stage": 3}, "engine.offload_parameters: needs"),
        ({"offload_optimizer": "nvme"}, "engine.offload_folder: missing"),
        ({"offload_folder": "/fast"}, "engine.offload_folder: nothing is offloaded"),
        ({"precision": "fp16", "communication": "bf16"}, "engine.communication: precision fp16"),
        ({"compile": True, "zero_stage": 3}, "engine.compile: torch.compile recompiles"),
        ({"deepspeed": {"train_batch_size": 64}}, "train_batch_size: follows from optim.batch; remove it here"),
        ({"deepspeed": {"fp16": {"enabled": True}}}, "deepspeed.fp16: follows from engine.precision"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "zero_optimization.stage: follows from engine.zero_stage"),
        ({"deepspeed": {"zero_optimisation": {"stage": 2}}}, "did you mean zero_optimization"),
        ({"deepspeed": {"zero_optimization": {"overlap_com": True}}}, "did you mean zero_optimization.overlap_comm"),
        ({"deepspeed": {"zero_optimization": {"overlap_comm": 1}}}, "1 is not true or false"),
        ({"deepspeed": {"zero_optimization": {"reduce_bucket_size": "auto"}}}, "'auto' is not a positive whole number"),
        ({"deepspeed": {"zero_optimization": 2}}, "zero_optimization: not a key"),
    ],
)
def test_conflicting_engine_keys_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        EngineConfig(**keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_key_that_can_be_set_is_known_to_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values() if field.alias)}
    ours = {key.removeprefix("zero_optimization.") for key in {*TUNABLE, *DERIVED} if key.startswith("zero_optim")}
    assert ours <= known
    assert not TUNABLE.keys() & DERIVED.keys()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_options_with_known_deepspeed_defects_are_never_set(stage: int, precision: str) -> None:
    """Neither defect shows on a CPU: buffers refilled while they are being sent, and half-precision weights."""
    config = build_deepspeed_config(
        EngineConfig(zero_stage=stage), StepSettings(), precision=precision, pin_memory=True
    )
    assert config[ZERO]["overlap_comm"] is False, "if omitted, DeepSpeed chooses, and chooses true at ZeRO-3"
    assert not config.keys() & {"bf16", "fp16", "amp", "optimizer", "scheduler", "checkpoint"}
    assert config["torch_autocast"]["enabled"] is (precision != "fp32")


def test_the_section_overrides_the_defaults() -> None:
    section = {"prescale_gradients": True, "zero_optimization": {"reduce_bucket_size": 2e8, "overlap_comm": True}}
    step = StepSettings(micro_batch=3, accumulation=4, clip_norm=5.0)
    config = build_deepspeed_config(
        EngineConfig(zero_stage=2, deepspeed=section), step, precision="bf16", pin_memory=True
    )
    assert config["zero_optimization"]["reduce_bucket_size"] == 200_000_000
    assert isinstance(config["zero_optimization"]["reduce_bucket_size"], int)
    assert config["zero_optimization"]["stage"] == 2
    assert config["prescale_gradients"] is True
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (3, 4)
    assert math.isclose(config["gradient_clipping"], 5.0)


@pytest.mark.parametrize(("target", "pinned"), [("cpu", True), ("nvme", False)])
def test_only_what_stays_in_memory_is_pinned(target: str, pinned: bool) -> None:
    """Page-locked copies of what goes to files would fill the host's memory during construction."""
    assert offload_section(target, pin_memory=True) == {"device": "cpu", "pin_memory": pinned}
    assert offload_section(target, pin_memory=False) == {"device": "cpu", "pin_memory": False}
