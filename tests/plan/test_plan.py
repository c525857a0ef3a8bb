"""The plan of a run: fake allocations equal real ones, states are those of the engines, peaks are near real ones."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import video_swinv2 as vs
from video_swinv2.bench.train import TrainingSetup, Workload, run_setup
from video_swinv2.cli import main
from video_swinv2.config import Config, validate_config
from video_swinv2.errors import UsageError, UserError
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.plan import plan as module
from video_swinv2.plan.activation_memory import Allocations, PassMemory, pass_memory, without_memory
from video_swinv2.plan.loader_memory import loaders_bytes
from video_swinv2.plan.plan import Plan, make_plan, plan_micro_batch, shortfalls
from video_swinv2.plan.state_memory import StateMemory, count_parameters, gathering_memory, state_memory, step_peaks
from video_swinv2.plan.step_memory import MEMORY_SHARE
from video_swinv2.plan.tables import plan_text


def config(
    *,
    engine: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    **model: Any,
) -> Config:
    values = {
        "out": "runs/none",
        "init": "scratch",
        "model": {"name": "swinv2_nano", "window": (2, 4, 4), **model},
        "data": {"source": "/nowhere", "image_size": 32, "frames": 4, **(data or {})},
        "optim": {"epochs": 2, "lr": 1e-3, "batch": 16, "micro_batch": 2, **(optim or {})},
        "engine": {"device": "cpu", "precision": "fp32", **(engine or {})},
    }
    return validate_config(values, "test")


def small(attention: str, checkpoint_blocks: int = 0) -> SwinV2:
    return SwinV2(
        embed_dim=32,
        depths=(2, 2),
        num_heads=(1, 2),
        num_classes=5,
        frames=5,
        image_size=40,
        window=(2, 4, 4),
        attention=attention,  # type: ignore[arg-type]  # one of the literals
        checkpoint_blocks=checkpoint_blocks,
        drop_path=0.1,
    ).train()


def real_parameters(attention: str) -> list[torch.nn.Parameter]:
    with torch.device("meta"):
        return list(small(attention).parameters())


def clips(batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.zeros(batch, 3, 5, 40, 40),)


@pytest.mark.parametrize(
    ("attention", "recomputed", "bf16"), [("eager", 3, False), ("eager", 3, True), ("sequential", 0, False)]
)
def test_fake_allocations_equal_real_ones(attention: str, recomputed: int, bf16: bool) -> None:
    """To the byte in fp32, with masks, padding, drop path and checkpointing.

    Under autocast the CPU's LayerNorm saves its statistics in bf16, while torch's fake kernel declares them fp32.
    """
    real = small(attention, recomputed)
    measured = [pass_memory(real, clips, batch, bf16=bf16) for batch in (1, 3)]
    with torch.device("meta"):
        planned = small(attention, recomputed)
    with without_memory(planned):
        counted = [pass_memory(planned, clips, batch, bf16=bf16) for batch in (1, 3)]
    for ours, real in zip(counted, measured, strict=True):
        assert ours == (pytest.approx(real, rel=0.005) if bf16 else real)
    small_pass, large_pass = measured
    assert large_pass.activations > 2 * small_pass.activations > 0
    # Gradients arrive while activations are freed.
    gradients = 4 * sum(parameter.numel() for parameter in real_parameters(attention))
    assert large_pass.activations < large_pass.together < large_pass.activations + gradients


def test_allocations_count_what_is_alive() -> None:
    given = torch.zeros(1000)
    with Allocations([given]) as allocations:
        doubled = given * 2
        view = doubled[:10]
        given.mul_(3)
        assert allocations.now == 4000
        tripled = torch.cat([doubled, doubled, doubled])
        del doubled
        assert allocations.now == 16_000  # the view keeps the storage alive
        del view
        assert (allocations.now, allocations.peak) == (12_000, 16_000)
    assert tripled.numel() == 3000


def test_memory_grows_linearly_beyond_the_measured_batch() -> None:
    model = small("eager")
    three, four, seven = (pass_memory(model, clips, batch, bf16=False).activations for batch in (3, 4, 7))
    assert seven == pytest.approx(four + 3 * (four - three), rel=0.01)


def test_recomputed_blocks_take_less_memory() -> None:
    recomputed, kept = (pass_memory(small("eager", blocks), clips, 3, bf16=False).activations for blocks in (4, 0))
    assert recomputed < 0.5 * kept


def test_a_gpu_is_planned_with_the_fused_kernel() -> None:
    """`auto` on a GPU, recomputed blocks included, takes less than keeping the logits for the backward pass."""
    # Windows of 64 tokens, whose logits are twice as large as their queries; those of 16 tokens would be half as large.
    values: dict[str, Any] = {"data": {"frames": None, "image_size": 64}, "window": 8, "checkpoint_blocks": 1}
    gpu = make_plan(config(engine={"device": "cuda"}, **values))
    eager = make_plan(config(engine={"device": "cuda"}, attention="eager", **values))
    assert gpu.device == "cuda"
    assert set(gpu.backends) == {"sdpa"}
    assert gpu.activations < eager.activations


@pytest.fixture(scope="module")
def plain() -> Plan:
    return make_plan(config(engine={"engine": "plain"}, attention="eager"), samples=100, classes=7)


def test_figures_of_a_run(plain: Plan) -> None:
    plan = plain
    with torch.device("meta"):
        model = vs.create_model("swinv2_nano", num_classes=7, frames=4, image_size=32, window=(2, 4, 4))
    parameters = sum(p.numel() for p in model.parameters())
    assert plan.parameters == parameters
    states = plan.states
    assert (states.weights, states.gradients, states.optimizer, states.averages, states.buffers) == tuple(
        4 * parameters * times for times in (1, 1, 2, 0, 0)
    )
    assert (plan.batch, plan.micro_batch, plan.accumulation) == (16, 2, 8)
    assert plan.steps == 12  # 2 epochs of 100 samples in batches of 16
    assert plan.steps_per_epoch == pytest.approx(6.25)
    # Eight micro-batches are accumulated, so all gradients exist while the next one passes.
    assert plan.peak == states.weights + states.optimizer + states.gradients + plan.activations + plan.process
    assert plan.checkpoint == 3 * 4 * parameters
    assert plan.files == 3 * plan.checkpoint + 2 * 4 * parameters  # two are kept, one is being written, best and last
    text = plan_text(plan, memory=plan.peak)
    assert f"{parameters:,} parameters" in text
    assert "fits" in text
    assert "does not fit" in plan_text(plan, memory=plan.peak - 1)


def states(engine: dict[str, Any], processes: int, *, ema: bool = False, accumulation: int = 1) -> StateMemory:
    """The states of 3.0 B parameters on a GPU, in two optimizer groups of 1 B and 2 B."""
    counts = count_parameters([[1_000_000_000], [2_000_000_000]], 3_000_000_000, processes, accumulation)
    return state_memory(config(engine={"device": "cuda", **engine}).engine, counts, ema=ema, device="cuda")


def test_zero_3_partitions_the_states_of_the_giant() -> None:
    """The paper's 3.0 B: its states need 60 GB on one device; 8 devices hold an eighth each."""
    alone, shared = states({"zero_stage": 1}, 1), states({"zero_stage": 3}, 8)
    assert alone.weights + alone.gradients + alone.optimizer == 60e9
    assert shared.weights + shared.gradients + shared.optimizer == 7.5e9


