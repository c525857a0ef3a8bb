"""The account of a loaded checkpoint: what happened to every tensor. Loading fails if any tensor is unexplained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from video_swinv2.errors import UserError
from video_swinv2.escaping import terminal_lines


@dataclass
class Account:
    """What happened to every tensor of the file and of the model, by name. The dicts give a reason for each name."""

    source: str
    layout: str
    loaded: list[str] = field(default_factory=list)
    """Tensors of the model that were taken from the file as they are."""
    inflated: dict[str, str] = field(default_factory=dict)
    """Tensors of the model that were expanded: in time, from those of an image model, or to other input channels."""
    derived: dict[str, str] = field(default_factory=dict)
    """Tensors of the file that this model computes from its sizes instead: tables, indices, masks."""
    initialised: dict[str, str] = field(default_factory=dict)
    """Tensors of the model that were not taken from the file and keep their initial values."""
    unused: dict[str, str] = field(default_factory=dict)
    """Tensors of the file that have no place in this model."""
    provenance: dict[str, object] = field(default_factory=dict)
    """What the file itself records about the origin of its weights."""
    notes: list[str] = field(default_factory=list)
    """Decisions about the checkpoint as a whole, such as where the log-CPB normaliser came from."""

    def __str__(self) -> str:
        """The account as text: the number of tensors of each kind and, for each reason, the first three names."""
        lines = [f"weights: {self.source} ({self.layout})", f"  loaded       {len(self.loaded):4d}"]
        for kind in ("inflated", "derived", "initialised", "unused"):
            reasons: dict[str, str] = getattr(self, kind)
            lines.append(f"  {kind:12s} {len(reasons):4d}")
            for reason, count in Counter(reasons.values()).items():
                keys = [key for key, why in reasons.items() if why == reason]
                shown = ", ".join(keys[:3]) + (f", ... ({count} in all)" if count > 3 else "")
                lines.append(f"               {reason}: {shown}")
        return terminal_lines(lines + [f"  {note}" for note in self.notes])

    def refusal(self, fault: str, fix: str) -> UserError:
        """The error to raise for a checkpoint that cannot be loaded, because of `fault`; `fix` says what to do."""
        return UserError(f"{self.source} ({self.layout}): {fault}; {fix}")
