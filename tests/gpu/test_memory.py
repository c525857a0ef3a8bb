"""What `plan` predicts for a GPU beside the peak that training has there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.plan.test_plan import config
from video_swinv2.bench.train import CLASSES, TrainingSetup, Workload, run_setup
from video_swinv2.plan.plan import make_plan

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("name", "zero_stage"),
    [("swinv2_tiny", None), ("swinv2_small", None), ("swinv2_base", None), ("swinv2_base", 1), ("swinv2_base", 3)],
)
def test_the_plan_is_near_the_measured_peak(
    name: str, zero_stage: int | None, device: torch.device, record_property: Callable[..., None]
) -> None:
    """Three steps in bf16 with the engines that `train` uses, in a fresh process: the most allocated within 10 %."""
    if device.type == "cpu" and (name, zero_stage) != ("swinv2_tiny", None):
        pytest.skip("on a CPU the smallest shows that the test works")
    frames, pixels, clips, precision = (32, 224, 4, "bf16") if device.type == "cuda" else (2, 32, 2, "fp32")
    engine = {"engine": "plain"} if zero_stage is None else {"zero_stage": zero_stage}
    settings = config(
        engine={"device": device.type, "precision": precision, **engine},
        data={"frames": frames, "image_size": pixels},
        optim={"batch": clips, "micro_batch": clips},
        name=name,
        window=(8, 7, 7),
        drop_path=0.1,
    )
    plan = make_plan(settings, samples=100, classes=CLASSES)
    work = Workload(name, frames, pixels, (8, 7, 7), clips, 1, device.type, precision, rounds=1, threads=1)
    measured = run_setup(work, TrainingSetup("measured", zero_stage=zero_stage))
    assert "not_run" not in measured, measured["not_run"]
    record_property("planned_bytes", plan.peak)
    record_property("measured_bytes", measured["peak_bytes"])
    # On a CPU the resident memory includes freed memory that malloc keeps; tests/plan measures there with more care.
    assert plan.peak - plan.process == pytest.approx(measured["peak_bytes"], rel=0.1 if device.type == "cuda" else 0.5)
