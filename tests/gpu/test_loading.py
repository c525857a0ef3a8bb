"""Loaders that copy to page-locked memory, as training on a GPU does, and a worker that is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.data.test_loading import clips, die, disturb, samples  # noqa: F401 - `clips` is a fixture
from video_swinv2.data.loading import plan_batch, training_loader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator"),
]


def read(folder: Path, workers: int) -> tuple[list[torch.Tensor], int]:
    """The pixels of eight batches, and how often workers were restarted."""
    loader = training_loader(samples(folder, workers), plan_batch(4, 2, 1), seed=0, rank=0, first=0, last=4, pin=True)
    return [batch.pixels for batch in loader], loader.restarts


def test_a_killed_worker_is_replaced_under_pinned_memory(
    clips: Path,  # noqa: F811 - the fixture
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, _ = read(clips, 0)
    once = tmp_path / "died"

    def die_once() -> None:
        if not once.exists():
            once.touch()
            die()

    disturb(monkeypatch, "3.mp4", die_once)
    found, restarts = read(clips, 2)
    assert restarts == 1
    assert all(pixels.is_pinned() == (device.type == "cuda") for pixels in found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
