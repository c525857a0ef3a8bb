"""Where weights come from: the chain of files from a run back to the first one that was trained from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Ancestor = dict[str, object]


def ancestors_of(file: str, digests: Mapping[str, str], provenance: Mapping[str, Any]) -> list[Ancestor]:
    """The file and all that its `provenance` names, nearest first, each with ``file task steps data sha256``.

    `digests` is the sha256 of each of its files by name; one file's stands alone. What a file does not tell of itself
    is None: a released checkpoint tells nothing. A converted file names what it was converted from.
    """
    converted = provenance.get("converted_from")
    this: Ancestor = {
        "file": file,
        "task": "conversion" if converted else provenance.get("task"),
        "steps": provenance.get("step"),
        "data": provenance.get("data"),
        "sha256": next(iter(digests.values())) if len(digests) == 1 else dict(digests),
    }
    if converted:
        return [this, *ancestors_of(str(converted), provenance["sha256"], provenance["provenance"])]
    return [this, *provenance.get("ancestors", ())]