@pytest.mark.parametrize(
    ("engine", "expected"),
    [({"engine": "plain"}, 12e9), ({"zero_stage": 0}, 12e9), ({"zero_stage": 1}, 1.5e9), ({"zero_stage": 3}, 1.5e9)],
)
def test_the_size_of_averaged_weights(engine: dict[str, Any], expected: float) -> None:
    """Whole in the plain engine and ZeRO-0; from ZeRO-1 on the partition that a process updates."""
    processes = 1 if "engine" in engine else 8
    assert states(engine, processes).averages == 0
    assert states(engine, processes, ema=True).averages == expected


def test_offloaded_states_are_counted_on_the_host() -> None:
    counts = count_parameters([[3_000_000_000]], 3_000_000_000, 8, 1)
    peaks = {}
    for where in ("none", "cpu"):
        engine = config(engine={"device": "cuda", "zero_stage": 1, "offload_optimizer": where}).engine
        found = state_memory(engine, counts, ema=False, device="cuda")
        peaks[where] = step_peaks(found, PassMemory(0, 0), engine, counts, "cuda")["passes"]
        # Weights, both moments and gradients of the partition in fp32: 16 bytes for each of its parameters.
        assert found.host == (16 * 375_000_000 if where == "cpu" else 0)
    assert peaks["none"] - peaks["cpu"] == 16 * 375_000_000


