"""Engines: every ZeRO stage in two real processes against the plain engine on the whole batch."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine import engine_worker
from tests.engine.harness import SINGLE, STAGES, identical, largest_difference, read_outcome, run_workers, train_plain
from video_swinv2.config import EngineConfig
from video_swinv2.distributed.world import World
from video_swinv2.engine.base import StepSettings
from video_swinv2.engine.checkpoint import Checkpoints, TrainingState
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import parameter_groups
from video_swinv2.engine.plain import PlainEngine
from video_swinv2.errors import UsageError, UserError

WORKER = Path(__file__).with_name("engine_worker.py")
EVERY_CASE = [(stage, accumulation) for stage in STAGES for accumulation in (1, 2)]
SPOILT_CASES = [("loss", *case) for case in EVERY_CASE] + [
    (name, stage, 2) for name in ("infinite", "gradient") for stage in STAGES
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the outcomes of all cases, written by two processes and then by one."""
    folder = tmp_path_factory.mktemp("engines")
    run_workers(WORKER, folder, "parity,first,resume,spoilt,bf16,averaged", 2)
    run_workers(WORKER, folder, "alone", 1)
    return folder


@pytest.mark.parametrize(("stage", "accumulation"), EVERY_CASE)
def test_every_stage_trains_as_the_plain_engine_on_the_whole_batch(
    outcomes: Path, stage: int, accumulation: int
) -> None:
    reference, expected = train_plain()
    found, records = read_outcome(outcomes, f"parity-{stage}-{accumulation}")
    assert largest_difference(found, reference) < 1e-4
    assert found.optimizer_step == 4
    assert all(record["applied"] for record in records)
    for key in ("loss", "norm"):
        torch.testing.assert_close([r[key] for r in records], [r[key] for r in expected], rtol=1e-5, atol=1e-6)
    assert expected[0]["norm"] > 0.3, "clipping must bite and the norm must be the one before it"


def test_the_comparison_can_tell_one_wrong_group_apart() -> None:
    reference, _ = train_plain()
    engine = engine_worker.build(SINGLE, engine="plain", precision="fp32")
    engine._optimizer.param_groups[0]["lr_scale"] *= 1.05
    engine_worker.train(engine, SINGLE, 1, 0, 4)
    assert largest_difference(engine.training_state(), reference) > 1e-3


def test_weights_hold_frozen_parameters_and_buffers_unchanged(outcomes: Path) -> None:
    module = engine_worker.Tiny(0)
    for stage in STAGES:
        found, _ = read_outcome(outcomes, f"parity-{stage}-1")
        assert found.weights.keys() == module.state_dict().keys()
        for name in ("shift", "patch_embed.norm.weight"):
            assert torch.equal(found.weights[name], module.state_dict()[name])
        assert "patch_embed.norm.weight" not in found.exp_avg
        assert all(tensor.dtype == torch.float32 for tensor in found.weights.values())


@pytest.mark.parametrize("stage", STAGES)
def test_states_before_the_first_step_and_returning_to_them(outcomes: Path, stage: int) -> None:
    first, _ = read_outcome(outcomes, f"first-{stage}")
    assert first.optimizer_step == 0
    assert not any(tensor.any() for tensor in first.exp_avg.values())
    for name, tensor in engine_worker.Tiny(0).state_dict().items():
        assert torch.equal(first.weights[name], tensor)
    rewound, _ = read_outcome(outcomes, f"rewound-{stage}")
    assert identical(rewound, first)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(outcomes: Path, stage: int) -> None:
    straight, records = read_outcome(outcomes, f"parity-{stage}-1")
    resumed, later = read_outcome(outcomes, f"resume-{stage}-{stage}")
    assert identical(resumed, straight)
    assert later == records[2:]


@pytest.mark.parametrize("name", ["resume-3-1", "resume-1-3", *(f"alone-{a}-{b}" for a, b in
                                  ((0, 1), (1, 1), (2, 2), (3, 3), (3, 1)))])  # fmt: skip
