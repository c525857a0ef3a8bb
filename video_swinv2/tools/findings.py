"""The result of a check of `doctor`, and its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from video_swinv2.escaping import terminal_lines

State = Literal["ok", "note", "fault"]
"""note: training works, but something is missing or could be better. fault: training is likely to fail."""
ERROR_CHARACTERS = 300  # of an error's text that are shown; compilers write pages


@dataclass(frozen=True)
class Finding:
    """The result of one check; `fix` says what to do about a note or a fault."""

    name: str
    state: State
    found: str
    fix: str = ""


def describe_error(error: BaseException) -> str:
    """An error's message in one line, or its type if it has none."""
    return " ".join(str(error).split())[:ERROR_CHARACTERS] or type(error).__name__


def findings_text(findings: Sequence[Finding]) -> str:
    """The findings as text, with the fix below each note and fault, and a verdict."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:6s}{finding.name:15s}{finding.found}")
        if finding.fix:
            lines.append(f"{'':21s}fix: {finding.fix}")
    faults = sum(finding.state == "fault" for finding in findings)
    lines.append("this machine is fit to train" if not faults else f"{faults} fault(s): fix them first")
    return terminal_lines(lines)
