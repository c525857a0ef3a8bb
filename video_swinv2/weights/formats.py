"""Whose checkpoint is this: read it without running code from it, and give its tensors Microsoft's names."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from video_swinv2.errors import UserError
from video_swinv2.weights.store import ModelCard, model_file, parse_card, read_tensors

DERIVED = ("relative_coords_table", "relative_position_index", "attn_mask")
WRAPPERS = ("model", "state_dict", "module")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors under Microsoft's names, `encoder.` taken off; what SimMIM adds is `mask_token` and `decoder.*`."""

    path: Path
    layout: str
    tensors: dict[str, Tensor]
    derived: dict[str, Tensor]
    """Buffers of the file that depend on its window only; kept to read the log-CPB normaliser from them."""
    card: ModelCard | None

    @property
    def cpb_norm(self) -> list[tuple[int, ...]] | None:
        """The normaliser of every stage: from the card, else from the coordinate tables in the file, else unknown."""
        if self.card is not None:
            return [tuple(norm) for norm in self.card.architecture["cpb_norm"]]  # type: ignore[attr-defined]
        return norm_from_tables(self.derived)


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a safetensors file or a torch checkpoint and recognise its layout by content.

    UserError for a file that is missing, damaged, not a SwinV2, or that needs code of its own to be read.
    """
    path = model_file(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    card = None
    if path.suffix == ".safetensors":
        tensors, metadata = read_tensors(path)
        card = parse_card(metadata)
    else:
        tensors = unwrap(_read_torch(path), path)
    layout, tensors = to_microsoft(tensors, path)
    if card is not None:
        layout = f"{card.architecture['name']} of this project, {'SimMIM' if layout == 'SimMIM' else 'classifier'}"
    derived = {name: t for name, t in tensors.items() if name.endswith(DERIVED)}
    tensors = {name: t for name, t in tensors.items() if name not in derived}
    return Checkpoint(path, layout, tensors, derived, card)


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds Python objects besides tensors, which are never executed here; "
            "save its state dict alone, as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]})") from error


def unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside {'model': ...}, {'state_dict': ...} and a `module.` prefix."""
    while isinstance(content, Mapping) and not all(isinstance(v, Tensor) for v in content.values()):
        inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            raise UserError(f"{path}: no state dict in it, only {sorted(map(str, content))[:5]}")
        content = inner[0]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: no state dict in it")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def to_microsoft(tensors: dict[str, Tensor], path: Path) -> tuple[str, dict[str, Tensor]]:
    """The layout's name and the tensors under Microsoft's SwinV2 names; UserError if this is no SwinV2."""
    layout = "Microsoft SwinV2"
    if any(name.startswith("encoder.") for name in tensors):
        layout = "SimMIM"
        tensors = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}
    # The released SimMIM files call the bias network rpe_mlp (Swin-Transformer issue 271).
    tensors = {name.replace(".rpe_mlp.", ".cpb_mlp."): tensor for name, tensor in tensors.items()}
    if "patch_embed.proj.weight" in tensors and any(n.endswith("relative_position_bias_table") for n in tensors):
        raise UserError(
            f"{path}: a Swin V1 checkpoint (it has relative_position_bias_table); this needs SwinV2 weights"
        )
    if "patch_embed.proj.weight" not in tensors or not any(".attn.cpb_mlp." in name for name in tensors):
        example = next(iter(tensors))
        raise UserError(f"{path}: not a SwinV2 checkpoint of a known layout (its first key is {example!r})")
    return layout, tensors


def norm_from_tables(derived: Mapping[str, Tensor]) -> list[tuple[int, ...]] | None:
    """Read the normaliser back from coordinate tables (1, 2Wh - 1, 2Ww - 1, 2), one stage after the other.

    The last entry of an axis is log2(1 + 8 (W - 1) / (norm - 1)) / 3 with W known from the shape. None without tables,
    or if a window of 1 hides it.
    """
    stages: dict[int, tuple[int, ...]] = {}
    for name, table in derived.items():
        stage = re.match(r"layers\.(\d+)\.blocks\.\d+\.attn\.relative_coords_table$", name)
        if stage is None:
            continue
        sizes = [(n + 1) // 2 for n in table.shape[1:-1]]
        corner = table.reshape(-1, len(sizes))[-1].double().tolist()
        if any(w == 1 or not math.isfinite(t) or t <= 0 for w, t in zip(sizes, corner, strict=True)):
            return None
        stages[int(stage[1])] = tuple(
            round(8 * (w - 1) / (2 ** (3 * t) - 1)) + 1 for w, t in zip(sizes, corner, strict=True)
        )
    return [stages[i] for i in sorted(stages)] or None
