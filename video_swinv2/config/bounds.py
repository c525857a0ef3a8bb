"""The types of the configuration's values, each with the bounds within which a value makes sense.

Without an upper bound, a slip of the keyboard is accepted and fails hours later, or with a traceback: in NumPy, which
takes seeds below 2^32, in a timer, or for lack of memory. The bounds are far from any value of use. Numbers are finite
(`STRICT`).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

# An unknown key is an error, and so are infinity and NaN. The texts below the keys become their descriptions, which
# `video-swinv2 config` prints.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

MAX_COUNT = 10**6
MAX_PIXELS = 10**4  # and frames
MAX_FACTOR = 1000.0
MIN_FACTOR = 1e-12  # smaller ones are 0 in float32, which torch.distributions refuses
WEEK_SECONDS = 7 * 24 * 3600.0

Fraction01 = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A share, or a decay, of less than all."""


def _refuse_tiny(value: float) -> float:
    if 0 < value < MIN_FACTOR:
        raise ValueError(f"is neither 0 nor at least {MIN_FACTOR:g}")
    return value


Factor = Annotated[float, Field(ge=0, le=MAX_FACTOR), AfterValidator(_refuse_tiny)]
"""A rate, a strength or a width of noise; 0 disables what it is of."""
PositiveFactor = Annotated[float, Field(ge=MIN_FACTOR, le=MAX_FACTOR)]
Epochs = Annotated[float, Field(ge=1e-6, le=MAX_COUNT)]
Minutes = Annotated[float, Field(ge=0, le=MAX_COUNT)]
Seconds = Annotated[float, Field(gt=0, le=WEEK_SECONDS)]

Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Workers = Annotated[int, Field(ge=0, le=1000)]
"""Processes that read data."""
Pixels = Annotated[int, Field(ge=1, le=MAX_PIXELS)]
"""Pixels, frames or tokens along one axis."""
PictureSize = Annotated[int, Field(ge=1, le=2**30)]
"""Pixels of a picture, height times width."""
Size = Pixels | Annotated[tuple[Pixels, ...], Field(min_length=1, max_length=3)]
"""One number for all axes, or one per axis: (H, W) or (T, H, W)."""
Normaliser = tuple[Annotated[tuple[Pixels, ...], Field(min_length=2, max_length=3)], ...]
"""The window sizes by which log-CPB divides offsets, of each stage."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""NumPy's old generator, which other libraries draw from, takes no larger one."""


def _refuse_null(text: str) -> str:
    if "\0" in text:
        raise ValueError("has a null character")
    return text


Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_refuse_null)]
"""A name or a path: not empty, and without the null character, which no path can have."""


def _refuse_reversed(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("the first number is larger than the second")
    return values


Share = Annotated[float, Field(gt=0, le=1)]
Shares = Annotated[tuple[Share, Share], AfterValidator(_refuse_reversed)]
"""The smallest and the largest share."""
PixelRange = Annotated[tuple[Pixels, Pixels], AfterValidator(_refuse_reversed)]
HeadChannels = Annotated[int, Field(ge=1, le=2**14)]
Ratio = Annotated[float, Field(ge=0.01, le=100)]
Ratios = Annotated[tuple[Ratio, Ratio], AfterValidator(_refuse_reversed)]
"""The smallest and the largest ratio."""
