"""The timetable of a run in optimizer steps: how long it is, when it validates, draws pictures and ends early.

The config gives these durations in epochs. An epoch is one pass over the training samples, where each repeat of
`augment.repeats` counts as a sample. It is rarely a whole number of steps, so durations have to be rounded; the
rounding is done in this file and nowhere else. (Warm-up and milestones of the learning rate belong to
`engine.optimizer.make_schedule`.)
"""

from __future__ import annotations

from dataclasses import dataclass

from video_swinv2.config import Config


@dataclass(frozen=True)
class Cadence:
    """What is due at which step.

    Every decision depends only on the step and on values that checkpoints keep (the best validation and its step), so
    a resumed run makes the same decisions as one that was never interrupted.
    """

    steps: int
    """Optimizer steps of the whole run."""
    validation_steps: int
    """Steps from one validation to the next."""
    picture_validations: int
    """A picture is drawn at every validation whose number is a multiple of this."""
    patience_steps: float | None
    """The run ends early after this many steps without a better validation; None to never end early."""

    def validates_at(self, step: int) -> bool:
        """Whether the run validates after `step` steps. It always does after the last one."""
        return step == self.steps or step % self.validation_steps == 0

    def draws_at(self, step: int) -> bool:
        """Whether the validation after `step` steps draws a picture; step 0 is the validation before training."""
        # The quotient is the number of the validation, 0 for the one before training, which therefore always draws.
        return step == self.steps or step // self.validation_steps % self.picture_validations == 0

    def is_stale(self, step: int, best: float | None, improved_step: int) -> bool:
        """Whether the run should end early at `step`, as the last improvement, at `improved_step`, is too long ago.

        Without a validation split `best` stays None, and the run never ends early.
        """
        if self.patience_steps is None or best is None or step >= self.steps:
            return False
        return step - improved_step >= self.patience_steps


def total_steps(config: Config, samples: int) -> int:
    """Optimizer steps of a run whose epoch has `samples` samples; at least one."""
    return max(1, round(config.optim.epochs * samples / config.optim.batch))


def make_cadence(config: Config, samples: int) -> Cadence:
    """The cadence of a run whose epoch has `samples` samples."""
    batch, patience = config.optim.batch, config.early_stop_epochs
    return Cadence(
        steps=total_steps(config, samples),
        validation_steps=max(1, round(config.val_epochs * samples / batch)),
        # Pictures are drawn during validations, so their interval is rounded to whole validations. Without
        # pictures_epochs the quotient is 0, and the maximum makes it every validation.
        picture_validations=max(1, round((config.pictures_epochs or 0.0) / config.val_epochs)),
        # Not rounded, because is_stale only compares it with a number of steps.
        patience_steps=None if patience is None else patience * samples / batch,
    )
