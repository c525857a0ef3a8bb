"""Any known checkpoint to a model file or a Hub-style folder; a model file of ours to other windows and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import read_class_list, sha256
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.weights.account import Account
from video_swinv2.weights.formats import Checkpoint, read_checkpoint
from video_swinv2.weights.pretrained import Sizes, open_model, save_pretrained
from video_swinv2.weights.store import Preprocessing, save_model


def convert(
    source: Path,
    out: Path,
    sizes: Sizes,
    *,
    name: str | None = None,
    cpb_norm: Sequence[int] | None = None,
    classes: Path | None = None,
    class_map: Path | None = None,
    frame_stride: int | None = None,
) -> Account:
    """Write the weights of `source` to `out`, `*.safetensors` or a folder, and account for every tensor.

    cpb_norm: one normaliser per stage, for height and width. classes: a file with one class name per line: the names of
    the head's rows where the checkpoint does not know them, else the rows wanted. class_map: a file that picks rows of
    the head by number (see `read_class_map`); `classes` then names those picked. frame_stride: in frames of the video;
    by default as the file says, else 1. UserError and UsageError as in `open_model`; `out` is written whole or not.
    """
    for key, value in (("--frames", sizes.frames), ("--frame-stride", frame_stride)):
        if value is not None and value < 1:
            raise UsageError(f"{key} {value}: give a number from 1 on, or leave it away")
    file = out.suffix == ".safetensors"
    if out.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise UsageError(f"{out}: give a name that ends in .safetensors, or a folder")
    checkpoint = read_checkpoint(source)
    target = out if file else out / "model.safetensors"
    if target.resolve() in [read.resolve() for read in checkpoint.source.files]:
        raise UsageError(f"{out}: is the checkpoint itself; give another name")
    names = read_class_list(classes) if classes is not None else None
    if names == ():
        raise UsageError(f"{classes}: contains no class names; one name per line")
    rows = read_class_map(class_map) if class_map is not None else None
    if names is not None and rows is not None and len(names) != len(rows):
        raise UsageError(f"{classes}: {len(names)} names for the {len(rows)} rows of {class_map}; one name per row")
    norms = None if cpb_norm is None else [(norm, norm) for norm in cpb_norm]
    model, account = open_model(checkpoint, sizes, name=name, cpb_norm=norms, classes=names, class_map=rows)
    known = names if names is not None else _known_classes(checkpoint, model, rows)
    preprocessing = preprocessing_of(model, checkpoint, frame_stride)
    provenance = {
        "converted_from": checkpoint.source.name,
        "sha256": {file.name: sha256(file) for file in checkpoint.source.files},
        "layout": checkpoint.layout,
        "notes": account.notes,
        "provenance": account.provenance,
    }
    if file:
        save_model(model, out, classes=known, preprocessing=preprocessing, provenance=provenance)
    else:
        save_pretrained(model, out, classes=known, preprocessing=preprocessing, provenance=provenance)
    return account


def read_class_map(path: Path) -> tuple[int, ...]:
    """A row of a larger head per line, in the order of the classes wanted: Microsoft's map22kto1k.txt is such a file.

    UserError for an unreadable file, UsageError naming the line that is no row number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: class map cannot be read ({error}); give a text file, one number per line") from error
    rows: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not line.strip().isdecimal():
            raise UsageError(f"{path}, line {number}: {line.strip()!r} is no row number; one number from 0 on per line")
        rows.append(int(line))
    if not rows:
        raise UsageError(f"{path}: holds no row numbers; one number from 0 on per line")
    return tuple(rows)


def _known_classes(checkpoint: Checkpoint, model: SwinV2, rows: Sequence[int] | None) -> tuple[str, ...]:
    """The checkpoint's own names of the model's classes; () where it has none."""
    found = checkpoint.classes
    if rows is not None and found:
        found = tuple(found[row] for row in rows if row < len(found))
    return found if len(found) == model.num_classes else ()


def preprocessing_of(model: SwinV2, checkpoint: Checkpoint, frame_stride: int | None = None) -> Preprocessing:
    """As the file's card says, at the new model's sizes; every released SwinV2 takes ImageNet's mean and deviation."""
    height, width = model.image_size
    known = checkpoint.card.preprocessing if checkpoint.card is not None else None
    stride = frame_stride or (known.frame_stride if known is not None else 1)
    if known is None:
        return Preprocessing(model.frames, stride, (height, width))
    return Preprocessing(model.frames, stride, (height, width), known.mean, known.std)
