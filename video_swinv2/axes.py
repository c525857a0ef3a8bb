"""Round numbers for the axes of plots on pages."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """A number on an axis and where it stands, 0 to 1."""

    text: str
    place: float


def ticks(low: float, high: float, unit: str = "", most: int = 5) -> tuple[Tick, ...]:
    """Round numbers from `low` to `high`, about `most` steps apart at the closest."""
    raw = (high - low) / most
    if raw <= 0:
        return (Tick(f"{low:.6g}{unit}", 0.5),)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(
        Tick(f"{place * step:.6g}{unit}", min(1.0, max(0.0, (place * step - low) / (high - low))))
        for place in range(first, last + 1)
    )