def test_averages_frozen_stages_and_repeats_enter_the_plan(plain: Plan) -> None:
    optim = {"ema": 0.99, "frozen_stages": 2, "backbone_lr": 0.1}
    settings = config(engine={"engine": "plain"}, optim=optim, attention="eager")
    plan = make_plan(settings, samples=100, classes=7)
    assert 0 < plan.trained < plan.parameters == plain.parameters
    assert plan.states.averages == plan.states.gradients == 4 * plan.trained
    assert plan.checkpoint == 4 * plan.parameters + 3 * 4 * plan.trained
    assert plan.activations < plain.activations
    assert plan.pace.flops_per_sample < plain.pace.flops_per_sample
    assert {layer.name: layer.lr for layer in plan.layers} == {
        "all_layers_backbone": pytest.approx(1e-4),
        "all_layers_head": pytest.approx(1e-3),
    }
    assert sum(layer.parameters for layer in plan.layers) == plan.trained


CHECKPOINTS = """
import sys, tempfile, threading
from pathlib import Path
from torch import nn
from video_swinv2.config import EngineConfig
from video_swinv2.distributed.world import join_world, leave_world
from video_swinv2.engine import checkpoint
from video_swinv2.engine.base import StepSettings
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import parameter_groups
module = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(16)))
groups = parameter_groups(module, (1,), weight_decay=0.1)
settings = EngineConfig(**ENGINE, precision="fp32", device="cpu")
engine = make_engine(module, groups, settings, StepSettings(), join_world("cpu"), lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
engine.backward(engine.forward(torch.ones(1, 1000)).sum())
engine.step()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = kernel_bytes("VmRSS")
with tempfile.TemporaryDirectory() as folder:
    checkpoints = checkpoint.Checkpoints(Path(folder))
    for step in range(3):
        checkpoints.wait()
        checkpoints.save(engine.training_state(), {}, step=step)
    checkpoints.wait()
print(peak_memory_bytes() - before)
leave_world()
"""


@pytest.mark.parametrize("engine", [{"engine": "plain"}, {"zero_stage": 1}])
def test_one_checkpoint_is_held_in_host_memory_while_it_is_written(engine: dict[str, Any]) -> None:
    """Peak resident memory over three checkpoints, as the training loop saves them."""
    grown = run(CHECKPOINTS.replace("ENGINE", repr(engine)))[-1]
    parameters = 16_000_000
    counts = count_parameters([[1_000_000] * 16], parameters, 1, 1)
    gathered = gathering_memory(config(engine=engine).engine, counts)
    assert gathered == (4 * parameters if "zero_stage" in engine else 0)
    assert grown == pytest.approx(12 * parameters + gathered, rel=0.1)


def test_the_plan_names_host_and_shared_memory(plain: Plan) -> None:
    assert plain.checkpoint_host == plain.checkpoint
    partitioned = make_plan(config(attention="eager"), samples=100, classes=7)
    assert partitioned.checkpoint_host > partitioned.checkpoint
    # Two loaders of two workers with four micro-batches each, and the one in use: 2 clips of 4 frames of 32 x 32.
    assert plain.loader == 2 * (2 * 4 + 1) * 2 * 3 * 4 * 32 * 32
    assert "of shared memory (/dev/shm) per process" in plan_text(plain)


def test_layers_have_their_learning_rates() -> None:
    plan = make_plan(config(optim={"layer_decay": 0.5}, engine={"engine": "plain"}), samples=100, classes=7)
    assert [layer.name for layer in plan.layers] == [f"layer_{number:02d}" for number in range(10)]
    assert [layer.lr for layer in plan.layers] == pytest.approx([1e-3 * 0.5 ** (9 - n) for n in range(10)])
    assert "layer_00" in plan_text(plan)


