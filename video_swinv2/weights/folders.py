"""Finds the files of a checkpoint: a single file, a Hub-style folder, or a folder with several indexed files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from video_swinv2.errors import UserError
from video_swinv2.files import name_unreadable
from video_swinv2.records import read_json

# Hugging Face's names for weights. The first one that exists is read, so safetensors is preferred to pickle.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
INDEX = ".index.json"


@dataclass(frozen=True)
class CheckpointFiles:
    """The files that make up one checkpoint."""

    path: Path
    """As given by the user, for messages."""
    files: tuple[Path, ...]
    index: dict[str, str] | None = None
    """The file name of each tensor, if the checkpoint has an index over several files."""
    config: dict[str, Any] = field(default_factory=dict)
    """The contents of config.json beside the weights; {} if there is none."""

    @property
    def name(self) -> str:
        """The name of the checkpoint: the stem of the file, or the name of the folder."""
        return self.path.resolve().name if self.path.is_dir() else self.path.stem


def find_checkpoint_files(path: Path | str) -> CheckpointFiles:
    """The files of the checkpoint at `path`.

    Raises UserError if there are none, or if an index is damaged or names files outside its folder.
    """
    path = Path(path)
    with name_unreadable(path):
        return _find_checkpoint_files(path)


def _find_checkpoint_files(path: Path) -> CheckpointFiles:
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; check the path")
    file = path
    if path.is_dir():
        present = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not present:
            raise UserError(f"{path}: this folder has none of {', '.join(WEIGHTS)}; name the checkpoint file itself")
        file = present[0]
    # A config.json belongs to the weights only if they have one of the standard names.
    config = _json(file.with_name("config.json")) if file.name in WEIGHTS else {}
    if not file.name.endswith(INDEX):
        return CheckpointFiles(path, (file,), None, config)
    index = _json(file).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise UserError(f"{file}: has no weight_map; download it again")
    # An index from the network must not make us read files elsewhere: names have to be those of files in this folder,
    # also by the rules of Windows, where "\\" separates folders.
    for name in index.values():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name or "\\" in name:
            raise UserError(f"{file}: names {name!r}, which is not a file of this folder; nothing was read")
    files = tuple(file.with_name(name) for name in sorted(set(index.values())))
    missing = [part.name for part in files if not part.is_file()]
    if missing:
        raise UserError(
            f"{file}: {missing[0]} does not exist ({len(missing)} of {len(files)} missing); download it too"
        )
    return CheckpointFiles(path, files, index, config)


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no file."""
    if not file.is_file():
        return {}
    content = read_json(file, "download it again")
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object; download it again")
    return content
