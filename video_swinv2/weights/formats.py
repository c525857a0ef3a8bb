"""Reads checkpoints of any known format, and gives their tensors Microsoft's names and their sizes in training.

Nothing in a file is ever executed; see `unpickle`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from video_swinv2.errors import UserError, first_line
from video_swinv2.files import name_unreadable
from video_swinv2.models.windows import PerAxis
from video_swinv2.weights import families
from video_swinv2.weights.families import PretrainedConfig
from video_swinv2.weights.folders import CheckpointFiles, find_checkpoint_files
from video_swinv2.weights.layouts import UnknownLayoutError, to_microsoft
from video_swinv2.weights.store import ModelCard, parse_card, read_tensors
from video_swinv2.weights.unpickle import CallRefusedError, read_inert

# Suffixes of buffers that Microsoft's models save although they follow from the window and the image size.
DERIVED = ("relative_coords_table", "relative_position_index", "attn_mask")
# Keys under which training checkpoints hold a state dict, in order of preference: averaged weights (EMA) come first.
AVERAGED = ("state_dict_ema", "model_ema")
WRAPPERS = (*AVERAGED, "model", "state_dict", "module")
# Prefixes that wrappers add to all names: DistributedDataParallel, Lightning and the like, torch.compile.
PREFIXES = re.compile(r"^((module|model|_orig_mod)\.)+")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: tensors under Microsoft's names, and what is known about their training.

    Names have no `encoder.` prefix. SimMIM files also have `mask_token` and `decoder.*`.
    """

    source: CheckpointFiles
    layout: str
    tensors: dict[str, Tensor]
    derived: dict[str, Tensor]
    """Buffers computed from sizes, kept because window, image size and normaliser can be inferred from them."""
    dropped: dict[str, str]
    """Parts of tensors that have no effect, with the reason."""
    card: ModelCard | None
    """The card of a model file of this project; None for any other checkpoint."""
    pretrained: PretrainedConfig | None
    """The sizes in training, if a configuration, the layout or the name of a released file gives them."""
    classes: tuple[str, ...]
    """The names of the head's rows, in order; () if unknown."""
    notes: list[str] = field(default_factory=list)

    @property
    def cpb_norm(self) -> tuple[list[PerAxis] | None, str]:
        """The log-CPB normaliser of each stage, or None if it is unknown; and where it comes from, for messages."""
        if self.card is not None:
            return [tuple(norm) for norm in self.card.architecture["cpb_norm"]], "the file's card"  # type: ignore[attr-defined]  # plain data
        norms = norm_from_tables(self.derived)
        if norms is not None:
            return norms, "the file's coordinate tables"
        if self.pretrained is not None:
            return self.pretrained.cpb_norm, self.pretrained.source
        return None, ""


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint file or folder, and recognise its layout by its contents.

    Raises UserError for a checkpoint that is missing, damaged, not a SwinV2, or that cannot be read without executing
    it.
    """
    source = find_checkpoint_files(path)
    tensors, extras, card, notes = _read_files(source)
    try:
        named = to_microsoft(tensors)
    except UnknownLayoutError as error:
        raise UserError(f"{path}: {error}") from error
    layout = named.layout
    if card is not None:
        kind = {"SimMIM": "SimMIM", "dense": f"model for {card.dense.get('task')}"}.get(layout, "classifier")
        layout = f"{card.architecture['name']} of this project, {kind}"
    derived = {name: t for name, t in named.tensors.items() if name.endswith(DERIVED)}
    # The closer a source is to the weights, the more it is trusted: first a configuration inside the checkpoint, then
    # one beside it, then what its layout implies, and last its name.
    pretrained = (
        families.config_from_extras(extras)
        or families.config_from_json(source.config)
        or families.config_from_layout(layout, list(tensors))
        or families.released_config_for(source.name)
    )
    tables = norm_from_tables(derived)
    if pretrained is not None and tables is not None and tables != pretrained.cpb_norm:
        pretrained = None  # the tables in the file are right, so the configuration belongs to other weights
    return Checkpoint(
        source,
        layout,
        {name: t for name, t in named.tensors.items() if name not in derived},
        derived,
        named.dropped,
        card,
        pretrained,
        card.classes if card is not None else families.classes_from_json(source.config),
        notes,
    )


def _read_files(source: CheckpointFiles) -> tuple[dict[str, Tensor], Mapping[str, Any], ModelCard | None, list[str]]:
    """Read all files: tensors under their own names, other contents, the card, and notes for the account."""
    tensors: dict[str, Tensor] = {}
    for file in source.files:
        if _is_safetensors(file):
            found, metadata = read_tensors(file)
            content: object = found
            card = parse_card(metadata, file)
        else:
            content, card = _read_torch(file), None
        state, notes = unwrap(content, file)
        tensors |= state
    # With several files, card, notes and other contents are those of the last one; the tensors are from all of them.
    absent = [name for name in source.index or {} if PREFIXES.sub("", name) not in tensors]
    if absent:
        raise UserError(
            f"{source.path}: {absent[0]} is in the index but in none of its files; download the folder again"
        )
    _refuse_shared_bytes(source, tensors)
    return tensors, content if isinstance(content, Mapping) else {}, card, notes


def _refuse_shared_bytes(source: CheckpointFiles, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError if the tensors together have more bytes than the files.

    No part of a SwinV2 shares its weights with another. In a small file, thousands of blocks could share theirs, and
    the model would have a copy for each.
    """
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    held = sum(file.stat().st_size for file in source.files)
    if declared > held:
        raise UserError(
            f"{source.path}: its tensors have {declared:,} bytes, but the file {held:,}: several share the same bytes, "
            "which no SwinV2 needs; save a copy of each"
        )


