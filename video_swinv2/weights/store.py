"""Model files: a single safetensors file with weights, architecture, classes, preprocessing and provenance.

Everything but the weights is the *card*, JSON in the metadata of the file. Nothing is ever pickled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from video_swinv2.errors import UserError, first_line
from video_swinv2.files import atomic_write, create_folder, json_text, name_unreadable
from video_swinv2.models.preprocessing import IMAGENET_MEAN, Preprocessing
from video_swinv2.models.swinv2 import IntOrPerAxis, SwinV2
from video_swinv2.records import Record, parse_json, parse_record

CARD_KEY = "video_swinv2"  # the entry of the safetensors metadata that holds the card
MAX_CHANNELS = 64  # of an input
MAX_TENSORS = 100_000  # of a file; each takes about 1 KB, however short it is. The giant model has 1,000
MAX_SIDE = 2**13  # pixels
MAX_INPUT_PIXELS = 2**26  # frames x height x width: 64 frames of 1024 x 1024
FIX = "copy or write the file again"

Count = Annotated[int, Field(ge=0, le=10**6)]
Positive = Annotated[int, Field(ge=1, le=10**5)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Rate = Annotated[float, Field(ge=0, le=1)]
Frames = Annotated[int, Field(ge=1, le=4096)] | None
Channels = Annotated[int, Field(ge=1, le=MAX_CHANNELS)]


@dataclass(frozen=True)
class ModelCard:
    """What a model file records beside its weights."""

    architecture: dict[str, object]
    """The arguments of `SwinV2`."""
    classes: tuple[str, ...]
    """The names of the head's rows, in order; () if unknown."""
    preprocessing: Preprocessing
    provenance: dict[str, object] = field(default_factory=dict)
    """Where the weights came from, as plain data."""
    dense: dict[str, object] = field(default_factory=dict)
    """Of a detector or segmenter: its `task`, and what is built on the architecture, as plain data; otherwise empty."""


class _Architecture(Record):
    """`ModelCard.architecture` in a file. The bounds are far above any real model, but keep its cost within reason."""

    name: str
    embed_dim: Positive
    depths: Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1, max_length=8)]
    num_heads: list[Positive]
    num_classes: Count
    frames: Frames
    image_size: Annotated[list[Side], Field(min_length=2, max_length=2)]
    patch_size: list[Side]
    window: list[Side]
    cpb_norm: list[list[Side]]
    drop_path: Rate
    head_dropout: Rate
    attention: str
    checkpoint_blocks: Count
    extra_norm_every: Count
    in_chans: Channels = 3
    features_only: bool = False


class _Preprocessing(Record):
    """`Preprocessing` in a file."""

    frames: Frames
    frame_stride: Positive
    image_size: Annotated[list[Side], Field(min_length=2, max_length=2)]
    mean: Annotated[list[float], Field(max_length=MAX_CHANNELS)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(max_length=MAX_CHANNELS)]


class _Card(Record, extra="ignore"):
    """`ModelCard` in a file."""

    architecture: _Architecture
    classes: list[str]
    preprocessing: _Preprocessing
    provenance: dict[str, Any] = Field(default_factory=dict)
    dense: dict[str, Any] = Field(default_factory=dict)  # checked by `dense.loading`


