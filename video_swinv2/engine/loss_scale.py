"""The loss scale of fp16: small gradients would become zero in it, so the loss is multiplied before the backward pass.

Its course depends on nothing but which steps were applied, on which all processes agree; so all hold the same scale.
DeepSpeed's own, torch's GradScaler inside its ``torch_autocast``, is switched off: at ZeRO 1-3 it is not updated when a
step overflows, so the first overflow is the end, and norms and clipping are those of the scaled gradients.
"""

from __future__ import annotations

# torch.amp.GradScaler's defaults.
FIRST_SCALE = 2.0**16
GROWTH, BACKOFF = 2.0, 0.5
STEADY_STEPS = 2000


class LossScale:
    """``scale`` multiplies the loss: halved by a step that overflows, doubled after 2000 in a row that do not."""

    def __init__(self) -> None:
        self.scale = FIRST_SCALE
        self.steady = 0

    def update(self, applied: bool) -> bool:
        """Take note of a step; whether one that was not applied may have been because of the scale, which then fell.

        At a scale of 1 there is nothing to lower: such a step is as faulty as one in fp32.
        """
        if applied:
            self.steady += 1
            if self.steady == STEADY_STEPS:
                self.scale, self.steady = self.scale * GROWTH, 0
            return False
        fell = self.scale > 1.0
        self.scale, self.steady = max(1.0, self.scale * BACKOFF), 0
        return fell

    def state(self) -> tuple[float, int]:
        """What a checkpoint keeps of it."""
        return self.scale, self.steady

    def restore(self, state: tuple[float, int] | None) -> None:
        """Go on from a checkpoint; from one without a scale (another precision) begin anew."""
        self.scale, self.steady = state or (FIRST_SCALE, 0)
