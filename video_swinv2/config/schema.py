"""The sections of a run's configuration, as dataclasses that pydantic checks.

Keys have the names of the constructor arguments that they become. Values that follow from others, such as gradient
accumulation, the number of steps or the number of classes, are computed and cannot be set.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from video_swinv2.config.bounds import (
    STRICT,
    Count,
    Epochs,
    Factor,
    Fraction,
    Fraction01,
    HeadChannels,
    Minutes,
    Normaliser,
    PictureSize,
    PixelRange,
    Pixels,
    Positive,
    PositiveFactor,
    Ratios,
    Seconds,
    Seed,
    Shares,
    Size,
    Text,
    Workers,
)
from video_swinv2.config.engine import EngineConfig
from video_swinv2.errors import UsageError

MAX_WEIGHT = 10**9  # of a data source: sources may be weighted by their numbers of samples
AttentionBackend = Literal["auto", "eager", "sdpa", "flex", "sequential"]  # same as models/attention.py (tested)


@dataclass(config=STRICT, frozen=True)
class WeightedSource:
    """A data source and its weight in a mixture. It can be passed wherever a path is expected (`os.PathLike`)."""

    path: Text
    weight: Annotated[float, Field(gt=0, le=MAX_WEIGHT)]
    """The source contributes weight / (sum of all weights) of the samples."""

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path


# Names of the two branches of the union below. pydantic inserts the branch's name into the path of a faulty key, and
# `loading` removes it again. The spaces in the names ensure that they are never the same as a key.
SOURCE_TAGS = ("a path", "a weighted path")
# A string, or a mapping with path and weight. The discriminator chooses the branch by the type of the value, so that
# errors are reported for that branch only.
DataSource = Annotated[
    Annotated[Text, Tag(SOURCE_TAGS[0])] | Annotated[WeightedSource, Tag(SOURCE_TAGS[1])],
    # Index False (0) for a path, True (1) for a weighted one; WeightedSource occurs when a Config is built in Python.
    Discriminator(lambda value: SOURCE_TAGS[isinstance(value, (dict, WeightedSource))]),
]
# One or more sources; a single one may be written without a list.
DataSources = Annotated[
    tuple[DataSource, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else (value,)),
]


@dataclass(config=STRICT, frozen=True)
class ModelConfig:
    """Arguments of `create_model`. Its frames and image_size come from `data`, and num_classes from the class list."""

    name: Text
    """Size of the model: swinv2_nano, tiny, small, base, large, huge, giant or giant_1b, all beginning with swinv2_."""
    patch_size: Size | None = None
    """Pixels (and frames) that one token covers: an int, [H, W] or [T, H, W]; by default 4 pixels and 2 frames."""
    window: Size | None = None
    """Attention window in tokens, in the same form; by default 7 in height and width, and 8 in time."""
    cpb_norm: Normaliser | None = None
    """Log-CPB normaliser of each stage, in tokens: the window size by which offsets are divided; by default that of the
    weights, or of the window."""
    drop_path: Fraction = 0.0
    """Rate of stochastic depth at the last block; it grows linearly from 0 at the first."""
    head_dropout: Fraction = 0.0
    """Rate of dropout before the head."""
    attention: AttentionBackend = "auto"
    """How attention is computed. All give the same results; `sequential` needs the least memory."""
    checkpoint_blocks: Count = 0
    """Number of blocks, counted from the input, that recompute their activations in the backward pass to save
    memory."""


@dataclass(config=STRICT, frozen=True)
class DataConfig:
    """Where the samples come from, and how clips are taken from videos."""

    source: DataSources
    """Data sets of videos, folders of images, or tar shards (a folder or a pattern `name-{000..146}.tar`), each given
    as a path or as `{path: ..., weight: ...}`. `train` takes one source. `pretrain` takes any number, mixed by weight
    or, without weights, with every sample used once per epoch."""
    image_size: Size
    """Size of the model's input in pixels: an int or [H, W]."""
    frames: Pixels | None = None
    """Number of frames in a clip; omit it for an image model."""
    frame_stride: Pixels = 1
    """Distance between two frames of a clip, in frames of the video."""
    train_split: Text = "train"
    """Split of the data set to train on."""
    val_split: Text = "val"
    """Split of the data set to validate on."""
    frames_per_video: Pixels = 1
    """Number of samples that `pretrain` takes from each video per epoch, spread over the video and decoded together."""
    short_side: Pixels | None = None
    """Pixels to which the short side of a video, or in segmentation of an image, is scaled before the random crop; omit
    it to keep the size."""
    workers: Workers = 2
    """Number of data loading processes per training process."""
    decoder: Literal["auto", "pyav", "torchcodec", "decord"] = "auto"
    """Library that decodes videos. `torchcodec` and `decord` read only data sets made by `prepare`, with slightly other
    colours; PyAV reads everything else. `auto` is the quickest with the right colours, which at present is PyAV."""
    decode_seconds: Seconds = 60.0
    """A video that takes longer than this to decode counts as broken."""
    max_pixels: PictureSize = 2**26
    """A video or image with larger pictures counts as broken. The default, 8192 x 8192, admits 8K video. For images
    above 178,956,970 pixels, Pillow has a limit of its own."""
    max_broken: Fraction01 = 0.02
    """The run stops if more than this fraction of its samples was broken and had to be replaced."""


