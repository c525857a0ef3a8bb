"""What of a test may be asked for instead of what the model file says, and how the test is run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
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
    """Numbers of the model file to replace (None keeps them), and how the test is run."""

    __test__ = False  # pytest takes classes called Test* for tests

    frames: Positive | None = None
    image_size: ImageSize | None = None
    """(H, W), or one number for both."""
    frame_stride: Positive | None = None
    window: Positive | tuple[Positive, ...] | None = None
    """An int for every axis, (T, H, W), or (H, W) for an image model."""
    attention: Backend | None = None
    frame_order: FrameOrder = "in-order"
    """Anything but in-order asks how much of the accuracy is owed to the order of time."""
    batch_views: Positive = 12
    """Views the model sees at once."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Reading processes of each process; by default one per core, at most 8."""
    seed: Annotated[int, Field(ge=0)] = 0
    device: Device = "auto"
    precision: Precision = "auto"
    """auto is bf16 on a GPU that has it, else fp32."""
    time_limit_seconds: NotNegative = 60.0
    """A video that takes longer to open or to decode has failed."""


# The key of a run's configuration, where there is one, so that a number has one name everywhere.
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
    """`key=value` texts with values as YAML; UsageError naming the key, and the nearest one for an unknown key."""
    values: dict[str, Any] = {}
    for text in texts:
        key = text.partition("=")[0]
        if key not in KEYS:
            nearest = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
            raise UsageError(f"unknown key {key}: did you mean {nearest}? (there are {', '.join(KEYS)})")
        apply_override(values, KEYS[key] + text[len(key) :])
    try:
        return TypeAdapter(TestOverrides).validate_python(values)
    except ValidationError as error:
        fault = error.errors()[0]
        name = next(key for key, field in KEYS.items() if field == fault["loc"][0])
        message = f"{fault['msg'][0].lower()}{fault['msg'][1:]}"
        raise UsageError(f"{name}={fault['input']} does not do: {message}") from error


def override_preprocessing(preprocessing: Preprocessing, overrides: TestOverrides) -> Preprocessing:
    """The model's preprocessing with the numbers asked for instead. Raises UsageError for frames of an image model."""
    if overrides.frames is not None and preprocessing.frames is None:
        raise UsageError("frames: this is an image model, it looks at single frames; leave frames away")
    return replace(
        preprocessing,
        frames=overrides.frames or preprocessing.frames,
        frame_stride=overrides.frame_stride or preprocessing.frame_stride,
        image_size=overrides.image_size or preprocessing.image_size,
    )


def use_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether to compute in bf16; "auto" does on a GPU that has it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def pick_device(name: Device) -> torch.device:
    """The device of a single process; "auto" is a GPU where there is one. Raises UsageError for a GPU that is not."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: cuda was asked for but PyTorch sees no GPU here; use cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