def test_time_follows_from_the_speed_of_a_device(plain: Plan) -> None:
    assert plain.pace.hours is None
    assert "give --tflops" in plan_text(plain)
    plan = make_plan(config(engine={"engine": "plain"}, attention="eager"), samples=100, classes=7, tflops=0.001)
    pace = plan.pace
    assert pace.step_seconds == pytest.approx(16 * pace.flops_per_sample / 1e9)
    assert pace.hours == pytest.approx(12 * (pace.step_seconds or 0) / 3600)
    # Three forward passes, by the formula instead of the counter, hence without the log-CPB networks.
    assert 0.6 < pace.flops_per_sample / (3 * 2e9 * plan.giga_macs) <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_is_planned_as_it_is() -> None:
    """With the memory that a run reports there, the resident size, and with the time that its CPU takes."""
    plan = make_plan(config(engine={"device": "auto", "engine": "plain"}), samples=100, classes=7, measuring=True)
    assert plan.device == "cpu"
    assert plan.pace.hours is not None
    assert plan.peak == max(plan.moments.values()) + plan.process
    text = plan_text(plan)
    assert "planned for the CPU; engine.device=cuda plans for GPUs" in text
    assert re.search(r"^process +0\.\d+$", text, re.MULTILINE)
    assert "training: " in text
    gpu = make_plan(config(engine={"device": "cuda", "engine": "plain"}), samples=100, classes=7)
    assert (gpu.device, gpu.process) == ("cuda", 0)
    assert "planned for" not in plan_text(gpu)


def test_a_step_that_holds_more_than_the_data_set_is_a_problem(plain: Plan) -> None:
    settings = config(engine={"engine": "plain"}, attention="eager")
    plan = make_plan(settings, samples=15, classes=7)
    (line,) = shortfalls(plan, settings, None)
    assert line.startswith("batch: a step of 16 samples holds more than the 15 of an epoch")
    assert shortfalls(make_plan(settings, samples=16, classes=7), settings, None) == []


def test_times_are_told_in_units_that_people_use() -> None:
    plan = make_plan(config(engine={"engine": "plain"}, attention="eager"), samples=100, classes=7, tflops=0.001)
    pace = dataclasses.replace(plan.pace, step_seconds=13.25, hours=0.0441)
    text = plan_text(dataclasses.replace(plan, pace=pace))
    assert "a step: 13.2 s at" in text
    assert "training: 2 min 39 s; validation" in text
    pair = plan_text(dataclasses.replace(plan, pace=pace, processes=2))
    assert "training: 2 min 39 s, 5 min 18 s of device time; validation" in pair


def test_what_does_not_fit_comes_with_a_fix(plain: Plan, tmp_path: Path) -> None:
    settings = config(engine={"engine": "plain"}, attention="eager")
    assert shortfalls(plain, settings, plain.peak) == []
    (line,) = shortfalls(plain, settings, plain.peak - 1)
    assert line.startswith("memory: ")
    assert "optim.micro_batch" in line or "engine.zero_stage=3" in line


def test_the_workers_needed_follow_from_measured_reading(write_video: Any, tmp_path: Path) -> None:
    """A data set of one video, and a device too fast for one worker."""
    import numpy as np

    write_video(tmp_path / "videos" / "a.mp4", np.zeros((30, 64, 64, 3), np.uint8))
    (tmp_path / "train.csv").write_text("path,label\nvideos/a.mp4,still\n")
    settings = config(
        engine={"engine": "plain"},
        data={"source": str(tmp_path), "workers": 1},
        optim={"batch": 1, "micro_batch": 1},
        attention="eager",
    )
    plan = make_plan(settings, tflops=100.0, measuring=True)
    assert plan.samples == 1
    assert plan.pace.read is not None
    assert plan.pace.read.per_second > 0
    assert plan.pace.workers_needed is not None
    assert plan.pace.workers_needed > 1
    (line,) = shortfalls(plan, settings, None)
    assert f"data.workers={plan.pace.workers_needed}" in line