@dataclass(config=STRICT, frozen=True)
class AugmentConfig:
    """Random augmentation of training samples. All frames of a clip are augmented in the same way."""

    repeats: Annotated[int, Field(ge=1, le=1000)] = 1
    """Number of samples that are made from each clip, which is decoded once and augmented independently for each of
    them (batch augmentation, Hoffer et al. 2020). Each counts as a sample in `optim.batch`, so an epoch has this many
    times more samples."""
    crop_area: Shares = (0.08, 1.0)
    """Smallest and largest area of the random crop, as fractions of the frame."""
    crop_ratio: Ratios = (3 / 4, 4 / 3)
    """Smallest and largest ratio of width to height of the random crop."""
    flip: Fraction01 = 0.5
    """Probability of a horizontal flip. Use 0 if classes differ only in left and right."""
    rand_augment: Annotated[int, Field(ge=0, le=100)] = 0
    """Number of RandAugment operations drawn per sample, each applied with probability 0.5; 0 disables RandAugment."""
    rand_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """Magnitude of the operations on a scale of 10, like the 9 in `m9` of published recipes (torchvision's scale ends
    at 30)."""
    rand_noise: Factor = 0.5
    """Standard deviation of the magnitude, which is drawn for each operation (`mstd0.5` in published recipes)."""
    erasing: Fraction01 = 0.0
    """Probability that a rectangle of 2 % to a third of the area is replaced by noise (random erasing)."""
    mixup: Factor = 0.0
    """Alpha of mixup's Beta distribution; 0 disables it. If CutMix is enabled too, each batch uses one of the two at
    random."""
    cutmix: Factor = 0.0
    """Alpha of CutMix's Beta distribution; 0 disables it."""


@dataclass(config=STRICT, frozen=True)
class MaskConfig:
    """SimMIM pre-training: what is masked and what is predicted."""

    unit: Size = 32
    """Side of a mask cell in pixels (and in frames, for clips): an int, [H, W] or [T, H, W]."""
    shape: Literal["block", "tube"] = "block"
    """`block`: cells are limited in time as well. `tube`: one mask for all frames of a clip, whatever `unit` is."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Fraction of the cells that is masked."""
    normalise_target: Annotated[int, Field(ge=0, le=1000)] = 0
    """Side in pixels of the sliding patch over which the target is normalised, an odd number (47 in the SwinV2
    recipes). 0 predicts pixels that are not normalised."""

    def __post_init__(self) -> None:
        # A patch of an even side has no centre pixel; side 1 would normalise every pixel to 0.
        side = self.normalise_target
        if side == 1 or (side and side % 2 == 0):
            raise UsageError(
                f"mask.normalise_target: {side} is not an odd number of at least 3; "
                "use one, or 0 to predict plain pixels"
            )


@dataclass(config=STRICT, frozen=True)
class SegmentationConfig:
    """Semantic segmentation: how pixels and classes are read and augmented, and the heads that are trained."""

    ignore_index: Annotated[int, Field(ge=0, le=255)] = 255
    """Index in the masks of pixels that belong to no class. They add nothing to the loss and do not count in tests. 255
    always is one."""
    reduce_zero_label: bool = False
    """Whether index 0 of the masks is no class either, so that 1 is the first one, as in ADE20K."""
    scale: Ratios = (0.5, 2.0)
    """Smallest and largest factor by which an image, scaled to `data.short_side` if that is set, is resized before a
    crop of `data.image_size` is taken."""
    max_class_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    """A crop is drawn again, up to ten times, while one class covers at least this fraction of it."""
    photometric: bool = True
    """Whether brightness, contrast, saturation and hue are changed at random."""
    channels: Annotated[int, Field(ge=64, le=4096, multiple_of=64)] = 512
    """Channels of the UPerNet head, a multiple of 64; the auxiliary head has half as many."""
    auxiliary: Factor = 0.4
    """Weight of the loss of the auxiliary head, which is used in training only; 0 omits that head."""