def test_a_checkpoint_resumes_at_another_stage_and_world_size(outcomes: Path, name: str) -> None:
    straight, _ = read_outcome(outcomes, "parity-1-1")
    resumed, _ = read_outcome(outcomes, name)
    assert resumed.optimizer_step == 4
    assert largest_difference(resumed, straight) < 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_the_plain_engine_resumes_from_any_stage(outcomes: Path, stage: int) -> None:
    straight, _ = train_plain()
    found = Checkpoints(outcomes / f"checkpoints-{stage}-{stage}").newest()
    assert found is not None
    engine = engine_worker.build(SINGLE, seed=7, engine="plain", precision="fp32")
    engine.load(found[1])
    engine_worker.train(engine, SINGLE, 1, 2, 4)
    assert largest_difference(engine.training_state(), straight) < 1e-4


@pytest.mark.parametrize(("name", "stage", "accumulation"), SPOILT_CASES)
def test_a_non_finite_loss_or_gradient_on_one_rank_changes_nothing_on_any(
    outcomes: Path, name: str, stage: int, accumulation: int
) -> None:
    before, _ = read_outcome(outcomes, f"before-{name}-{stage}-{accumulation}")
    during, records = read_outcome(outcomes, f"during-{name}-{stage}-{accumulation}")
    assert [record["applied"] for record in records] == [False]
    assert not math.isfinite(records[0]["norm"])
    assert identical(during, before)
    after, records = read_outcome(outcomes, f"after-{name}-{stage}-{accumulation}")
    assert [record["applied"] for record in records] == [True, True]
    assert largest_difference(after, _plain_without_step_one()) < 1e-4


def _plain_without_step_one() -> TrainingState:
    engine = engine_worker.build(SINGLE, engine="plain", precision="fp32")
    engine_worker.train(engine, SINGLE, 1, 0, 1)
    engine_worker.train(engine, SINGLE, 1, 2, 4)
    return engine.training_state()


@pytest.mark.parametrize("spoil", [math.nan, math.inf])
def test_the_plain_engine_skips_a_non_finite_step(spoil: float) -> None:
    engine = engine_worker.build(SINGLE, engine="plain", precision="fp32", accumulation=2)
    engine_worker.train(engine, SINGLE, 2, 0, 1)
    before = engine.training_state()
    records = engine_worker.train(engine, SINGLE, 2, 1, 2, lambda step, micro, loss: loss + spoil * (1 - micro))
    assert [record["applied"] for record in records] == [False]
    assert identical(engine.training_state(), before)


@pytest.mark.parametrize(("stage", "accumulation"), EVERY_CASE)
def test_bf16_autocast_stays_close_to_fp32_and_keeps_fp32_weights(
    outcomes: Path, stage: int, accumulation: int
) -> None:
    reference, expected = train_plain(clip_norm=None)
    found, records = read_outcome(outcomes, f"bf16-{stage}-{accumulation}")
    losses = torch.tensor([[record["loss"] for record in run] for run in (records, expected)])
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.0)
    assert largest_difference(found, reference) > 0, "it must have been bf16"
    moved = torch.cat([(found.weights[n] - reference.weights[n]).flatten() for n in found.weights])
    assert float(moved.abs().max()) < 4 * engine_worker.LR


def test_plain_bf16_takes_the_same_path() -> None:
    engine = engine_worker.build(SINGLE, engine="plain", precision="bf16")
    assert engine.forward(engine_worker.batch(0)[0]).dtype == torch.bfloat16
    assert engine.training_state().weights["head.weight"].dtype == torch.float32


def test_the_average_is_what_its_formula_says() -> None:
    engine = engine_worker.build(SINGLE, engine="plain", precision="fp32", ema=0.6)
    expected = engine.weights()
    for step in range(4):
        engine_worker.train(engine, SINGLE, 1, step, step + 1)
        expected = {name: 0.6 * expected[name] + 0.4 * tensor for name, tensor in engine.weights().items()}
    found = engine.averaged_weights()
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found["head.weight"], engine.weights()["head.weight"])
    assert "patch_embed.norm.weight" not in engine.training_state().ema, "frozen parameters need no average"


