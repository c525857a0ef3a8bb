"""When things happen in a run: its length, validations, pictures and the early end, all in optimizer steps.

The config speaks of epochs. An epoch is every training sample once, with each repeat of `augment.repeats` counted, and
seldom a whole number of steps; durations are rounded to steps here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

from video_swinv2.config import Config


@dataclass(frozen=True)
class Cadence:
    """Decides by the step alone, so that a resumed run decides as the uninterrupted one would have."""

    steps: int
    """Length of the run."""
    validation_steps: int
    """Steps between two validations."""
    picture_validations: int
    """Validations from one picture to the next."""
    patience_steps: float | None
    """Steps without a better validation after which the run ends early; None for never."""

    def validates_at(self, step: int) -> bool:
        """Whether a validation follows the step with this number, counted from 1; the last step has one always."""
        return step == self.steps or step % self.validation_steps == 0

    def draws_at(self, step: int) -> bool:
        """Whether the validation at this step, 0 for the one before training, draws a picture."""
        return step == self.steps or step // self.validation_steps % self.picture_validations == 0

    def is_stale(self, step: int, best: float | None, best_step: int) -> bool:
        """Whether the best validation lies so far back that the run ends early; never without a validation split."""
        if self.patience_steps is None or best is None or step >= self.steps:
            return False
        return step - best_step >= self.patience_steps


def total_steps(config: Config, samples: int) -> int:
    """Optimizer steps of a run over a training split of `samples`, at least one."""
    return max(1, round(config.optim.epochs * samples / config.optim.batch))


def make_cadence(config: Config, samples: int) -> Cadence:
    """The cadence of a run over a training split of `samples`."""
    batch, patience = config.optim.batch, config.early_stop_epochs
    return Cadence(
        steps=total_steps(config, samples),
        validation_steps=max(1, round(config.val_epochs * samples / batch)),
        # Pictures belong to validations, so a period between two of them is rounded to whole validations.
        picture_validations=max(1, round((config.pictures_epochs or 0.0) / config.val_epochs)),
        patience_steps=None if patience is None else patience * samples / batch,
    )