def save_model(
    model: nn.Module,
    path: Path | str,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    provenance: Mapping[str, object] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a SwinV2, or a SimMIM, detector or segmenter around one, to a single file, completely or not at all.

    Args:
        classes: the names of the head's rows, in order, () if unknown; by default `model.classes`.
        preprocessing: how frames become the model's input; by default as `own_preprocessing` says.
        provenance: where the weights came from, as plain data.
        weights: written instead of the model's own state dict, for weights that were gathered from several processes.

    Raises UserError if the file cannot be written, if there are more or fewer class names than rows of the head, or if
    the preprocessing is neither given nor known.
    """
    encoder = model if isinstance(model, SwinV2) else getattr(model, "encoder", None)
    if not isinstance(encoder, SwinV2):
        raise TypeError(f"save_model takes a SwinV2, SimMIM, detector or segmenter, not {type(model).__name__}")
    # Detectors and segmenters have a `dense_design`, which says how to build them around the encoder.
    design = getattr(model, "dense_design", None)
    dense: dict[str, Any] = design() if design is not None else {}
    rows = dense.get("num_classes", encoder.num_classes if isinstance(model, SwinV2) else None)
    classes = encoder.classes if classes is None else classes
    preprocessing = own_preprocessing(encoder, path) if preprocessing is None else preprocessing
    if classes and rows is not None and len(classes) != rows:
        raise UserError(f"{path}: {len(classes)} class names for a head of {rows}; give one name per class")
    card = {
        "architecture": encoder.architecture(),
        "classes": list(classes),
        "preprocessing": dataclasses.asdict(preprocessing),
        "provenance": dict(provenance or {}),
    } | ({"dense": dense} if dense else {})
    path = Path(path)
    # safetensors refuses tensors that are not contiguous.
    tensors = {name: t.detach().cpu().contiguous() for name, t in (weights or model.state_dict()).items()}
    create_folder(path.parent)
    with atomic_write(path) as part:
        try:
            save_file(tensors, part, metadata={"format": "pt", CARD_KEY: json_text(card)})
        except SafetensorError as error:  # a full disk and a missing permission among others
            raise UserError(f"{path}: cannot be written ({error}); free space or choose another folder") from error
        # safetensors makes the file readable by its owner only. Give it the permissions of its folder instead.
        part.chmod(path.parent.stat().st_mode & 0o666)


def own_preprocessing(model: SwinV2, path: Path | str) -> Preprocessing:
    """The preprocessing to write to the file `path` for a model: `model.preprocessing`, if it is set.

    For an image model it is otherwise the model's image size with ImageNet's mean and standard deviation, which all
    released SwinV2 weights use. Raises UserError for a clip model without it, because the frame stride that the model
    was trained with cannot be guessed, and for a model whose channels are not RGB.
    """
    if model.preprocessing is not None:
        return model.preprocessing
    if model.frames is not None or model.in_chans != len(IMAGENET_MEAN):
        raise UserError(
            f"{path}: the model does not say which preprocessing it was trained with; set model.preprocessing, such as "
            "to that of its VideoDataset, or pass preprocessing=vs.Preprocessing(frames, frame_stride, image_size)"
        )
    height, width = model.image_size
    return Preprocessing(None, 1, (height, width))


def model_file(path: Path | str) -> Path:
    """The path of a model file, which for a folder is its `model.safetensors`."""
    path = Path(path)
    with name_unreadable(path):
        return path / "model.safetensors" if path.is_dir() else path


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata. Raises UserError if it is missing or damaged."""
    with _open_safetensors(Path(path), "file") as file:
        if (count := len(file.keys())) > MAX_TENSORS:
            raise UserError(f"{path}: has {count:,} tensors, more than {MAX_TENSORS:,}; name a file of weights")
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no dict


@contextmanager
def _open_safetensors(path: Path, what: str) -> Iterator[safe_open]:
    """Open a safetensors file. Raises UserError, which calls it a `what`, if it is missing, unreadable or damaged."""
    try:
        with name_unreadable(path):
            if not path.is_file():
                raise UserError(f"{path}: no such {what}; check the path")
            path.open("rb").close()  # because safetensors calls a file without permission to read missing
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}); copy or download it again") from error


def read_card(path: Path | str) -> ModelCard:
    """The card of a model file; its weights are not read. Raises UserError if the file has no card."""
    path = model_file(path)
    with _open_safetensors(path, "model file") as file:
        card = parse_card(file.metadata() or {}, path)
    if card is None:
        raise UserError(f"{path}: holds weights but no architecture; load it into a model with load_weights")
    return card


def require_rgb(architecture: Mapping[str, object], path: Path | str) -> None:
    """Raise UserError for a model with other inputs than RGB, as which videos and images are read.

    path: the file of the model, for the message.
    """
    channels = architecture.get("in_chans", len(IMAGENET_MEAN))
    if channels != len(IMAGENET_MEAN):
        raise UserError(
            f"{path}: takes inputs of {channels} channels, but videos and images are read as RGB; use the model in "
            "your own code (docs/library.md)"
        )


