"""Engines: every ZeRO stage in two real processes against the plain engine on the whole batch."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from video_swinv2.config import EngineConfig
from video_swinv2.distributed.world import World
from video_swinv2.engine.base import StepSettings
from video_swinv2.engine.checkpoint import Checkpoints, TrainingState
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import parameter_groups
from video_swinv2.engine.plain import PlainEngine
from video_swinv2.errors import UsageError, UserError

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("engine_worker.py")
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
STAGES = (0, 1, 2, 3)
EVERY_CASE = [(stage, accumulation) for stage in STAGES for accumulation in (1, 2)]
SPOILT_CASES = [("loss", *case) for case in EVERY_CASE] + [
    (name, stage, 2) for name in ("infinite", "gradient") for stage in STAGES
]


def _worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _worker()


def _environment(folder: Path) -> dict[str, str]:
    """No launcher's variables, one thread, and no compiler."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        clean.pop(key, None)
    return clean | {
        "PATH": "",
        "CXX": str(folder / "no" / "compiler"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }


def _run(folder: Path, cases: str, size: int, worker: Path = WORKER) -> None:
    """Run a worker in ``size`` processes and report what the first failing one said."""
    commands = [[sys.executable, str(worker), cases, str(rank), str(size), str(folder)] for rank in range(size)]
    logs = [folder / f"log-{size}-{rank}.txt" for rank in range(size)]
    processes = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("w") as output:
            processes.append(
                subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_environment(folder))
            )
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = "\n".join(log.read_text()[-3000:] for log in logs)
    assert codes == [0] * size, said


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes, then one, wrote what came of all the cases."""
    folder = tmp_path_factory.mktemp("engines")
    _run(folder, "parity,first,resume,spoilt,bf16,averaged", 2)
    _run(folder, "alone", 1)
    return folder


def _outcome(folder: Path, name: str) -> tuple[TrainingState, list[dict[str, Any]]]:
    tensors = load_file(folder / f"{name}.safetensors")
    note = json.loads((folder / f"{name}.json").read_text())
    kinds = [
        {key.removeprefix(f"{kind}/"): value for key, value in tensors.items() if key.startswith(f"{kind}/")}
        for kind in ("weights", "exp_avg", "exp_avg_sq", "ema")
    ]
    scale = tuple(note["loss_scale"]) if note["loss_scale"] else None
    return TrainingState(*kinds[:3], optimizer_step=note["steps"], ema=kinds[3], loss_scale=scale), note["records"]


def _plain(
    accumulation: int = 1, steps: int = 4, precision: str = "fp32", **settings: Any
) -> tuple[TrainingState, list[dict[str, Any]]]:
    engine = worker.build(ALONE, engine="plain", precision=precision, accumulation=accumulation, **settings)
    records = worker.train(engine, ALONE, accumulation, 0, steps)
    return engine.training_state(), records


def _difference(first: TrainingState, second: TrainingState) -> float:
    """Largest difference of any element, relative to the largest of its tensor."""
    worst = 0.0
    for kind in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        ours, theirs = getattr(first, kind), getattr(second, kind)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].shape == theirs[name].shape
            scale = theirs[name].abs().max().clamp(min=1e-3)
            worst = max(worst, float((ours[name] - theirs[name]).abs().max() / scale))
    return worst


def _identical(first: TrainingState, second: TrainingState) -> bool:
    same = (first.optimizer_step, first.loss_scale) == (second.optimizer_step, second.loss_scale)
    for kind in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        ours, theirs = getattr(first, kind), getattr(second, kind)
        same = same and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return same


@pytest.mark.parametrize(("stage", "accumulation"), EVERY_CASE)
def test_every_stage_trains_as_the_plain_engine_on_the_whole_batch(
    outcomes: Path, stage: int, accumulation: int
) -> None:
    reference, expected = _plain()
    found, records = _outcome(outcomes, f"parity-{stage}-{accumulation}")
    assert _difference(found, reference) < 1e-4
    assert found.optimizer_step == 4
    assert all(record["applied"] for record in records)
    for key in ("loss", "norm"):
        torch.testing.assert_close([r[key] for r in records], [r[key] for r in expected], rtol=1e-5, atol=1e-6)
    assert expected[0]["norm"] > 0.3, "clipping must bite and the norm must be the one before it"


def test_the_comparison_can_tell_one_wrong_group_apart() -> None:
    reference, _ = _plain()
    engine = worker.build(ALONE, engine="plain", precision="fp32")
    engine._optimizer.param_groups[0]["lr_scale"] *= 1.05
    worker.train(engine, ALONE, 1, 0, 4)
    assert _difference(engine.training_state(), reference) > 1e-3


def test_weights_hold_frozen_parameters_and_buffers_unchanged(outcomes: Path) -> None:
    module = worker.Tiny(0)
    for stage in STAGES:
        found, _ = _outcome(outcomes, f"parity-{stage}-1")
        assert found.weights.keys() == module.state_dict().keys()
        for name in ("shift", "patch_embed.norm.weight"):
            assert torch.equal(found.weights[name], module.state_dict()[name])
        assert "patch_embed.norm.weight" not in found.exp_avg
        assert all(tensor.dtype == torch.float32 for tensor in found.weights.values())


@pytest.mark.parametrize("stage", STAGES)
def test_states_before_the_first_step_and_going_back_to_them(outcomes: Path, stage: int) -> None:
    first, _ = _outcome(outcomes, f"first-{stage}")
    assert first.optimizer_step == 0
    assert not any(tensor.any() for tensor in first.exp_avg.values())
    for name, tensor in worker.Tiny(0).state_dict().items():
        assert torch.equal(first.weights[name], tensor)
    rewound, _ = _outcome(outcomes, f"rewound-{stage}")
    assert _identical(rewound, first)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(outcomes: Path, stage: int) -> None:
    straight, records = _outcome(outcomes, f"parity-{stage}-1")
    resumed, later = _outcome(outcomes, f"resume-{stage}-{stage}")
    assert _identical(resumed, straight)
    assert later == records[2:]


@pytest.mark.parametrize("name", ["resume-3-1", "resume-1-3", *(f"alone-{a}-{b}" for a, b in
                                  ((0, 1), (1, 1), (2, 2), (3, 3), (3, 1)))])  # fmt: skip
def test_a_checkpoint_goes_on_at_another_stage_and_world_size(outcomes: Path, name: str) -> None:
    straight, _ = _outcome(outcomes, "parity-1-1")
    resumed, _ = _outcome(outcomes, name)
    assert resumed.optimizer_step == 4
    assert _difference(resumed, straight) < 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_the_plain_engine_goes_on_from_any_stage(outcomes: Path, stage: int) -> None:
    straight, _ = _plain()
    found = Checkpoints(outcomes / f"checkpoints-{stage}-{stage}").newest()
    assert found is not None
    engine = worker.build(ALONE, seed=7, engine="plain", precision="fp32")
    engine.load(found[1])
    worker.train(engine, ALONE, 1, 2, 4)
    assert _difference(engine.training_state(), straight) < 1e-4


@pytest.mark.parametrize(("name", "stage", "accumulation"), SPOILT_CASES)
def test_what_is_not_finite_on_one_rank_moves_nothing_on_any(
    outcomes: Path, name: str, stage: int, accumulation: int
) -> None:
    before, _ = _outcome(outcomes, f"before-{name}-{stage}-{accumulation}")
    during, records = _outcome(outcomes, f"during-{name}-{stage}-{accumulation}")
    assert [record["applied"] for record in records] == [False]
    assert not math.isfinite(records[0]["norm"])
    assert _identical(during, before)
    after, records = _outcome(outcomes, f"after-{name}-{stage}-{accumulation}")
    assert [record["applied"] for record in records] == [True, True]
    assert _difference(after, _plain_without_step_one()) < 1e-4


def _plain_without_step_one() -> TrainingState:
    engine = worker.build(ALONE, engine="plain", precision="fp32")
    worker.train(engine, ALONE, 1, 0, 1)
    worker.train(engine, ALONE, 1, 2, 4)
    return engine.training_state()


@pytest.mark.parametrize("spoil", [math.nan, math.inf])
def test_the_plain_engine_drops_a_step_that_is_not_finite(spoil: float) -> None:
    engine = worker.build(ALONE, engine="plain", precision="fp32", accumulation=2)
    worker.train(engine, ALONE, 2, 0, 1)
    before = engine.training_state()
    records = worker.train(engine, ALONE, 2, 1, 2, lambda step, micro, loss: loss + spoil * (1 - micro))
    assert [record["applied"] for record in records] == [False]
    assert _identical(engine.training_state(), before)


@pytest.mark.parametrize(("stage", "accumulation"), EVERY_CASE)
def test_bf16_autocast_stays_close_to_fp32_and_keeps_fp32_weights(
    outcomes: Path, stage: int, accumulation: int
) -> None:
    reference, expected = _plain(clip_norm=None)
    found, records = _outcome(outcomes, f"bf16-{stage}-{accumulation}")
    losses = torch.tensor([[record["loss"] for record in run] for run in (records, expected)])
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.0)
    assert _difference(found, reference) > 0, "it must have been bf16"
    moved = torch.cat([(found.weights[n] - reference.weights[n]).flatten() for n in found.weights])
    assert float(moved.abs().max()) < 4 * worker.LR


def test_plain_bf16_takes_the_same_path() -> None:
    engine = worker.build(ALONE, engine="plain", precision="bf16")
    assert engine.forward(worker.batch(0)[0]).dtype == torch.bfloat16
    assert engine.training_state().weights["head.weight"].dtype == torch.float32


def test_the_average_is_what_its_formula_says() -> None:
    engine = worker.build(ALONE, engine="plain", precision="fp32", ema=0.6)
    expected = engine.weights()
    for step in range(4):
        worker.train(engine, ALONE, 1, step, step + 1)
        expected = {name: 0.6 * expected[name] + 0.4 * tensor for name, tensor in engine.weights().items()}
    found = engine.averaged_weights()
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found["head.weight"], engine.weights()["head.weight"])
    assert "patch_embed.norm.weight" not in engine.training_state().ema, "frozen parameters need no average"


def test_a_step_that_was_dropped_leaves_the_average_alone() -> None:
    engine = worker.build(ALONE, engine="plain", precision="fp32", ema=0.6)
    worker.train(engine, ALONE, 1, 0, 1)
    before = engine.averaged_weights()
    worker.train(engine, ALONE, 1, 1, 2, lambda step, micro, loss: loss * math.nan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.averaged_weights().items())


@pytest.mark.parametrize("stage", STAGES)
def test_averages_are_kept_by_pieces_validated_and_resumed(outcomes: Path, stage: int) -> None:
    """Putting averages into the module and taking them out again changes no bit of what follows."""
    reference, _ = _plain(ema=0.6)
    straight, _ = _outcome(outcomes, f"straight-averaged-{stage}")
    resumed, _ = _outcome(outcomes, f"resumed-averaged-{stage}")
    assert straight.ema.keys() == reference.ema.keys()
    assert _difference(straight, reference) < 1e-4
    assert _identical(resumed, straight)
    untouched, _ = _outcome(outcomes, f"parity-{stage}-1")
    assert all(torch.equal(tensor, straight.weights[name]) for name, tensor in untouched.weights.items())


def test_states_are_copies() -> None:
    engine = worker.build(ALONE, engine="plain", precision="fp32")
    worker.train(engine, ALONE, 1, 0, 1)
    kept = engine.training_state()
    head = kept.weights["head.weight"].clone()
    moment = kept.exp_avg["head.weight"].clone()
    worker.train(engine, ALONE, 1, 1, 2)
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
    engine: PlainEngine = worker.build(ALONE, engine="plain", precision="fp32")
    portable = engine.training_state()
    assert portable is not None
    change(portable)
    with pytest.raises(UserError, match=message):
        engine.load(portable)


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
    engine = make_engine(module, groups, config, StepSettings(), ALONE, lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    engine.backward(engine.forward(torch.ones(1, 3)).sum())
    engine.step()
    portable = engine.training_state()
    assert portable is not None
    assert set(portable.weights) == {"first.weight", "second.weight"}
    assert set(portable.exp_avg) == {"first.weight"}
    engine.load(portable)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulation": 0}, "accumulation: 0"),
        ({"clip_norm": 0.0}, "clip_norm: 0.0"),
        ({"clip_norm": math.nan}, "clip_norm: nan"),
    ],
)
def test_steps_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StepSettings(**settings)


def test_the_plain_engine_refuses_several_processes() -> None:
    with pytest.raises(UsageError, match="plain runs in one process, and there are 2"):
        worker.build(World(0, 2, 0, torch.device("cpu")), engine="plain")


def test_a_missing_deepspeed_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"install it, or use engine\.engine=plain"):
        worker.build(ALONE, engine="deepspeed")


def test_no_compiler_was_started(outcomes: Path) -> None:
    assert not (outcomes / "extensions").exists()
