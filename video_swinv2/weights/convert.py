"""Converts any known checkpoint to a model file or Hub-style folder, and our own files to other windows and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import read_class_list, sha256
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.weights.account import Account
from video_swinv2.weights.formats import Checkpoint, read_checkpoint
from video_swinv2.weights.pretrained import RequestedSizes, open_model, save_pretrained
from video_swinv2.weights.store import Preprocessing, save_model


def convert(
    source: Path,
    out: Path,
    sizes: RequestedSizes,
    *,
    name: str | None = None,
    cpb_norm: Sequence[int] | None = None,
    classes: Path | None = None,
    class_map: Path | None = None,
    frame_stride: int | None = None,
) -> Account:
    """Write the weights of `source` to `out`, a `*.safetensors` file or a folder; returns the account of every tensor.

    Args:
        sizes: sizes that differ from the checkpoint's.
        cpb_norm: one normaliser per stage, for both height and width.
        classes: a file with one class name per line. It names the head's rows if the checkpoint does not, and selects
            rows by name if it does.
        class_map: a file that selects rows of the head by number (`read_class_map`); `classes` then names the
            selected rows.
        frame_stride: in frames of the video; by default the checkpoint's, or 1.

    UserError and UsageError as in `open_model`. `out` is written completely or not at all.
    """
    for key, value in (("--frames", sizes.frames), ("--frame-stride", frame_stride)):
        if value is not None and value < 1:
            raise UsageError(f"{key} {value}: give a number of at least 1, or omit the option")
    to_file = out.suffix == ".safetensors"
    if out.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise UsageError(
            f"{out}: weights are not written in this format; give a name that ends in .safetensors, or a folder"
        )
    checkpoint = read_checkpoint(source)
    target = out if to_file else out / "model.safetensors"
    if target.resolve() in [file.resolve() for file in checkpoint.source.files]:
        raise UsageError(f"{out}: is the checkpoint itself; choose another name")
    names = read_class_list(classes) if classes is not None else None
    if names == ():
        raise UsageError(f"{classes}: contains no class names; one name per line")
    rows = read_class_map(class_map) if class_map is not None else None
    if names is not None and rows is not None and len(names) != len(rows):
        raise UsageError(f"{classes}: {len(names)} names for the {len(rows)} rows of {class_map}; one name per row")
    norms = None if cpb_norm is None else [(norm, norm) for norm in cpb_norm]
    model, account = open_model(checkpoint, sizes, name=name, cpb_norm=norms, classes=names, class_map=rows)
    class_names = names if names is not None else _classes_in_checkpoint(checkpoint, model, rows)
    preprocessing = preprocessing_of(model, checkpoint, frame_stride)
    provenance = {
        "converted_from": checkpoint.source.name,
        "sha256": {file.name: sha256(file) for file in checkpoint.source.files},
        "layout": checkpoint.layout,
        "notes": account.notes,
        "provenance": account.provenance,
    }
    if to_file:
        save_model(model, out, classes=class_names, preprocessing=preprocessing, provenance=provenance)
    else:
        save_pretrained(model, out, classes=class_names, preprocessing=preprocessing, provenance=provenance)
    return account


def read_class_map(path: Path) -> tuple[int, ...]:
    """Rows of a larger head, one number per line in the order of the new classes, as in Microsoft's map22kto1k.txt.

    UserError for an unreadable file, UsageError naming a line that is not a row number.
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
            raise UsageError(
                f"{path}, line {number}: {line.strip()!r} is not a row number; give one number from 0 on per line"
            )
        rows.append(int(line))
    if not rows:
        raise UsageError(f"{path}: holds no row numbers; give one number from 0 on per line")
    return tuple(rows)


def _classes_in_checkpoint(checkpoint: Checkpoint, model: SwinV2, rows: Sequence[int] | None) -> tuple[str, ...]:
    """The checkpoint's own names for the model's classes; () if it has none."""
    found = checkpoint.classes
    if rows is not None and found:
        found = tuple(found[row] for row in rows if row < len(found))
    return found if len(found) == model.num_classes else ()


def preprocessing_of(model: SwinV2, checkpoint: Checkpoint, frame_stride: int | None = None) -> Preprocessing:
    """The preprocessing of the file's card with the new model's sizes; released SwinV2s use ImageNet's mean and std."""
    height, width = model.image_size
    known = checkpoint.card.preprocessing if checkpoint.card is not None else None
    stride = frame_stride or (known.frame_stride if known is not None else 1)
    if known is None:
        return Preprocessing(model.frames, stride, (height, width))
    return Preprocessing(model.frames, stride, (height, width), known.mean, known.std)