def test_pretraining_has_a_decoder_and_masks(plain: Plan) -> None:
    masked = make_plan(config(data={"frames": None, "image_size": 64}, window=4), pretraining=True)
    assert masked.parameters > plain.parameters
    assert masked.activations > 0


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "out: runs/a\ninit: scratch\nmodel: {name: swinv2_nano, window: 4}\ndata: {source: nowhere, image_size: 32}\n"
        "optim: {epochs: 1, lr: 1.e-3, batch: 8, micro_batch: 4}\nengine: {engine: plain, device: cpu}\n"
    )
    arguments = ["plan", str(file), "--samples", "80", "--classes", "3", "--json"]
    assert main([*arguments, "--quick", "--memory", "0.01GB"]) == 1, "it does not fit"
    answer = json.loads(capsys.readouterr().out)
    assert answer["problems"][0].startswith("memory: ")
    assert answer["steps"] == 10
    assert answer["activations"] > 0
    assert main(["plan", str(file), "--processes", "2"]) == 2
    assert "--processes" in capsys.readouterr().err
    with pytest.raises(UsageError, match="multiple of 3"):
        make_plan(config(), processes=3)


GROWTH = """
import torch, video_swinv2 as vs
from video_swinv2.memory import kernel_bytes, peak_memory_bytes
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.plan.activation_memory import pass_memory
"""


def run(script: str) -> list[float]:
    """The numbers that the script prints in a fresh process, whose peak memory is therefore the script's own."""
    # With this threshold freed memory returns to the system at once, so resident memory is memory in use.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", GROWTH + script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [float(number) for number in done.stdout.split()]


@pytest.mark.slow
def test_peak_of_a_process_is_near_the_plan() -> None:
    """The resident memory that a forward and backward pass adds on a CPU, within 10 %."""
    counted, grown = run(
        "m = vs.create_model('swinv2_tiny', num_classes=5, frames=8, image_size=112, attention='eager').train()\n"
        "clips = lambda n: (torch.zeros(n, 3, 8, 112, 112),)\n"
        "pass_memory(m, lambda n: (torch.zeros(n, 3, 2, 32, 32),), 1, bf16=False)\n"
        "before = kernel_bytes('VmRSS')\n"
        "counted = pass_memory(m, clips, 4, bf16=False).together\n"
        "print(counted, peak_memory_bytes() - before)\n"
    )
    assert grown == pytest.approx(counted, rel=0.1)


