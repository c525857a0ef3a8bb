"""The `engine` section of the configuration, and the rules for combining its keys."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from video_swinv2.config.bounds import STRICT, Seconds, Text
from video_swinv2.config.deepspeed_keys import check_deepspeed_section
from video_swinv2.errors import UsageError

Offload = Literal["none", "cpu", "nvme"]


@dataclass(config=STRICT, frozen=True)
class EngineConfig:
    """How steps are computed. Apart from rounding, nothing here changes what the model learns.

    Raises UsageError naming the key if a combination cannot work.
    """

    engine: Literal["deepspeed", "plain"] = "deepspeed"
    """`plain` is PyTorch alone and runs in a single process."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """What DeepSpeed partitions over the processes: nothing (0), optimizer states (1), gradients too (2), weights too
    (3)."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of matrix products, through torch autocast. Weights, gradients and moments are always fp32. `auto` is
    bf16 where it is faster, on GPUs with bf16 and CPUs with AMX, and fp32 elsewhere. fp16 is for GPUs without bf16 and
    uses a loss scale."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is a GPU if PyTorch sees one, or else the CPU."""
    communication: Literal["fp32", "bf16"] = "fp32"
    """Type in which processes exchange gradients. bf16 halves the traffic but rounds the gradients."""
    offload_optimizer: Offload = "none"
    """Where AdamW keeps its weights and moments: on the device, in CPU memory, or in files (nvme). With cpu and nvme,
    AdamW runs on the CPU. Needs ZeRO 1, 2 or 3."""
    offload_parameters: Offload = "none"
    """Where ZeRO-3 keeps its partitions of the model's weights; requires `offload_optimizer` too."""
    offload_folder: Text | None = None
    """Folder for what is offloaded to nvme, on a fast local disk of each machine. A run removes what earlier runs left
    there."""
    compile: bool = False
    """Apply torch.compile to each block; requires a C++ compiler on CPUs and Triton on GPUs."""
    meeting_seconds: Seconds = 120.0
    """How long several processes may take to find each other at the start."""
    silence_seconds: Seconds = 300.0
    """The run ends if one of its processes does not answer for this long, because it was stopped or its machine hangs.
    After a minute the process is named."""
    deepspeed: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of DeepSpeed's own configuration that tune speed and memory, listed in `deepspeed_keys.py`. Keys that follow
    from other settings are refused."""

    def __post_init__(self) -> None:
        if conflict := self._conflict():
            raise UsageError(f"engine.{conflict}")
        check_deepspeed_section(self.deepspeed)

    @property
    def offloads(self) -> bool:
        """Whether AdamW runs on the CPU, with its weights and moments in CPU memory or in files."""
        return self.offload_optimizer != "none"

    def _conflict(self) -> str:
        """The first combination that cannot work, as `key: what is wrong; fix`; an empty string if there is none."""
        nvme = "nvme" in (self.offload_optimizer, self.offload_parameters)
        # Keys that the plain engine would silently ignore, and whether they are set.
        needs_deepspeed = {
            "offload_optimizer": self.offloads,
            "communication": self.communication != "fp32",
            "deepspeed": bool(self.deepspeed),
        }
        for key, is_set in needs_deepspeed.items():
            if is_set and self.engine == "plain":
                return f"{key}: needs DeepSpeed; use engine.engine=deepspeed or remove the key"
        if self.offloads and self.zero_stage == 0:
            return "offload_optimizer: ZeRO-0 keeps everything on the device; use engine.zero_stage=1, 2 or 3"
        if self.offload_parameters != "none" and (self.zero_stage != 3 or not self.offloads):
            return "offload_parameters: needs engine.zero_stage=3 and engine.offload_optimizer=cpu or nvme"
        if nvme and not self.offload_folder:
            return (
                "offload_folder: missing; "
                "name a folder on each machine's fast disk (each run removes what earlier runs left in it)"
            )
        if self.offload_folder and not nvme:
            return "offload_folder: nothing is offloaded to it; set engine.offload_optimizer=nvme or remove the key"
        if self.communication == "bf16" and self.precision == "fp16":
            return "communication: precision fp16 exchanges gradients in fp32; remove the key or use precision bf16"
        if self.compile and self.zero_stage == 3 and self.engine == "deepspeed":
            return "compile: torch.compile recompiles at every block under ZeRO-3; use engine.zero_stage=1 or 2"
        return ""