def _is_safetensors(file: Path) -> bool:
    """Whether a file is safetensors, by its suffix or its contents.

    Such a file begins with 8 bytes of length and then a JSON header, so its 9th byte is a brace. torch's zip files
    begin with "PK".
    """
    with name_unreadable(file), file.open("rb") as opened:
        start = opened.read(9)
    return file.suffix == ".safetensors" or (start[8:] == b"{" and start[:2] != b"PK")


def _read_torch(file: Path) -> object:
    """Read a file of `torch.save`. Raises UserError if it would run code, is damaged, or is something else."""
    try:
        return read_inert(file)
    except CallRefusedError as error:
        fix = "if you trust it, save its state dict as safetensors"
        raise UserError(f"{file}: {error}, and nothing in a file is ever executed here; {fix}") from error
    except Exception as error:  # in a damaged file, almost anything may fail
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: cannot be read as a checkpoint ({first_line(error)}); copy or download it again")


def unwrap(content: object, file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Find the state dict in a checkpoint such as {'model': ...} or {'state_dict': ...}, and strip prefixes of names.

    Averaged weights take precedence over plain ones, as in timm, because they are the ones that were evaluated. Returns
    the state dict and notes for the account.
    """
    notes: list[str] = []
    # Wrappers may be nested. The loop is limited so that a file whose dict contains itself cannot make it endless.
    for _ in WRAPPERS:
        if not isinstance(content, Mapping) or all(isinstance(v, Tensor) for v in content.values()):
            break
        key = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            whole = " (a whole model?)" if "_modules" in content else ""
            found = ", ".join(sorted(map(str, content))[:5])
            raise UserError(f"{file}: contains no state dict{whole}, only {found}; save model.state_dict()")
        if key in AVERAGED:
            notes.append(f"averaged weights ({key}) loaded; the plain ones in the file were ignored")
        content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{file}: contains no state dict; save model.state_dict()")
    state = {PREFIXES.sub("", str(name)): tensor for name, tensor in content.items()}
    if len(state) != len(content):
        raise UserError(f"{file}: two tensors have the same name without 'module.' or 'model.'; remove one")
    return state, notes


def norm_from_tables(derived: Mapping[str, Tensor]) -> list[PerAxis] | None:
    """Recover the normaliser of each stage from Microsoft's coordinate tables (1, 2Wh - 1, 2Ww - 1, 2).

    A table holds all offsets between two tokens of a window, log-spaced as in Microsoft's code. Along an axis of W
    tokens, the largest offset, at the table's end, is t = log2(1 + 8 (W - 1) / (norm - 1)) / 3. W is known from the
    shape, so norm = 8 (W - 1) / (2^(3t) - 1) + 1. Returns None without tables, or if the normaliser cannot be
    recovered, as for a window of 1, whose only offset is 0.
    """
    stages: dict[int, PerAxis] = {}
    for name, table in derived.items():
        stage = re.match(r"layers\.(\d+)\.blocks\.\d+\.attn\.relative_coords_table$", name)
        if stage is None:
            continue
        # 4 axes for images, 5 for clips: (1, offsets per axis..., number of axes).
        if table.ndim not in (4, 5) or table.shape[-1] != table.ndim - 2 or table.numel() == 0:
            return None
        sizes = [(n + 1) // 2 for n in table.shape[1:-1]]
        corner = table[(-1,) * (table.ndim - 1)].double().tolist()
        # Refuse implausible values: about 0.05 is an offset of one token at a normaliser of 80, and about 4 is a window
        # of 500 at a normaliser of 2. The comparison is also false for NaN.
        if any(w == 1 or not 0.05 < t < 4 for w, t in zip(sizes, corner, strict=True)):
            return None
        stages[int(stage[1])] = tuple(
            round(8 * (w - 1) / (2 ** (3 * t) - 1)) + 1 for w, t in zip(sizes, corner, strict=True)
        )
    return [stages[i] for i in sorted(stages)] or None