@dataclass(config=STRICT, frozen=True)
class DetectionConfig:
    """Object detection: how images and objects are read and augmented, and the heads that are trained.

    `data.image_size` is the shorter side of an image and the limit of its longer side in validations and tests, such as
    [800, 1333].
    """

    kind: Literal["faster_rcnn", "mask_rcnn", "cascade_mask_rcnn"] = "faster_rcnn"
    """`faster_rcnn` finds boxes, `mask_rcnn` boxes and masks, and `cascade_mask_rcnn` both, refined in three stages."""
    short_sides: PixelRange | None = None
    """Smallest and largest shorter side in pixels, drawn for each image (multi-scale training); by default that of
    `data.image_size`."""
    jitter: Ratios | None = None
    """Large-scale jitter instead of `short_sides`: smallest and largest factor, such as [0.1, 2], by which an image is
    resized before it is cropped or padded to a square of the longer side of `data.image_size`."""
    drop_faulty: bool = False
    """Whether to leave out missing images and faulty objects, with a note, instead of refusing the data set."""
    fpn_channels: HeadChannels = 256
    """Channels of the feature pyramid network."""
    head_channels: HeadChannels = 1024
    """Channels of the hidden layers of the box heads."""
    mask_channels: HeadChannels = 256
    """Channels of the hidden layers of the mask head."""
    anchor_sizes: Annotated[tuple[Pixels, ...], Field(min_length=5, max_length=5)] = (32, 64, 128, 256, 512)
    """Side in pixels of the anchors on each of the five maps, the finest first. Choose smaller ones for smaller images:
    the objects should lie between the first and the last."""
    proposals: Positive = 1000
    """Maximum number of proposals per image; twice as many in training."""
    sampled_anchors: Positive = 256
    """Number of anchors per image that the loss of the proposals is computed on."""
    sampled_boxes: Positive = 512
    """Number of proposals per image that the losses of the heads are computed on."""


