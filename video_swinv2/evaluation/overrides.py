"""The settings of a test: what replaces values of the model file, and how the test is run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from video_swinv2.config import STRICT, NotNegative, Positive, apply_override
from video_swinv2.errors import UsageError
from video_swinv2.models.attention import Backend
from video_swinv2.weights.store import Preprocessing

Precision = Literal["auto", "fp32", "bf16"]
FrameOrder = Literal["in-order", "shuffled", "reversed"]
Device = Literal["auto", "cpu", "cuda"]
ImageSize = Annotated[tuple[Positive, Positive], BeforeValidator(lambda v: (v, v) if isinstance(v, int) else v)]


@dataclass(config=STRICT, frozen=True)
class TestOverrides:
    """Values that replace the model file's (None keeps the model's), and how the test is run."""

    __test__ = False  # pytest takes classes called Test* for tests

    frames: Positive | None = None
    image_size: ImageSize | None = None
    """(H, W) in pixels, or one number for both."""
    frame_stride: Positive | None = None
    window: Positive | tuple[Positive, ...] | None = None
    """One number for every axis, (T, H, W), or (H, W) for an image model."""
    attention: Backend | None = None
    frame_order: FrameOrder = "in-order"
    """shuffled and reversed measure how much of the accuracy depends on the order of the frames."""
    batch_views: Positive = 12
    """Views per forward pass."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Reading processes per test process; the default is one per core, at most 8."""
    seed: Annotated[int, Field(ge=0)] = 0
    device: Device = "auto"
    precision: Precision = "auto"
    """auto is bf16 on a GPU that supports it, else fp32."""
    time_limit_seconds: NotNegative = 60.0
    """A video that takes longer than this to open or to decode counts as failed."""


# Command-line key -> field. A setting that a training run has too carries the same key here.
KEYS = {
    "data.frames": "frames",
    "data.image_size": "image_size",
    "data.frame_stride": "frame_stride",
    "data.frame_order": "frame_order",
    "data.workers": "workers",
    "data.decode_seconds": "time_limit_seconds",
    "model.window": "window",
    "model.attention": "attention",
    "engine.device": "device",
    "engine.precision": "precision",
    "batch_views": "batch_views",
    "seed": "seed",
}


def parse_overrides(texts: Sequence[str]) -> TestOverrides:
    """Parse `key=value` arguments, the values in YAML.

    Raises UsageError that names the key, and the nearest known key for an unknown one.
    """
    values: dict[str, Any] = {}
    for text in texts:
        key = text.partition("=")[0]
        if key not in KEYS:
            nearest = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
            raise UsageError(f"unknown key {key}: did you mean {nearest}? (known: {', '.join(KEYS)})")
        apply_override(values, KEYS[key] + text[len(key) :])
    try:
        return TypeAdapter(TestOverrides).validate_python(values)
    except ValidationError as error:
        fault = error.errors()[0]
        name = next(key for key, field in KEYS.items() if field == fault["loc"][0])
        message = f"{fault['msg'][0].lower()}{fault['msg'][1:]}"
        raise UsageError(f"{name}: invalid value {fault['input']!r}: {message}") from error


def override_preprocessing(preprocessing: Preprocessing, overrides: TestOverrides) -> Preprocessing:
    """The model's preprocessing with the overrides applied. Raises UsageError for `frames` with an image model."""
    if overrides.frames is not None and preprocessing.frames is None:
        raise UsageError("data.frames: this is an image model, which takes single frames; omit data.frames")
    return replace(
        preprocessing,
        frames=overrides.frames or preprocessing.frames,
        frame_stride=overrides.frame_stride or preprocessing.frame_stride,
        image_size=overrides.image_size or preprocessing.image_size,
    )