def parse_card(metadata: Mapping[str, str], path: Path) -> ModelCard | None:
    """The card in the metadata of the safetensors file `path`; None if it has none. Raises UserError for a damaged one.

    A card with unknown keys of architecture or preprocessing, as a later version might write, counts as damaged.
    """
    if CARD_KEY not in metadata:
        return None
    where = f"{path}: its card"
    found = parse_json(metadata[CARD_KEY], where, FIX)
    card = parse_record(found, _Card, where, FIX)
    architecture, preprocessing = card.architecture, card.preprocessing
    pixels = (preprocessing.frames or 1) * math.prod(preprocessing.image_size)
    if pixels > MAX_INPUT_PIXELS:
        raise UserError(f"{where}: an input of {pixels:,} pixels, more than {MAX_INPUT_PIXELS:,}; {FIX}")
    if (architecture.frames is None) != (preprocessing.frames is None):
        raise UserError(f"{where}: frames in either architecture or preprocessing alone; {FIX}")
    if not len(preprocessing.mean) == len(preprocessing.std) == architecture.in_chans:
        raise UserError(f"{where}: mean and std of other than the {architecture.in_chans} channels of the input; {FIX}")
    # A SimMIM file may have class names, but has no head.
    if card.classes and architecture.num_classes not in (0, len(card.classes)):
        raise UserError(f"{where}: {len(card.classes)} classes for a head of {architecture.num_classes}; {FIX}")
    # JSON has no tuples: turn lists back into them.
    return ModelCard(
        found["architecture"],
        tuple(card.classes),
        Preprocessing(
            preprocessing.frames,
            preprocessing.frame_stride,
            (preprocessing.image_size[0], preprocessing.image_size[1]),
            tuple(preprocessing.mean),
            tuple(preprocessing.std),
        ),
        card.provenance,
        card.dense,
    )


def empty_model(architecture: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SwinV2:
    """The model of an architecture on the meta device, which takes no memory, before any is built with memory.

    tensors: those of its file. Raises ValueError if the model has more blocks than the file has tensors, and as
    `SwinV2` does.
    """
    blocks = sum(architecture["depths"])
    if blocks > len(tensors):
        raise ValueError(f"an architecture of {blocks:,} blocks for {len(tensors):,} tensors")
    with torch.device("meta"):
        return SwinV2(**architecture)


def load_model(
    path: Path | str,
    *,
    window: IntOrPerAxis | None = None,
    frames: int | None = None,
    image_size: IntOrPerAxis | None = None,
    attention: str | None = None,
) -> SwinV2:
    """Load the model of a model file, or of a folder's `model.safetensors`, in eval mode, fp32, on the CPU.

    Window, number of frames and image size can be changed without changing the weights, because the log-CPB normaliser
    is taken from the file. `model.classes` and `model.preprocessing` are those of the file, with the sizes asked for.
    Raises UserError if the file is missing, damaged, or not a classifier of this project.
    """
    path = model_file(path)
    card = read_card(path)
    if card.dense:
        raise UserError(f"{path}: a model for {card.dense.get('task')}, not a classifier; load it with vs.load_model")
    tensors, _ = read_tensors(path)
    if any(name.startswith("encoder.") for name in tensors):
        raise UserError(f"{path}: a SimMIM pre-training file has no classifier; fine-tune it with init={path}")
    # The requested changes override the card's architecture; everything else, cpb_norm above all, stays as trained.
    changes = {"window": window, "frames": frames, "image_size": image_size, "attention": attention}
    architecture = card.architecture | {key: value for key, value in changes.items() if value is not None}
    if frames is not None and card.architecture["frames"] is None:
        raise UserError(f"{path}: an image model has no frames; omit frames")
    try:
        # Built without memory or initial values; `assign` then makes the loaded tensors its parameters.
        model = empty_model(architecture, tensors)
        model.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: weights and architecture do not match ({first_line(error)}); convert the weights again"
        ) from error
    height, width = model.image_size
    model.classes = card.classes
    model.preprocessing = dataclasses.replace(card.preprocessing, frames=model.frames, image_size=(height, width))
    return model.eval()