@dataclass(config=STRICT, frozen=True)
class OptimConfig:
    """AdamW, the learning rate schedule, and the loss."""

    epochs: Epochs
    """Passes over the training samples; need not be whole."""
    lr: PositiveFactor
    """Peak learning rate. If `lr_batch` is set, it is meant for that batch size and is scaled to `batch`."""
    batch: Positive
    """Samples per optimizer step, over all processes."""
    micro_batch: Positive | None = None
    """Maximum number of samples per process and forward pass. The number of accumulation steps follows from it, so that
    it changes memory and speed, but not the batch. By default it is planned when the run starts: as many as fit into
    the memory of the device. A run that is resumed keeps its value."""
    lr_batch: Positive | None = None
    """Enables the linear scaling rule (Goyal et al. 2017): lr, warmup_lr and min_lr are multiplied by
    batch / lr_batch."""
    warmup_epochs: Annotated[float, Field(ge=0, le=10**6)] = 0.0
    """Epochs in which the learning rate rises linearly from warmup_lr to lr."""
    warmup_lr: Factor = 0.0
    """Learning rate of the first step of the warm-up. With 0, that step changes no weight."""
    min_lr: Factor = 0.0
    """Learning rate that a cosine or linear schedule reaches after its last step, as in timm and torch (that of the
    last step itself is a little higher), and the lower bound of a multistep one."""
    schedule: Literal["cosine", "linear", "multistep"] = "cosine"
    """How the learning rate falls after the warm-up."""
    milestones: tuple[Epochs, ...] = ()
    """Epochs at which a multistep schedule multiplies the learning rate by 0.1."""
    weight_decay: Factor = 0.05
    """AdamW's weight decay, which is decoupled from the gradient. Biases, norms and log-CPB networks have none."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate per layer, counted from the output to the input; 1 disables it."""
    backbone_lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate of all parameters outside the head (0.1 in Video Swin's recipes)."""
    frozen_stages: Count = 0
    """Number of stages, counted from the input, that are frozen together with the patch embedding. Drop path is off in
    them."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay per step of the averages of gradients and of their squares."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """AdamW's constant beside the square root in the denominator."""
    clip_norm: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Maximum global L2 norm of the gradients; omit it to disable clipping."""
    label_smoothing: Fraction = 0.0
    """Share of each label that is spread evenly over all classes."""
    class_weights: Literal["balanced", "sqrt_balanced"] | tuple[Factor, ...] | None = None
    """Weights of the classes in the training loss, in class order, for rare classes that are never predicted.
    `balanced` gives each class the weight samples / (classes x samples of the class), `sqrt_balanced` weights in
    proportion to 1 / sqrt(samples of the class), which is milder; in a segmentation, pixels count instead of
    samples."""
    ema: Fraction = 0.0
    """Decay per step of an exponential moving average of the weights. If enabled, validation and the saved models use
    the average; 0 disables it."""

    def __post_init__(self) -> None:
        if isinstance(self.class_weights, tuple) and not any(self.class_weights):
            raise UsageError("optim.class_weights: all are 0; give at least one class a weight")


BestMetric = Literal[
    "val/top1",
    "val/top5",
    "val/loss",
    "val/miou",
    "val/pixel_accuracy",
    "val/ap",
    "val/ap50",
    "val/mask_ap",
    "val/mask_ap50",
]


@dataclass(config=STRICT, frozen=True)
class Config:
    """The configuration of one run."""

    out: Text
    """The run folder. The same command with the same folder resumes where the run stopped."""
    init: Text
    """`scratch`, or the weights to start from. Weights of image models are inflated for clips."""
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    mask: MaskConfig = dataclasses.field(default_factory=MaskConfig)
    segmentation: SegmentationConfig = dataclasses.field(default_factory=SegmentationConfig)
    detection: DetectionConfig = dataclasses.field(default_factory=DetectionConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    task: Literal["classification", "simmim", "segmentation", "detection"] | None = None
    """What `train` learns; by default classification. `pretrain` learns simmim."""
    init_cpb_norm: Normaliser | None = None
    """Log-CPB normaliser of each stage with which the `init` weights were trained, if they do not record it."""
    init_time_noise: Factor = 0.0
    """Noise added to an inflated patch kernel, in units of the kernel's standard deviation and with zero sum over time.
    If classes are motions, a model trained without it is slow to learn to tell a clip from its reversal."""
    resume: Text | None = None
    """Folder of another run to continue from, used only if `out` has no checkpoint of its own."""
    seed: Seed = 0
    """Seed of fresh weights, of the order of samples and of everything random."""
    log_every: Positive = 10
    """Number of steps between two lines of metrics.jsonl."""
    val_epochs: Epochs = 1.0
    """Epochs between two validations. There is one more before the first step and one after the last."""
    pictures_epochs: Epochs | None = None
    """Epochs between two sets of pictures of SimMIM, segmentation and detection, which are drawn at validations; by
    default at every validation."""
    checkpoint_minutes: Minutes = 10.0
    """Minutes between two checkpoints; one is also written at each validation and on SIGTERM."""
    keep_checkpoints: Annotated[int, Field(ge=2, le=10**6)] = 2
    """Number of checkpoints that are kept, the latest ones."""
    best_metric: BestMetric | None = None
    """Validation metric by which the weights for `model.safetensors` are chosen; of equal ones, the later are taken. By
    default it is val/top1 of a classification, val/loss of SimMIM, val/miou of a segmentation, and val/ap of a
    detection. val/top5 exists with more than five classes, val/mask_ap and val/mask_ap50 for detectors with masks."""
    early_stop_epochs: Epochs | None = None
    """The run ends early if no validation has improved on the best one for this many epochs; omit it to train to the
    last step."""
    max_skipped: Positive = 3
    """The run stops after this many consecutive steps with a non-finite loss or gradient. Such steps are skipped and
    their inputs are listed in `skipped.jsonl`."""
    wandb: Text | None = None
    """Weights & Biases project to which the metrics are sent too; requires the package `wandb`."""

    def __post_init__(self) -> None:
        if self.init == "scratch" and self.init_time_noise:
            raise UsageError("init_time_noise: is for inflated weights, but init is scratch; omit the key")
