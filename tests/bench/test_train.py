"""The training benchmark with a small model: every setup runs or says why not, and its figures are printed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from video_swinv2.bench import train as bench
from video_swinv2.bench.train import TrainingSetup, Workload, training_setups, training_table
from video_swinv2.distributed.world import World
from video_swinv2.engine.plain import PlainEngine
from video_swinv2.errors import UsageError

WORK = Workload("swinv2_tiny", 2, 32, (8, 7, 7), 1, 1, "cpu", "fp32", rounds=1, threads=1)


def test_what_is_compared() -> None:
    """Ours under each engine, compiled and not, between two runs of torchvision's."""
    alone, several = training_setups(1), training_setups(8)
    assert (alone[0].peer, alone[-1].peer) == (True, True)
    assert {way.zero_stage for way in alone if not way.peer} == {None, 0, 1, 2, 3}
    assert {way.zero_stage for way in several} == {0, 1, 2, 3}, "the plain engine supports one process only"
    assert [way.name for way in several if way.compiled] == ["ZeRO-1, compiled"]


def test_a_step_of_ours_and_of_torchvisions() -> None:
    result = bench.bench_train(WORK, [TrainingSetup("torchvision", peer=True), TrainingSetup("plain")])
    peer, ours = result["rows"]
    for row in (peer, ours):
        # Gradients and two moments of 28 million weights.
        assert 3 * 4 * 27e6 < row["peak_bytes"] < 4e9
        assert row["clips_per_second"] == pytest.approx(1 / row["step_seconds"])
        assert row["tflops"] > 0
    text = training_table(result)
    assert "swinv2_tiny and torchvision swin3d_t: 1 clips of 2x32x32" in text
    row = next(line for line in text.splitlines() if line.startswith("| plain"))
    assert f" {ours['clips_per_second']:.3g} |" in row
    json.dumps(result)


def test_both_models_get_the_same_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a model draws from the global generator, ours and torchvision's different amounts."""
    seen: list[tuple[torch.Tensor, ...]] = []
    forward = PlainEngine.forward

    def watched(engine: PlainEngine, *inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs)
        return forward(engine, *inputs)

    monkeypatch.setattr(PlainEngine, "forward", watched)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    for setup in (TrainingSetup("torchvision", peer=True), TrainingSetup("plain")):
        bench.measure_steps(WORK, setup, world)
    clips = [inputs[0] for inputs in seen if inputs[0].ndim == 5]
    assert len(clips) == 2 * (bench.WARM_UP_STEPS + WORK.rounds)
    assert all(torch.equal(each, clips[0]) for each in clips)


def test_counted_operations_of_both_models() -> None:
    """With 32 frames at 224 pixels both have Video Swin's published 87.9 GMAC; the log-CPB networks add little."""
    work = dataclasses.replace(WORK, frames=32, pixels=224)
    ours, peer = (bench.forward_flops(work, kind) / 2e9 for kind in (False, True))
    assert peer == pytest.approx(87.76, rel=0.01)
    assert ours == pytest.approx(87.8, rel=0.02)


def test_a_setup_that_cannot_run_says_why() -> None:
    result = bench.bench_train(WORK, [TrainingSetup("ZeRO-3, compiled", zero_stage=3, compiled=True)])
    assert "recompiles" in result["rows"][0]["not_run"]
    text = training_table(result)
    assert "| ZeRO-3, compiled | not run |" in text
    assert f"ZeRO-3, compiled: not run: {result['rows'][0]['not_run']}" in text


def test_wrong_requests() -> None:
    with pytest.raises(UsageError, match="torchvision has no model of this size"):
        bench.bench_train(dataclasses.replace(WORK, model="swinv2_giant"))
    with pytest.raises(UsageError, match="GPUs"):
        bench.bench_train(dataclasses.replace(WORK, device="cuda", processes=torch.cuda.device_count() + 1))


@pytest.mark.slow
def test_every_setup_runs() -> None:
    result = bench.bench_train(WORK)
    assert [row["way"] for row in result["rows"] if "not_run" in row] == []