def test_a_skipped_step_does_not_update_the_average() -> None:
    engine = engine_worker.build(SINGLE, engine="plain", precision="fp32", ema=0.6)
    engine_worker.train(engine, SINGLE, 1, 0, 1)
    before = engine.averaged_weights()
    engine_worker.train(engine, SINGLE, 1, 1, 2, lambda step, micro, loss: loss * math.nan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.averaged_weights().items())


@pytest.mark.parametrize("stage", STAGES)
def test_averages_are_partitioned_validated_and_resumed(outcomes: Path, stage: int) -> None:
    """Writing averages into the module and the weights back again changes no bit of what follows."""
    reference, _ = train_plain(ema=0.6)
    straight, _ = read_outcome(outcomes, f"straight-averaged-{stage}")
    resumed, _ = read_outcome(outcomes, f"resumed-averaged-{stage}")
    assert straight.ema.keys() == reference.ema.keys()
    assert largest_difference(straight, reference) < 1e-4
    assert identical(resumed, straight)
    untouched, _ = read_outcome(outcomes, f"parity-{stage}-1")
    assert all(torch.equal(tensor, straight.weights[name]) for name, tensor in untouched.weights.items())


def test_training_states_are_copies() -> None:
    engine = engine_worker.build(SINGLE, engine="plain", precision="fp32")
    engine_worker.train(engine, SINGLE, 1, 0, 1)
    kept = engine.training_state()
    head = kept.weights["head.weight"].clone()
    moment = kept.exp_avg["head.weight"].clone()
    engine_worker.train(engine, SINGLE, 1, 1, 2)
    assert torch.equal(kept.weights["head.weight"], head)
    assert torch.equal(kept.exp_avg["head.weight"], moment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.weights.pop("head.bias"), "weights: head.bias is not in the checkpoint"),
        (lambda p: p.weights.update(extra=torch.zeros(1)), "weights: extra is not in the model"),
        (lambda p: p.exp_avg.pop("norm.weight"), "exp_avg: norm.weight is not in the checkpoint"),
        (lambda p: p.weights.update({"head.bias": torch.zeros(9)}), r"head.bias has shape \(9,\), not \(3,\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change: Any, message: str) -> None:
    engine: PlainEngine = engine_worker.build(SINGLE, engine="plain", precision="fp32")
    state = engine.training_state()
    assert state is not None
    change(state)
    with pytest.raises(UserError, match=message):
        engine.load(state)


def test_one_tensor_under_two_names_is_saved_under_both() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(3, 3, bias=False)
            self.second = torch.nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    module = Tied()
    groups = parameter_groups(module, (1,), weight_decay=0.1)
    config = EngineConfig(engine="plain", precision="fp32")
    engine = make_engine(module, groups, config, StepSettings(), SINGLE, lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    engine.backward(engine.forward(torch.ones(1, 3)).sum())
    engine.step()
    state = engine.training_state()
    assert state is not None
    assert set(state.weights) == {"first.weight", "second.weight"}
    assert set(state.exp_avg) == {"first.weight"}
    engine.load(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulation": 0}, "accumulation: 0"),
        ({"clip_norm": 0.0}, "clip_norm: 0.0"),
        ({"clip_norm": math.nan}, "clip_norm: nan"),
    ],
)
def test_invalid_step_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StepSettings(**settings)


def test_the_plain_engine_refuses_several_processes() -> None:
    with pytest.raises(UsageError, match="plain runs in one process, and there are 2"):
        engine_worker.build(World(0, 2, 0, torch.device("cpu")), engine="plain")


def test_a_missing_deepspeed_is_reported_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"install it, or use engine\.engine=plain"):
        engine_worker.build(SINGLE, engine="deepspeed")


def test_no_compiler_was_started(outcomes: Path) -> None:
    assert not (outcomes / "extensions").exists()
