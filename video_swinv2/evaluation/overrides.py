"""The settings of a test: values that override the model file's, and how the test is run.

On the command line they are `key=value` arguments. Keys that a training run also has are spelled as in its
configuration, although the fields here are flat; `KEYS` translates.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from video_swinv2.config import (
    STRICT,
    PictureSize,
    Pixels,
    Positive,
    Seconds,
    Seed,
    Size,
    Workers,
    invalid_value,
    parse_override,
)
from video_swinv2.data.display import MAX_PIXELS
from video_swinv2.distributed.session import SILENCE_SECONDS, distributed_session
from video_swinv2.distributed.world import MEETING_SECONDS, World
from video_swinv2.errors import UsageError, nearest_key
from video_swinv2.models.attention import Backend
from video_swinv2.weights.store import Preprocessing

Precision = Literal["auto", "fp32", "bf16"]
FrameOrder = Literal["in-order", "shuffled", "reversed"]
Device = Literal["auto", "cpu", "cuda"]
# One number n stands for (n, n).
ImageSize = Annotated[tuple[Pixels, Pixels], BeforeValidator(lambda v: (v, v) if isinstance(v, int) else v)]


@dataclass(config=STRICT, frozen=True)
class TestOverrides:
    """Values that override the model file's (None keeps the file's), and how the test is run."""

    __test__ = False  # pytest would collect a class called Test*

    frames: Pixels | None = None
    image_size: ImageSize | None = None
    """(H, W) in pixels, or one number for both."""
    frame_stride: Pixels | None = None
    window: Size | None = None
    """One number for every axis, (T, H, W), or (H, W) for an image model."""
    attention: Backend | None = None
    frame_order: FrameOrder = "in-order"
    """The order in which a clip's frames reach the model. Accuracies with "shuffled" and "reversed" show how much the
    model relies on the true order."""
    soft_nms: bool | None = None
    """Of a detector: lower the scores of overlapping boxes instead of dropping the boxes (Soft-NMS)."""
    test_sides: Annotated[tuple[Pixels, ...], Field(min_length=1, max_length=32)] | None = None
    """Of a detector: the shorter sides, in pixels, at which each image is seen; the boxes of all compete. The limit of
    the longer side grows with the shorter one."""
    test_flip: bool | None = None
    """Of a detector: whether each image is also seen mirrored."""
    drop_faulty: bool | None = None
    """Of a detector: whether to leave out missing images and faulty objects, instead of refusing the data set."""
    batch_views: Positive = 12
    """Views per forward pass."""
    workers: Workers | None = None
    """Reading processes per test process; the default is one per core, at most 8."""
    seed: Seed = 0
    """Of the shuffled frame order, and of the views drawn for the report's curve. A probe counts its own seeds."""
    device: Device = "auto"
    precision: Precision = "auto"
    """auto is bf16 on a GPU that computes in it and on a CPU with AMX, else fp32. A GPU that only emulates bf16 gets
    fp32 in either case."""
    time_limit_seconds: Seconds = 60.0
    """A video that takes longer than this to open or to decode counts as failed."""
    max_pixels: PictureSize = MAX_PIXELS
    """A video or image with larger pictures counts as failed."""
    meeting_seconds: Seconds = MEETING_SECONDS
    """How long several processes may take to find each other at the start."""
    silence_seconds: Seconds = SILENCE_SECONDS
    """The test ends if one of its processes does not answer for this long."""

    def session(self, advice: str) -> AbstractContextManager[World]:
        """The `distributed_session` of a command with these settings, which ends with its launcher."""
        return distributed_session(
            self.device,
            advice,
            meeting_seconds=self.meeting_seconds,
            silence_seconds=self.silence_seconds,
            end_with_launcher=True,
        )


# Command-line key -> field of TestOverrides. A setting that a training run also has keeps the run's key.
KEYS = {
    "data.frames": "frames",
    "data.image_size": "image_size",
    "data.frame_stride": "frame_stride",
    "data.frame_order": "frame_order",
    "data.workers": "workers",
    "data.decode_seconds": "time_limit_seconds",
    "data.max_pixels": "max_pixels",
    "model.window": "window",
    "model.attention": "attention",
    "engine.device": "device",
    "engine.precision": "precision",
    "engine.meeting_seconds": "meeting_seconds",
    "engine.silence_seconds": "silence_seconds",
    "detection.soft_nms": "soft_nms",
    "detection.test_sides": "test_sides",
    "detection.test_flip": "test_flip",
    "detection.drop_faulty": "drop_faulty",
    "batch_views": "batch_views",
    "seed": "seed",
}


def parse_overrides(texts: Sequence[str]) -> TestOverrides:
    """Parse `key=value` arguments whose values are YAML.

    Raises UsageError naming the key; for an unknown one also a known key that is near, or all of them.
    """
    values: dict[str, Any] = {}
    for text in texts:
        key = text.partition("=")[0]
        if key not in KEYS:
            near = nearest_key(key, KEYS)
            fix = f"did you mean {near}?" if near else f"known are {', '.join(KEYS)}"
            raise UsageError(f"unknown key {key}; {fix}")
        values[KEYS[key]] = parse_override(text)[1]
    try:
        return TypeAdapter(TestOverrides).validate_python(values)
    except ValidationError as error:
        fault = error.errors()[0]
        # pydantic reports the field, but the user knows the key.
        name = next(key for key, field in KEYS.items() if field == fault["loc"][0])
        raise UsageError(invalid_value(name, fault)) from error


def refuse_detector_keys(overrides: TestOverrides, model: str) -> None:
    """Raise UsageError for a setting of detectors in the test of `model`, such as "a classifier"."""
    for key, name in KEYS.items():
        if key.startswith("detection.") and getattr(overrides, name) is not None:
            raise UsageError(f"{key}: is for detectors, and this is {model}; omit it")


def override_preprocessing(preprocessing: Preprocessing, overrides: TestOverrides) -> Preprocessing:
    """Apply the overrides to the model's preprocessing. Raises UsageError if they give `frames` for an image model."""
    if overrides.frames is not None and preprocessing.frames is None:
        raise UsageError("data.frames: this is an image model, which takes single frames; omit data.frames")
    return replace(
        preprocessing,
        frames=overrides.frames or preprocessing.frames,
        frame_stride=overrides.frame_stride or preprocessing.frame_stride,
        image_size=overrides.image_size or preprocessing.image_size,
    )
