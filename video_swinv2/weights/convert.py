"""Converts checkpoints of any known layout to model files or Hub-style folders, and model files to other sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import read_class_list, refuse_special_file, sha256
from video_swinv2.weights.account import Account
from video_swinv2.weights.formats import read_checkpoint
from video_swinv2.weights.pretrained import (
    RequestedSizes,
    classes_in_checkpoint,
    open_model,
    preprocessing_of,
    save_pretrained,
)
from video_swinv2.weights.store import save_model


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
    """Convert the checkpoint `source` and write it to `out`, a `*.safetensors` file or a folder.

    Args:
        sizes: the sizes that should differ from the checkpoint's.
        name: a variant of `list_models()`, as in `open_model`.
        cpb_norm: one log-CPB normaliser per stage, used for both height and width.
        classes: a file with one class name per line. If the checkpoint has class names, the file selects rows of the
            head by name; otherwise it names the rows.
        class_map: a file that selects rows of the head by number (see `read_class_map`); `classes` then names the
            selected rows.
        frame_stride: distance between the frames of a clip, in frames of the video; by default the checkpoint's, or 1.

    Returns the account of every tensor. Raises UserError and UsageError as `open_model` does. A model file is written
    completely or not at all.
    """
    # Refuse wrong options before the checkpoint is read, which takes long if it is large.
    for key, value in (("--frames", sizes.frames), ("--frame-stride", frame_stride)):
        if value is not None and value < 1:
            raise UsageError(f"{key} {value}: give a number of at least 1, or omit the option")
    to_file = out.suffix == ".safetensors"
    if out.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise UsageError(
            f"{out}: weights are not written in this format; give a name that ends in .safetensors, or a folder"
        )
    checkpoint = read_checkpoint(source)
    # A conversion may drop tensors, so it must not overwrite the checkpoint that it is made from.
    target = out if to_file else out / "model.safetensors"
    if target.resolve() in [file.resolve() for file in checkpoint.source.files]:
        raise UsageError(f"{out}: is the checkpoint itself; choose another name")
    # Without a map, `names` selects rows or names all of them, which `open_model` checks. With a map, it names the
    # selected rows, so there has to be one name for each.
    names = read_class_list(classes) if classes is not None else None
    if names == ():
        raise UsageError(f"{classes}: contains no class names; one name per line")
    rows = read_class_map(class_map) if class_map is not None else None
    if names is not None and rows is not None and len(names) != len(rows):
        raise UsageError(f"{classes}: {len(names)} names for the {len(rows)} rows of {class_map}; one name per row")
    norms = None if cpb_norm is None else [(norm, norm) for norm in cpb_norm]
    model, account = open_model(checkpoint, sizes, name=name, cpb_norm=norms, classes=names, class_map=rows)
    class_names = names if names is not None else classes_in_checkpoint(checkpoint, model, rows)
    preprocessing = preprocessing_of(model, checkpoint, frame_stride)
    # Recorded in the card, so that a model file can be traced to the exact bytes that it was made from.
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
    """Read the rows of a larger head that the new classes use, one number per line, as in Microsoft's map22kto1k.txt.

    Raises UserError for a file that cannot be read, and UsageError, naming the line, for one that is not a row number.
    """
    refuse_special_file(path)
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
