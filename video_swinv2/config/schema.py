"""The whole configuration of a training run: one YAML file plus `key.sub=value` overrides, checked first.

Keys are constructor argument names. Whatever follows from other values (accumulation, steps, class count) is computed.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from video_swinv2.engine.settings import EngineSettings
from video_swinv2.errors import UsageError
from video_swinv2.models.attention import Backend

STRICT = ConfigDict(extra="forbid")

Fraction01 = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Size = int | tuple[int, ...]


@dataclass(config=STRICT, frozen=True)
class WeightedSource:
    """A source of a mixture; usable as a path."""

    path: str
    weight: Annotated[float, Field(gt=0)]
    """The share of the samples drawn from it, as its part of the sum of all weights."""

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path


KINDS = ("a path", "a weighted path")  # no key is called so: what pydantic puts among the keys is taken out again
Source = Annotated[
    Annotated[str, Tag(KINDS[0])] | Annotated[WeightedSource, Tag(KINDS[1])],
    Discriminator(lambda value: KINDS[isinstance(value, (dict, WeightedSource))]),
]
Sources = Annotated[
    tuple[Source, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else (value,)),
]


@dataclass(config=STRICT, frozen=True)
class ModelConfig:
    """Arguments of `create_model`; frames and image_size come from `data`, num_classes from the class list."""

    name: str
    patch_size: Size | None = None
    window: Size | None = None
    cpb_norm: tuple[tuple[int, ...], ...] | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    head_dropout: Fraction01 = 0.0
    attention: Backend = "auto"
    checkpoint_blocks: Annotated[int, Field(ge=0)] = 0


@dataclass(config=STRICT, frozen=True)
class DataConfig:
    """Where the samples are and what is cut out of them."""

    source: Sources
    """Data sets of videos, folders of images, or tar shards (a folder or a pattern `name-{000..146}.tar`), each a path
    or `{path: ..., weight: ...}`; `train` takes one, `pretrain` any number, weighted or all used once an epoch."""
    image_size: Size
    """Pixels given to the model: an int or [H, W]."""
    frames: Positive | None = None
    """Frames per clip; leave away for an image model."""
    frame_stride: Positive = 1
    train_split: str = "train"
    val_split: str = "val"
    frames_per_video: Positive = 1
    """How many samples `pretrain` draws from each video in an epoch, spread over it and decoded together."""
    short_side: Positive | None = None
    """Videos are scaled to this short side before the random crop; leave away to keep their own size."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Decoding processes per training process."""
    decode_seconds: Annotated[float, Field(gt=0)] = 60.0
    """A video that takes longer counts as broken."""
    max_broken: Fraction01 = 0.02
    """The run stops when more than this share of the drawn videos was broken and had to be replaced."""


@dataclass(config=STRICT, frozen=True)
class AugmentConfig:
    """Random changes to training samples, the same for all frames of a clip."""

    repeats: Positive = 1
    """Samples that a step takes of each clip it draws, decoded once and augmented anew (Hoffer et al. 2020, batch
    augmentation). They count in `optim.batch`; an epoch draws every clip once, so it has as many times more samples."""
    crop_area: tuple[Fraction01, Fraction01] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Fraction01 = 0.5
    """Probability of a horizontal flip; 0 where left and right are different classes."""
    rand_augment: Annotated[int, Field(ge=0)] = 0
    """Operations drawn per sample, each then applied with probability 0.5; 0 switches RandAugment off."""
    rand_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """Out of 10, as `m9` of the published recipes means it (torchvision counts to 30)."""
    rand_noise: NotNegative = 0.5
    """Standard deviation of each operation's magnitude (`mstd0.5`)."""
    erasing: Fraction01 = 0.0
    """Probability that a rectangle of 2 % to a third of the area becomes noise."""
    mixup: NotNegative = 0.0
    """Alpha of the Beta distribution; 0 switches it off. With CutMix too, each batch gets one of the two at random."""
    cutmix: NotNegative = 0.0


