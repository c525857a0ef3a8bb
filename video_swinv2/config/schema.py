"""The sections of a run's configuration. Keys are constructor argument names.

Values that follow from others (gradient accumulation, number of steps, number of classes) are computed, not set.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from video_swinv2.config.engine import EngineConfig
from video_swinv2.errors import UsageError

STRICT = ConfigDict(extra="forbid")

Fraction01 = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Size = int | tuple[int, ...]
AttentionBackend = Literal["auto", "eager", "sdpa", "flex", "sequential"]  # as models/attention.py; a test compares


@dataclass(config=STRICT, frozen=True)
class WeightedSource:
    """A data source with its share of a mixture; usable as a path."""

    path: str
    weight: Annotated[float, Field(gt=0)]
    """The source provides this weight's fraction of the sum of all weights."""

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path


# Names of the two branches of the union. pydantic puts them into the path of a faulty key, from which `loading` removes
# them again; with spaces in them they cannot be mistaken for keys.
SOURCE_TAGS = ("a path", "a weighted path")
DataSource = Annotated[
    Annotated[str, Tag(SOURCE_TAGS[0])] | Annotated[WeightedSource, Tag(SOURCE_TAGS[1])],
    Discriminator(lambda value: SOURCE_TAGS[isinstance(value, (dict, WeightedSource))]),
]
DataSources = Annotated[
    tuple[DataSource, ...],
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
    attention: AttentionBackend = "auto"
    checkpoint_blocks: Annotated[int, Field(ge=0)] = 0


@dataclass(config=STRICT, frozen=True)
class DataConfig:
    """Where the samples come from and how clips are cut from them."""

    source: DataSources
    """Data sets of videos, folders of images, or tar shards (a folder or a pattern `name-{000..146}.tar`), each a path
    or `{path: ..., weight: ...}`. `train` takes one; `pretrain` takes any number, weighted or each used once per
    epoch."""
    image_size: Size
    """Pixels of the model's input: an int or [H, W]."""
    frames: Positive | None = None
    """Frames per clip; omit for an image model."""
    frame_stride: Positive = 1
    train_split: str = "train"
    val_split: str = "val"
    frames_per_video: Positive = 1
    """Number of samples that `pretrain` draws from each video per epoch, spread over it and decoded together."""
    short_side: Positive | None = None
    """Videos are scaled to this short side before the random crop; omit to keep their own size."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Decoding processes per training process."""
    decode_seconds: Annotated[float, Field(gt=0)] = 60.0
    """A video that takes longer to decode counts as broken."""
    max_broken: Fraction01 = 0.02
    """The run stops when more than this fraction of the videos drawn was broken and had to be replaced."""


@dataclass(config=STRICT, frozen=True)
class AugmentConfig:
    """Random changes to training samples, the same for all frames of a clip."""

    repeats: Positive = 1
    """Samples that a step takes from each clip it draws, decoded once and augmented independently (Hoffer et al. 2020,
    batch augmentation). They count in `optim.batch`; an epoch draws each clip once and so has this many times more
    samples."""
    crop_area: tuple[Fraction01, Fraction01] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Fraction01 = 0.5
    """Probability of a horizontal flip; use 0 if classes differ in left and right."""
    rand_augment: Annotated[int, Field(ge=0)] = 0
    """Operations drawn per sample, each then applied with probability 0.5; 0 switches RandAugment off."""
    rand_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """Out of 10, as in the `m9` of published recipes (torchvision counts to 30)."""
    rand_noise: NotNegative = 0.5
    """Standard deviation of each operation's magnitude (`mstd0.5`)."""
    erasing: Fraction01 = 0.0
    """Probability that a rectangle of 2 % to a third of the area is replaced by noise."""
    mixup: NotNegative = 0.0
    """Alpha of the Beta distribution; 0 switches it off. If CutMix is on too, each batch uses one of the two at
    random."""
    cutmix: NotNegative = 0.0


@dataclass(config=STRICT, frozen=True)
class MaskConfig:
    """SimMIM: what is masked and what is predicted."""

    unit: Size = 32
    """Side of a mask cell in pixels (and in frames, for clips): an int, [H, W] or [T, H, W]."""
    shape: Literal["block", "tube"] = "block"
    """`block`: cells have a limited extent in time too; `tube`: one mask for all frames of a clip, whatever `unit`
    says."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6
    normalise_target: Annotated[int, Field(ge=0)] = 0
    """Side (odd) of the sliding patch over which the target is normalised (47 in the SwinV2 recipes); 0 predicts plain
    pixels."""

    def __post_init__(self) -> None:
        side = self.normalise_target
        if side == 1 or (side and side % 2 == 0):
            raise UsageError(f"mask.normalise_target: {side} has no middle; use an odd number from 3 on")


@dataclass(config=STRICT, frozen=True)
class OptimConfig:
    """AdamW, its schedule, and the loss."""

    epochs: Annotated[float, Field(gt=0)]
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate: for a batch of `lr_batch` if that is set, otherwise for `batch`, and then not scaled."""
    batch: Positive
    """Samples per optimizer step, over all processes."""
    micro_batch: Positive
    """Maximum number of samples per process and forward pass; gradient accumulation follows from it."""
    lr_batch: Positive | None = None
    """The linear scaling rule (Goyal et al. 2017): lr, warmup_lr and min_lr are multiplied by batch / lr_batch."""
    warmup_epochs: NotNegative = 0.0
    warmup_lr: NotNegative = 0.0
    min_lr: NotNegative = 0.0
    schedule: Literal["cosine", "multistep"] = "cosine"
    milestones: tuple[float, ...] = ()
    """Epochs at which a multistep schedule multiplies the learning rate by 0.1."""
    weight_decay: NotNegative = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    backbone_lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate of everything but the head (0.1 in Video Swin's recipes)."""
    frozen_stages: Annotated[int, Field(ge=0)] = 0
    """Number of stages, counted from the input, that keep their initial weights, as does the patch embedding; drop path
    is off in them."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Maximum global L2 norm of the gradients; omit to disable clipping."""
    label_smoothing: Fraction01 = 0.0
    class_weights: Literal["balanced"] | tuple[NotNegative, ...] | None = None
    """Weights of the classes in the training loss, in class order; `balanced` weighs each class by
    samples / (classes x samples of the class)."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of an exponential moving average of the weights, which is then what is validated and saved; 0
    disables it."""


@dataclass(config=STRICT, frozen=True)
class Config:
    """One run."""

    out: str
    """Run folder; the same command with the same folder resumes where it stopped."""
    init: str
    """`scratch`, or the weights to start from (image weights are inflated to clip weights)."""
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    mask: MaskConfig = dataclasses.field(default_factory=MaskConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    init_cpb_norm: tuple[tuple[int, ...], ...] | None = None
    """The log-CPB normaliser per stage, for `init` weights that do not record it."""
    init_time_noise: NotNegative = 0.0
    """Noise added to an inflated patch kernel, in units of its standard deviation and with zero sum over time. Where
    classes are motions, training without it is slow to tell a clip from its reversal."""
    resume: str | None = None
    """Another run's folder to continue from; used when `out` has no checkpoint of its own."""
    seed: int = 0
    log_every: Positive = 10
    """Steps between two lines of metrics.jsonl."""
    val_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between two validations; there is one more before the first step and one after the last."""
    pictures_epochs: Annotated[float, Field(gt=0)] | None = None
    """Epochs between two sets of SimMIM pictures, which are drawn at validations; by default at each."""
    checkpoint_minutes: NotNegative = 10.0
    """Minutes between two checkpoints; one is also written at each validation and on SIGTERM."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    early_stop_epochs: Annotated[float, Field(gt=0)] | None = None
    """The run ends when the best validation is this many epochs old; omit to train to the last step."""
    max_skipped: Positive = 3
    """The run stops after this many consecutive steps with a non-finite loss or gradient. Such steps are skipped, and
    `skipped.jsonl` names their inputs."""
    wandb: str | None = None
    """Weights & Biases project that receives the metrics too, if the package `wandb` is installed."""

    def __post_init__(self) -> None:
        if self.init == "scratch" and self.init_time_noise:
            raise UsageError("init_time_noise: is for inflated weights, but init is scratch; omit the key")
