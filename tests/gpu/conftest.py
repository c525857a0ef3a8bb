"""What the GPU tests share: the device, precise fp32, and a line of JSON per result for `python -m tests.gpu`.

GPU_TEST_DEVICE=cpu runs the tests at small sizes on the CPU, which proves the tests themselves. Without it and without
a GPU they are skipped; REQUIRE_GPU=1 turns that into a failure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.evaluation.conftest import data, model_path  # noqa: F401 - fixtures, of which test_testing.py makes use

WHY_SKIPPED = "no GPU here; `make gpu` runs these tests on a machine with one, GPU_TEST_DEVICE=cpu at small sizes here"


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """The device under test. Requested by all tests, before any other fixture."""
    name = os.environ.get("GPU_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        if os.environ.get("REQUIRE_GPU") == "1":
            pytest.fail("REQUIRE_GPU=1, and PyTorch sees no GPU")
        pytest.skip(WHY_SKIPPED)
    # TF32 has 10 bits of mantissa, like fp16. The comparisons in fp32 are of the code and not of that.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


@pytest.fixture(autouse=True)
def _no_ranks() -> Iterator[None]:
    """Undo what joining a group leaves in the environment: a later DeepSpeed would take the CPU for its accelerator."""
    names = ("DS_ACCELERATOR", "LOCAL_RANK")
    for name in names:
        os.environ.pop(name, None)
    yield
    for name in names:
        os.environ.pop(name, None)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device of a test that means nothing on a CPU."""
    if device.type != "cuda":
        pytest.skip("needs a GPU itself")
    return device


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"], scope="module")
def processes(request: pytest.FixtureRequest, device: torch.device) -> int:
    """How many processes take part, with a GPU each. On CPUs the tests of the engines themselves have two."""
    if (torch.cuda.device_count() if device.type == "cuda" else 1) < request.param:
        pytest.skip("needs two GPUs")
    return int(request.param)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a finished test to the file of GPU_ROWS, at once: a later crash or time limit loses nothing."""
    file = os.environ.get("GPU_ROWS")
    # With xdist the workers call this too, and then the main process for each of their reports.
    if not file or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    row |= dict(report.user_properties)
    if report.failed:
        row["why"] = report.longreprtext[-2000:]
    elif report.skipped and isinstance(report.longrepr, tuple):
        row["why"] = report.longrepr[2]
    with Path(file).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
