"""The engines over NCCL: every ZeRO stage beside the plain engine, half precisions, resumption, offloading.

The workers and their cases are those of tests/engine; here they run on GPUs, in one process and in two where there are
two GPUs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine import engine_modes_worker, engine_worker
from tests.engine.engine_modes_worker import OFFLOADED
from tests.engine.harness import SINGLE, STAGES, identical, largest_difference, read_outcome, run_workers, train_plain
from video_swinv2.distributed.world import World
from video_swinv2.engine.gradients import INITIAL_SCALE

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("engines")]


@pytest.fixture(scope="module")
def outcomes(processes: int, device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the outcomes of all cases."""
    folder = tmp_path_factory.mktemp("engines")
    run_workers(Path(engine_worker.__file__), folder, "parity,resume,bf16,averaged", processes, device.type)
    run_workers(Path(engine_modes_worker.__file__), folder, "fp16,offloaded", processes, device.type)
    return folder


@pytest.fixture(scope="module")
def alone(device: torch.device) -> World:
    """This process on the first device."""
    index = 0 if device.type == "cuda" else None
    return World(rank=0, size=1, local_rank=0, device=torch.device(device.type, index))


def test_the_plain_engine_is_that_of_the_cpu(alone: World) -> None:
    """Losses and gradient norms of the first steps; Adam makes weights differ more, where gradients are near zero."""
    (_, ours), (_, expected) = train_plain(world=alone), train_plain(world=SINGLE)
    for key in ("loss", "norm"):
        torch.testing.assert_close([r[key] for r in ours], [r[key] for r in expected], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_as_the_plain_engine(outcomes: Path, alone: World, stage: int, accumulation: int) -> None:
    reference, expected = train_plain(world=alone)
    found, records = read_outcome(outcomes, f"parity-{stage}-{accumulation}")
    assert all(record["applied"] for record in records)
    for key in ("loss", "norm"):
        torch.testing.assert_close([r[key] for r in records], [r[key] for r in expected], rtol=1e-3, atol=1e-5)
    assert largest_difference(found, reference) < 1e-2


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(outcomes: Path, stage: int) -> None:
    straight, records = read_outcome(outcomes, f"parity-{stage}-1")
    resumed, later = read_outcome(outcomes, f"resume-{stage}-{stage}")
    assert identical(resumed, straight)
    assert later == records[2:]
    straight, _ = read_outcome(outcomes, f"straight-averaged-{stage}")
    resumed, _ = read_outcome(outcomes, f"resumed-averaged-{stage}")
    assert identical(resumed, straight), "with averaged weights"


@pytest.mark.parametrize("stage", STAGES)
def test_half_precisions_stay_near_fp32(outcomes: Path, alone: World, stage: int) -> None:
    """bf16 without and fp16 with a loss scale, which must fall before the first step is taken."""
    bf16, records = read_outcome(outcomes, f"bf16-{stage}-1")
    _, expected = train_plain(world=alone, clip_norm=None)
    torch.testing.assert_close([r["loss"] for r in records], [r["loss"] for r in expected], rtol=0.02, atol=0)
    assert all(tensor.dtype == torch.float32 for tensor in bf16.weights.values() if tensor.is_floating_point())

    fp16, records = read_outcome(outcomes, f"fp16-{stage}")
    lost = [record for record in records if not record["applied"]]
    assert lost, "the first scale must be too large here"
    assert all(record["rescaled"] for record in lost)
    assert fp16.loss_scale is not None
    assert fp16.loss_scale[0] == INITIAL_SCALE / 2 ** len(lost)
    applied = [record for record in records if record["applied"]]
    _, expected = train_plain(world=alone)
    for key in ("loss", "norm"):
        torch.testing.assert_close([r[key] for r in applied], [r[key] for r in expected], rtol=0.02, atol=0)
    resumed, _ = read_outcome(outcomes, f"fp16-resumed-{stage}")
    assert identical(resumed, fp16)


@pytest.mark.parametrize("name", OFFLOADED)
def test_offloading_does_not_change_what_is_learned(outcomes: Path, alone: World, name: str) -> None:
    reference, expected = train_plain(world=alone, ema=0.6)
    found, records = read_outcome(outcomes, f"offloaded-{name}")
    assert [record["applied"] for record in records] == [True, True, False, True, True]
    del records[2]
    for key in ("loss", "norm"):
        torch.testing.assert_close([r[key] for r in records], [r[key] for r in expected], rtol=1e-3, atol=1e-5)
    assert largest_difference(found, reference) < 1e-2
    resumed, _ = read_outcome(outcomes, f"offloaded-resumed-{name}")
    assert identical(resumed, found)
