"""When a run validates, draws and ends early: durations in epochs become steps."""

from __future__ import annotations

from typing import Any

import pytest

from tests.training.runs import small_config
from video_swinv2.training.cadence import Cadence, make_cadence


def cadence(samples: int, optim: dict[str, Any], **changes: Any) -> Cadence:
    return make_cadence(small_config(optim=optim, **changes), samples)


def test_steps_of_a_run() -> None:
    """Ten samples in batches of four are two and a half steps an epoch; validations are rounded to whole steps."""
    found = cadence(10, {"epochs": 4, "batch": 4, "micro_batch": 4})
    assert found.steps == 10
    assert [step for step in range(1, 11) if found.validates_at(step)] == [2, 4, 6, 8, 10]
    assert cadence(1, {"epochs": 0.1, "batch": 4, "micro_batch": 4}).steps == 1


def test_the_last_step_always_validates_and_draws() -> None:
    found = cadence(12, {"epochs": 4, "batch": 4, "micro_batch": 4}, val_epochs=3, pictures_epochs=6)
    assert [step for step in range(1, 13) if found.validates_at(step)] == [9, 12]
    assert [step for step in (0, 9, 12) if found.draws_at(step)] == [0, 12]


@pytest.mark.parametrize(
    ("patience", "best", "step", "stale"),
    [
        (2.0, 0.5, 9, False),  # the best validation was at step 4, and an epoch has three steps
        (2.0, 0.5, 10, True),
        (2.0, 0.5, 30, False),  # the run is over anyway
        (2.0, None, 10, False),  # no validation split
        (None, 0.5, 29, False),
    ],
)
def test_a_run_is_stale_after_its_patience(patience: float | None, best: float | None, step: int, stale: bool) -> None:
    found = cadence(12, {"epochs": 10, "batch": 4, "micro_batch": 4}, early_stop_epochs=patience)
    assert found.is_stale(step, best, improved_step=4) == stale
