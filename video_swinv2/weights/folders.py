"""Where a checkpoint's tensors are: one file, a folder as the Hub has them, or one cut into shards by an index."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from video_swinv2.errors import UserError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
INDEX = ".index.json"


@dataclass(frozen=True)
class Source:
    """The files of one checkpoint."""

    path: Path
    """As it was given, for messages."""
    files: tuple[Path, ...]
    shards: dict[str, str] | None = None
    """Tensor name to file name, where an index says it."""
    config: dict[str, Any] = field(default_factory=dict)
    """The config.json beside the weights, {} without."""

    @property
    def name(self) -> str:
        """What the checkpoint is called: the file's stem, or the folder's name."""
        return self.path.resolve().name if self.path.is_dir() else self.path.stem


def locate(path: Path | str) -> Source:
    """The files behind `path`; UserError where there is none or an index names files outside of its folder."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    file = path
    if path.is_dir():
        present = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not present:
            raise UserError(f"{path}: none of {', '.join(WEIGHTS)} in this folder; give the file itself")
        file = present[0]
    config = _json(file.with_name("config.json")) if file.name in WEIGHTS else {}
    if not file.name.endswith(INDEX):
        return Source(path, (file,), None, config)
    shards = _json(file).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{file}: no weight_map in it; download it again")
    for name in shards.values():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name or "\\" in name:
            raise UserError(f"{file}: names {name!r}, which is not a file of this folder; nothing was read")
    files = tuple(file.with_name(name) for name in sorted(set(shards.values())))
    missing = [shard.name for shard in files if not shard.is_file()]
    if missing:
        raise UserError(f"{file}: {missing[0]} is not there ({len(missing)} of {len(files)} missing); download it too")
    return Source(path, files, shards, config)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({str(error).splitlines()[0]}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object; download it again")
    return content