@dataclass(config=STRICT, frozen=True)
class MaskConfig:
    """SimMIM: what is hidden and what is to be predicted."""

    unit: Size = 32
    """Side of a mask cell in pixels (and frames, for clips): an int, [H, W] or [T, H, W]."""
    shape: Literal["block", "tube"] = "block"
    """`block`: cells end in time as in space; `tube`: one mask for all frames of a clip, whatever `unit` says."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6
    normalise_target: Annotated[int, Field(ge=0)] = 0
    """Side, odd, of the window that normalises the target (47 in the SwinV2 recipes); 0 predicts plain pixels."""


@dataclass(config=STRICT, frozen=True)
class OptimConfig:
    """AdamW, its schedule, and the loss."""

    epochs: Annotated[float, Field(gt=0)]
    lr: Annotated[float, Field(gt=0)]
    """With `lr_batch` for that batch, else for the global batch as it is given: then it is not scaled by anything."""
    batch: Positive
    """Samples per optimizer step over all processes."""
    micro_batch: Positive
    """Samples per process and forward pass at most; accumulation follows from it."""
    lr_batch: Positive | None = None
    """The linear rule (Goyal et al. 2017): lr, warmup_lr and min_lr are multiplied by batch / lr_batch."""
    warmup_epochs: NotNegative = 0.0
    warmup_lr: NotNegative = 0.0
    min_lr: NotNegative = 0.0
    schedule: Literal["cosine", "multistep"] = "cosine"
    milestones: tuple[float, ...] = ()
    """Epochs at which a multistep schedule multiplies the rate by 0.1."""
    weight_decay: NotNegative = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    backbone_lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    """A factor on the rate of all but the head (0.1 in Video Swin's recipes)."""
    frozen_stages: Annotated[int, Field(ge=0)] = 0
    """So many stages from the first on keep the weights they start with, the patch embedding too, without drop path."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    label_smoothing: Fraction01 = 0.0
    class_weights: Literal["balanced"] | tuple[NotNegative, ...] | None = None
    """Weights of the classes in the training loss, in their order; `balanced`: samples / (classes x samples of it)."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of an average of the weights, which then is what is validated and saved; 0 keeps none."""


@dataclass(config=STRICT, frozen=True)
class EngineConfig:
    """What drives the steps; none of it changes what is learned beyond rounding."""

    engine: Literal["deepspeed", "plain"] = "deepspeed"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of the matrix products (torch autocast): weights, gradients and moments are fp32 always. fp16, with a loss scale,
    is for GPUs without bf16."""
    device: str = "auto"
    communication: Literal["fp32", "bf16"] = "fp32"
    """In what gradients travel between processes: bf16 halves the traffic and rounds them."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where AdamW works, on weights and moments kept there: for ZeRO 1-3 on devices too small for them."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO-3 keeps its pieces of the weights; needs `offload_optimizer` too."""
    offload_folder: str | None = None
    """Folder for what is offloaded to nvme, on every machine's own fast disk."""
    compile: bool = False
    """torch.compile, block by block; needs a C++ compiler, or Triton on GPUs."""
    deepspeed: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of DeepSpeed's own configuration that tune how it works; those that follow from other keys are refused."""

    def __post_init__(self) -> None:
        self.settings()  # refuses what does not go together, and what DeepSpeed would take in silence

    def settings(self, **step: Any) -> EngineSettings:
        """The engine's settings; `step` gives what is not said here: accumulation, micro_batch, clip_norm, ema."""
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "device"}
        return EngineSettings(**said, **step)


@dataclass(config=STRICT, frozen=True)
class Config:
    """One run."""

    out: str
    """Run folder; the same command with the same folder goes on where it stopped."""
    init: str
    """`scratch`, or the weights to start from (image weights become clip weights)."""
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    mask: MaskConfig = dataclasses.field(default_factory=MaskConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    init_cpb_norm: tuple[tuple[int, ...], ...] | None = None
    """The log-CPB normaliser per stage of `init` weights that do not tell it."""
    init_time_noise: NotNegative = 0.0
    """Noise that sums to zero over time on an inflated patch kernel, in its deviations: where classes are motions,
    training is slow to tell a clip from its reversal without it."""
    resume: str | None = None
    """Another run's folder to go on from, used when `out` has no checkpoint of its own."""
    seed: int = 0
    log_every: Positive = 10
    """Steps between two lines of metrics.jsonl."""
    val_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between two validations; one more comes before the first step, one after the last."""
    pictures_epochs: Annotated[float, Field(gt=0)] | None = None
    """Epochs between two sets of SimMIM's pictures, which are made at validations; by default at each."""
    checkpoint_minutes: NotNegative = 10.0
    """Minutes between two checkpoints; one is also written at each validation and on SIGTERM."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    early_stop_epochs: Annotated[float, Field(gt=0)] | None = None
    """The run ends when the best validation is so many epochs old; leave away to train to the last step."""
    max_skipped: Positive = 3
    """Steps in a row whose loss or gradient was not finite, then the run stops; each is dropped and its inputs named in
    `skipped.jsonl`."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the metrics too, where the package `wandb` is installed."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML), check everything.

    UsageError naming the key, and the nearest known one for a key that does not exist.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds no keys; see configs/ for examples")
    for override in overrides:
        apply_override(values, override)
    return check(values, str(path))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in nested `values`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override}: an override is written key.sub=value")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UsageError(f"{override}: {parent} is a value, it has no keys below it")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{override}: the value is not YAML") from error


def check(values: Mapping[str, Any], origin: str) -> Config:
    """Nested plain data -> Config; UsageError in one line for the first thing that is wrong."""
    try:
        return TypeAdapter(Config).validate_python(dict(values))
    except ValidationError as error:
        raise UsageError(f"{origin}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    fault = error.errors()[0]
    names = [str(part) for part in fault["loc"] if part not in KINDS]
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = sorted([*known_keys(), *INNER])
        near = difflib.get_close_matches(".".join(names), known, n=1, cutoff=0.0)
        return f"unknown key {'.'.join(names)}; did you mean {near[0]}?"
    # pydantic adds the tried branch of a union (int, tuple[...]) and the position in a list to the path of the key.
    shown = ".".join(name for name in names if name.isidentifier() and name not in ("int", "str", "float", "none"))
    if fault["type"] == "missing":
        return f"{shown} is missing; add it to the file or as {shown}=..."
    return f"{shown}: {fault['input']!r} does not do ({fault['msg'][0].lower()}{fault['msg'][1:]})"


def known_keys(kind: type = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration."""
    for field in dataclasses.fields(kind):
        inner = INNER.get(field.name) if kind is Config else None
        yield from known_keys(inner, f"{field.name}.") if inner else [prefix + field.name]


INNER: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "augment": AugmentConfig,
    "mask": MaskConfig,
    "engine": EngineConfig,
}


def to_yaml(config: Config) -> str:
    """The resolved configuration, every default written out; `load_config` reads it back to the same values."""
    plain = TypeAdapter(Config).dump_python(config, mode="json")
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)
