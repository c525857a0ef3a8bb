"""The account of a loaded checkpoint: what happened to every tensor. An unexplained tensor stops the loading."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from video_swinv2.errors import UserError


@dataclass
class Account:
    """What happened to every tensor, key by key. `loaded` and `inflated` are the model's tensors that took values."""

    source: str
    layout: str
    loaded: list[str] = field(default_factory=list)
    inflated: dict[str, str] = field(default_factory=dict)
    derived: dict[str, str] = field(default_factory=dict)
    """In the file, but computed from sizes by this model: tables, indices, masks. With the reason."""
    initialised: dict[str, str] = field(default_factory=dict)
    """In the model, but not taken from the file. With the reason."""
    unused: dict[str, str] = field(default_factory=dict)
    """In the file, but without a place in this model. With the reason."""
    provenance: dict[str, object] = field(default_factory=dict)
    """What the file itself records about the origin of its weights."""
    notes: list[str] = field(default_factory=list)
    """Decisions about the checkpoint as a whole, such as where the log-CPB normaliser came from."""

    def __str__(self) -> str:
        """The account for people: counts, and each group of keys with its reason."""
        lines = [f"weights: {self.source} ({self.layout})", f"  loaded       {len(self.loaded):4d}"]
        for kind in ("inflated", "derived", "initialised", "unused"):
            reasons: dict[str, str] = getattr(self, kind)
            lines.append(f"  {kind:12s} {len(reasons):4d}")
            for reason, count in Counter(reasons.values()).items():
                keys = [key for key, why in reasons.items() if why == reason]
                shown = ", ".join(keys[:3]) + (f", ... ({count} in all)" if count > 3 else "")
                lines.append(f"               {reason}: {shown}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def refusal(self, fault: str, fix: str) -> UserError:
        """The error to raise for a checkpoint that cannot be explained."""
        return UserError(f"{self.source} ({self.layout}): {fault}; {fix}")