@pytest.mark.slow
def test_a_giant_with_few_blocks_steps_in_the_planned_memory() -> None:
    """The paper's 3.0 B at its true widths, 512 to 4096, one block per stage: 5 GB of states."""
    parameters, grown, counted, first, second = run(
        "from video_swinv2.config import EngineConfig\n"
        "from video_swinv2.engine.base import StepSettings\n"
        "from video_swinv2.engine.factory import make_engine\n"
        "from video_swinv2.engine.optimizer import parameter_groups\n"
        "from video_swinv2.distributed.world import World\n"
        "before = kernel_bytes('VmRSS')\n"
        "m = SwinV2(embed_dim=512, depths=(1, 1, 1, 1), num_heads=(16, 32, 64, 128), extra_norm_every=1,\n"
        "           num_classes=10, frames=4, image_size=64, window=(2, 4, 4), checkpoint_blocks=4).train()\n"
        "x, y = torch.randn(2, 3, 4, 64, 64), torch.tensor([3, 7])\n"
        "groups = parameter_groups(m, m.depths, weight_decay=0.05)\n"
        "config = EngineConfig(engine='plain', precision='fp32')\n"
        "world = World(0, 1, 0, torch.device('cpu'))\n"
        "step = StepSettings(clip_norm=1.0)\n"
        "engine = make_engine(m, groups, config, step, world, lr=1e-4, betas=(0.9, 0.999), eps=1e-8)\n"
        "losses = []\n"
        "for _ in range(2):\n"
        "    loss = torch.nn.functional.cross_entropy(engine.forward(x), y)\n"
        "    engine.backward(loss); losses.append(loss.item()); engine.step()\n"
        "grown = peak_memory_bytes() - before\n"
        "counted = pass_memory(m, lambda n: (x,), 2, bf16=False).activations\n"
        "print(sum(p.numel() for p in m.parameters()), grown, counted, *losses)\n"
    )
    states = 4 * 4 * parameters  # weights, gradients, two moments
    assert parameters > 3e8
    assert second < first
    assert grown == pytest.approx(states + counted, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "zero_stage", "processes"),
    [("swinv2_tiny", None, 1), ("swinv2_tiny", 1, 2), ("swinv2_small", None, 1), ("swinv2_small", 1, 2)],
)
def test_the_plan_is_near_the_measured_peak(
    name: str, zero_stage: int | None, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps with the engines that `train` uses, in fresh processes: peak resident memory within 10 %."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed memory returns to the system at once
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine = {"engine": "plain"} if zero_stage is None else {"zero_stage": zero_stage}
    settings = config(
        engine=engine,
        data={"frames": 8, "image_size": 112},
        optim={"batch": 2 * processes, "micro_batch": 2},
        name=name,
        window=(8, 7, 7),
        drop_path=0.1,
    )
    plan = make_plan(settings, processes=processes, samples=100, classes=400)
    work = Workload(name, 8, 112, (8, 7, 7), 2, processes, "cpu", "fp32", rounds=1, threads=1)
    measured = run_setup(work, TrainingSetup("measured", zero_stage=zero_stage))
    assert plan.peak - plan.process == pytest.approx(measured["peak_bytes"], rel=0.1)


def test_the_default_micro_batch_is_the_largest_that_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 samples on two processes: 12, 6, 4, 3, 2 or 1 at a time, but with repeats never less than all of a clip."""

    def settings(micro_batch: int | None = None, repeats: int = 1) -> Config:
        optim = {"batch": 24, "micro_batch": micro_batch}
        made = config(optim=optim, data={"workers": 1, "image_size": 64, "frames": 8}, attention="eager")
        return dataclasses.replace(made, augment=dataclasses.replace(made.augment, repeats=repeats))

    def planned(memory: int | None, repeats: int = 1) -> tuple[int, int]:
        plan = make_plan(settings(repeats=repeats), processes=2, memory=memory)
        return plan.micro_batch, plan.accumulation

    def just_enough(micro_batch: int) -> int:
        plan = make_plan(settings(micro_batch), processes=2)
        return int((plan.peak + loaders_bytes(settings().data, micro_batch)) / MEMORY_SHARE) + 1

    twelve, four = just_enough(12), just_enough(4)
    assert planned(twelve) == (12, 1)
    assert planned(twelve - 2) == (6, 2)
    assert planned(10**8) == (1, 12)
    assert planned(10**8, repeats=3) == (3, 4)

    monkeypatch.setattr(module, "memory_here", lambda device, processes: four if processes == 2 else None)
    chosen, words = plan_micro_batch(settings(), 2)
    assert chosen == 4
    assert re.fullmatch(r"planned: it needs \d\.\d GB of the \d\.\d GB of each process", words)
    chosen, words = plan_micro_batch(settings(), 1)
    assert (chosen, words.partition(" as ")[2]) == (24, "the memory of the device is unknown")
    monkeypatch.setattr(module, "memory_here", lambda device, processes: 10**8)
    with pytest.raises(UserError, match=r"memory: even micro-batches of 1 need .* GB of the 0\.1 GB of each process"):
        plan_micro_batch(settings(), 2)


def test_plan_chooses_the_micro_batch_for_the_memory_that_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(
        "out: x\ninit: scratch\nmodel: {name: swinv2_nano}\ndata: {source: absent, image_size: 64, workers: 0}\n"
        "optim: {epochs: 1, lr: 1.e-3, batch: 64}\nengine: {engine: plain, device: cuda}\n"
    )
    sizes = []
    for memory in ("1000GB", "0.1GB"):
        main(["plan", str(tmp_path / "a.yaml"), "--memory", memory, "--quick", "--json"])
        sizes.append(json.loads(capsys.readouterr().out)["micro_batch"])
    assert sizes[0] == 64
    assert 1 <= sizes[1] < 64
