"""Builds models from checkpoints, inferring their sizes from the tensors; `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_swinv2.errors import UsageError, UserError, first_line
from video_swinv2.files import write_json
from video_swinv2.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from video_swinv2.models.swinv2 import IntOrPerAxis, SwinV2
from video_swinv2.models.variants import find_variant, variant_name
from video_swinv2.models.windows import PerAxis
from video_swinv2.weights.account import Account
from video_swinv2.weights.formats import Checkpoint, read_checkpoint
from video_swinv2.weights.inflate import HEAD, PATCH_KERNEL, fill_model
from video_swinv2.weights.store import empty_model, read_card, save_model

# Tokens and frames in time of an inflated model, unless requested otherwise. They are those of Video Swin, and the
# defaults of create_model.
WINDOW_IN_TIME = 8
PATCH_IN_TIME = 2


@dataclass(frozen=True)
class RequestedSizes:
    """Sizes that should differ from those of the checkpoint; None keeps the checkpoint's.

    `features_only` is as in `create_model`.
    """

    frames: int | None = None
    image_size: IntOrPerAxis | None = None
    patch_size: IntOrPerAxis | None = None
    window: IntOrPerAxis | None = None
    num_classes: int | None = None
    in_chans: int | None = None
    features_only: bool = False


def open_model(
    checkpoint: Checkpoint,
    sizes: RequestedSizes,
    *,
    name: str | None = None,
    cpb_norm: Sequence[Sequence[int]] | None = None,
    classes: Sequence[str] | None = None,
    class_map: Sequence[int] | None = None,
    time_noise: float = 0.0,
    seed: int = 0,
) -> tuple[SwinV2, Account]:
    """Build a model of the checkpoint's own sizes, and load its weights.

    Args:
        sizes: the sizes that should differ; `frames` makes a clip model of image weights, and another `num_classes` a
            fresh head.
        name: a variant of `list_models()`, used instead of the one inferred from the tensors.
        cpb_norm, time_noise, seed: as in `load_weights`.
        classes: the class names of the rows of the head to use, in this order.
        class_map: the numbers of those rows, for a file without class names.

    Returns the model, in eval mode, and the account of every tensor. Raises UserError for weights that do not fit, and
    UsageError for sizes that do not fit or are unknown.
    """
    try:
        architecture = _architecture(checkpoint, name, sizes) | _sizes(checkpoint, sizes)
        wanted = classes if class_map is None else class_map
        if wanted is not None:
            architecture["num_classes"] = len(wanted)
        own_head = wanted is None and sizes.num_classes is None
        _refuse_larger_model(empty_model(architecture, checkpoint.tensors), checkpoint, own_head=own_head)
        model = SwinV2(**architecture).eval()
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: not enough memory
        raise UsageError(f"{checkpoint.source.path}: {first_line(error)}; check the sizes asked for") from error
    account = fill_model(
        model,
        checkpoint,
        classes=classes,
        class_map=class_map,
        cpb_norm=cpb_norm,
        time_noise=time_noise,
        seed=seed,
    )
    return model, account


def _refuse_larger_model(model: SwinV2, checkpoint: Checkpoint, *, own_head: bool) -> None:
    """Raise UserError if `model`, on the meta device, has more parameters than the checkpoint can fill.

    own_head: whether the head, too, is the checkpoint's own.
    """
    # The patch kernel has any length in time, and its other sizes are those of the tensor. A first log-CPB layer has
    # one more column in a clip model than in the image weights that it is inflated from.
    elsewhere = {PATCH_KERNEL} if own_head else {PATCH_KERNEL, *HEAD}
    wanted = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in elsewhere)
    held = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    if wanted > 2 * held:
        raise UserError(
            f"{checkpoint.source.path}: {held:,} parameters in the file and {wanted:,} in the model; choose the model "
            "size of the file (model.name)"
        )


def _architecture(checkpoint: Checkpoint, name: str | None, sizes: RequestedSizes) -> dict[str, Any]:
    """The arguments of the model except those of `_sizes`: from the card, or else inferred from the tensors.

    Those of the variant `name`, and the numbers that `sizes` asks for, override them.
    """
    tensors = checkpoint.tensors
    if checkpoint.card is not None:
        found = dict(checkpoint.card.architecture)
    else:
        depths, heads, extra = _count(checkpoint)
        width = tensors[PATCH_KERNEL].shape[0]
        # The rows of the head. `sum(shape[:1])` is the first size, or 0 for a damaged tensor without axes.
        rows = sum(tensors[HEAD[0]].shape[:1]) if HEAD[0] in tensors else 0
        found = {"embed_dim": width, "depths": depths, "num_heads": heads, "extra_norm_every": extra}
        found |= {"name": variant_name(width, depths), "num_classes": rows}
        # (C, in_chans, *patch)
        found["in_chans"] = sum(tensors[PATCH_KERNEL].shape[1:2])
    if name is not None:
        variant = find_variant(name)
        found |= {"name": name, "embed_dim": variant.embed_dim, "depths": variant.depths}
        found |= {"num_heads": variant.num_heads, "extra_norm_every": variant.extra_norm_every}
    if sizes.num_classes is not None:
        found["num_classes"] = sizes.num_classes
    if sizes.in_chans is not None:
        found["in_chans"] = sizes.in_chans
    if sizes.features_only:
        found |= {"features_only": True, "num_classes": 0}
    return found


def _count(checkpoint: Checkpoint) -> tuple[PerAxis, PerAxis, int]:
    """Infer the depth and the heads of each stage, and `extra_norm_every` (0 for none), from names and shapes."""
    # stage -> block -> number of heads. Every block has one logit scale per head, (heads, 1, 1).
    blocks: dict[int, dict[int, int]] = {}
    extra = set()
    for key, tensor in checkpoint.tensors.items():
        if found := re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.(attn\.logit_scale|enorm\.weight)", key):
            stage, block = int(found[1]), int(found[2])
            if found[3] == "enorm.weight":
                extra.add(block + 1)
            else:
                blocks.setdefault(stage, {})[block] = tensor.shape[0] if tensor.ndim else 0
    stages = sorted(blocks)
    # Stages and the blocks of each have to be numbered 0, 1, 2, ... without a gap.
    if not stages or stages != list(range(len(stages))) or any(len(b) != max(b) + 1 for b in blocks.values()):
        raise UserError(
            f"{checkpoint.source.path}: blocks or their attn.logit_scale are missing; copy or download the file again"
        )
    depths = tuple(len(blocks[stage]) for stage in stages)
    heads = tuple(blocks[stage][0] for stage in stages)
    # An extra norm follows every n-th block, so the first of them follows block n - 1, and `extra` holds n.
    return depths, heads, min(extra, default=0)


def _sizes(checkpoint: Checkpoint, wanted: RequestedSizes) -> dict[str, Any]:
    """Frames, image size, patch size and window of the model: as requested, or else as the weights were trained.

    The latter come from the card, from Microsoft's buffers, or from `checkpoint.pretrained`. Raises UsageError for a
    size that is neither known nor requested.
    """
    card, pretrained = checkpoint.card, checkpoint.pretrained
    frames: Any = card.architecture["frames"] if card is not None else None
    kernel: PerAxis = tuple(checkpoint.tensors[PATCH_KERNEL].shape[2:])
    window: Any = card.architecture["window"] if card is not None else _table_window(checkpoint)
    image_size: Any = card.architecture["image_size"] if card is not None else None
    # Without a card, the window comes from the buffers or else from the configuration, and the image size from the
    # configuration or else from the buffers.
    if window is None and pretrained is not None:
        window = (pretrained.window,) * 2
    if image_size is None:
        image_size = pretrained.image_size if pretrained is not None else _masked_size(checkpoint)
    # Image weights for a clip model: patch and window get their first axis, time. An unknown window stays None.
    inflated = wanted.frames is not None and frames is None and len(kernel) == 2
    if inflated:
        kernel, window = (PATCH_IN_TIME, *kernel), window and (WINDOW_IN_TIME, *window)
    found = {
        "frames": frames if wanted.frames is None else wanted.frames,
        "image_size": image_size if wanted.image_size is None else wanted.image_size,
        "patch_size": kernel if wanted.patch_size is None else wanted.patch_size,
        "window": window if wanted.window is None else wanted.window,
    }
    # A patch kernel with three axes is that of a clip model, whose tensors do not depend on the number of frames.
    if len(kernel) == 3 and found["frames"] is None:
        raise UsageError(f"{checkpoint.source.path}: belongs to a clip model; give the number of frames (--frames 16)")
    for key, example in (("image_size", "224"), ("window", "8,7,7" if inflated else "7")):
        if found[key] is None:
            option = f"--{key.replace('_', '-')} {example}"
            raise UsageError(f"{checkpoint.source.path}: does not contain {key}; give it ({option})")
    # The card's normaliser is (h, w), which a clip model cannot be built with. With None, the model takes its own
    # normaliser, and loading the weights replaces that in space.
    return found | {"cpb_norm": None} if inflated else found


def _table_window(checkpoint: Checkpoint) -> PerAxis | None:
    """The window (Wh, Ww), from Microsoft's coordinate table (1, 2Wh - 1, 2Ww - 1, 2) of the first block, or None."""
    table = checkpoint.derived.get("layers.0.blocks.0.attn.relative_coords_table")
    return None if table is None else tuple((n + 1) // 2 for n in table.shape[1:-1])


def _masked_size(checkpoint: Checkpoint) -> PerAxis | None:
    """The image size (H, W), from Microsoft's attention mask (windows, N, N) of the first shifted block, or None.

    Images and windows are square there, so the image has sqrt(windows) windows of sqrt(N) tokens of one patch per side.
    """
    mask = checkpoint.derived.get("layers.0.blocks.1.attn_mask")
    if mask is None or mask.ndim != 3:
        return None
    side = math.isqrt(mask.shape[0]) * math.isqrt(mask.shape[1]) * checkpoint.tensors[PATCH_KERNEL].shape[-1]
    return (side, side)


def classes_in_checkpoint(checkpoint: Checkpoint, model: SwinV2, rows: Sequence[int] | None = None) -> tuple[str, ...]:
    """The checkpoint's own names of the model's classes, after the selection of `rows`; () if they are unknown."""
    found = checkpoint.classes
    # Names that are too few for the selected rows, or that do not fit the model's head, are dropped as a whole.
    if rows is not None and found:
        found = tuple(found[row] for row in rows if row < len(found))
    return found if len(found) == model.num_classes else ()


def preprocessing_of(model: SwinV2, checkpoint: Checkpoint, frame_stride: int | None = None) -> Preprocessing:
    """The preprocessing for a model of a checkpoint: its own sizes, with mean and std from the card of the checkpoint.

    Without a card, these are ImageNet's, which all released SwinV2 models use. If the model has another number of
    channels, each gets their average. The frame stride is the given one, or else that of the card, or else 1.
    """
    height, width = model.image_size
    known = checkpoint.card.preprocessing if checkpoint.card is not None else None
    stride = frame_stride or (known.frame_stride if known is not None else 1)
    mean, std = (known.mean, known.std) if known is not None else (IMAGENET_MEAN, IMAGENET_STD)
    if len(mean) != model.in_chans:
        mean, std = ((sum(numbers) / len(numbers),) * model.in_chans for numbers in (mean, std))
    return Preprocessing(model.frames, stride, (height, width), mean, std)


def from_pretrained(
    path: Path | str,
    *,
    num_classes: int | None = None,
    frames: int | None = None,
    frame_stride: int | None = None,
    image_size: IntOrPerAxis | None = None,
    patch_size: IntOrPerAxis | None = None,
    window: IntOrPerAxis | None = None,
    in_chans: int | None = None,
    features_only: bool = False,
    cpb_norm: Sequence[Sequence[int]] | None = None,
    time_noise: float = 0.0,
    seed: int = 0,
) -> SwinV2:
    """Build a model from a file or Hub folder of any known layout, with its weights, in eval mode, fp32, on the CPU.

    Args:
        path: the file or folder.
        num_classes: number of outputs of the head; a number other than the file's gives a fresh head, and 0 none.
        frames: frames per clip; makes a clip model of image weights.
        frame_stride: distance between the frames of a clip, in frames of the video. It is part of
            `model.preprocessing`, and has no influence on the weights.
        image_size, patch_size, window: as in `create_model`; by default as the weights were trained.
        in_chans: channels of the input. RGB kernels are adapted as in timm: summed for one channel, and repeated and
            scaled for other numbers.
        features_only: as in `create_model`.
        cpb_norm, time_noise, seed: as in `load_weights`.

    `model.classes` and `model.preprocessing` are those of the file. The latter is None for a clip model whose frame
    stride is neither in the file nor given. If some layers keep their fresh weights, the account of the tensors is
    printed to standard error. Raises UserError for weights that cannot be read or explained, and UsageError for sizes
    that do not fit or are unknown.
    """
    sizes = RequestedSizes(frames, image_size, patch_size, window, num_classes, in_chans, features_only)
    checkpoint = read_checkpoint(path)
    model, account = open_model(checkpoint, sizes, cpb_norm=cpb_norm, time_noise=time_noise, seed=seed)
    # A fresh head of as many classes as the file's would have its names by mistake.
    if not account.initialised.keys() & {*HEAD}:
        model.classes = classes_in_checkpoint(checkpoint, model)
    of_clips = checkpoint.card is not None and checkpoint.card.preprocessing.frames is not None
    if model.frames is None or of_clips or frame_stride is not None:
        model.preprocessing = preprocessing_of(model, checkpoint, frame_stride)
    if account.initialised:
        print(account, file=sys.stderr)
    return model


def save_pretrained(
    model: SwinV2,
    folder: Path | str,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    provenance: Mapping[str, object] | None = None,
) -> None:
    """Write a Hub-style folder: `model.safetensors`, and `config.json` with a readable copy of its card.

    The arguments, their defaults and the errors are those of `save_model`.
    """
    folder = Path(folder)
    file = folder / "model.safetensors"
    save_model(model, file, classes=classes, preprocessing=preprocessing, provenance=provenance)
    write_json(folder / "config.json", {"library_name": "video_swinv2", **dataclasses.asdict(read_card(file))})


# Users of timm and Hugging Face look for these two on the class. They are attached here because `models` must not
# import `weights`; see the note in SwinV2.
SwinV2.from_pretrained = staticmethod(from_pretrained)
SwinV2.save_pretrained = save_pretrained
