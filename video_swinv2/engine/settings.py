"""How steps are computed: the settings of an engine and every rule on what goes with what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from video_swinv2.engine.deepspeed_config import check_section
from video_swinv2.errors import UsageError

PLACES = ("none", "cpu", "nvme")


@dataclass(frozen=True)
class EngineSettings:
    """How steps are computed, not what is learned; every combination trains the same model to rounding.

    ``engine`` deepspeed or plain (one process), ``zero_stage`` 0-3, ``precision`` fp32, bf16 or fp16 (autocast, fp32
    weights), ``accumulation`` micro-batches per step, ``clip_norm`` largest gradient norm or None, ``micro_batch``
    clips per process and micro-batch, ``ema`` the decay per step of averaged weights, 0 for none, ``communication`` the
    type in which gradients travel, ``offload_optimizer`` and ``offload_parameters`` where weights and moments wait:
    none (on the device), cpu, or nvme (files in ``offload_folder``), ``compile`` blocks by torch.compile,
    ``deepspeed`` keys of DeepSpeed's own section. Raises UsageError naming the key that is wrong.
    """

    engine: str = "deepspeed"
    zero_stage: int = 1
    precision: str = "bf16"
    accumulation: int = 1
    clip_norm: float | None = None
    micro_batch: int = 1
    ema: float = 0.0
    communication: str = "fp32"
    offload_optimizer: str = "none"
    offload_parameters: str = "none"
    offload_folder: str | None = None
    compile: bool = False
    deepspeed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("engine", self.engine, ("deepspeed", "plain"))
        _one_of("precision", self.precision, ("fp32", "bf16", "fp16"))
        _one_of("communication", self.communication, ("fp32", "bf16"))
        _one_of("offload_optimizer", self.offload_optimizer, PLACES)
        _one_of("offload_parameters", self.offload_parameters, PLACES)
        if self.zero_stage not in (0, 1, 2, 3):
            raise UsageError(f"zero_stage: {self.zero_stage!r} is not a ZeRO stage; use 0, 1, 2 or 3")
        for key in ("accumulation", "micro_batch"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key}: {getattr(self, key)} is too small; use 1 or more")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UsageError(
                f"clip_norm: {self.clip_norm} would stop all learning; use a positive norm, or null for none"
            )
        if fault := self._conflict():
            raise UsageError(f"engine.{fault}")
        check_section(self.deepspeed)

    @property
    def offloads(self) -> bool:
        """Whether AdamW works on the CPU, on weights and moments that are kept there or in files."""
        return self.offload_optimizer != "none"

    def _conflict(self) -> str:
        """The first combination that cannot work, as key and mend; empty where all is well."""
        nvme = "nvme" in (self.offload_optimizer, self.offload_parameters)
        wants_deepspeed = {
            "offload_optimizer": self.offloads,
            "communication": self.communication != "fp32",
            "deepspeed": bool(self.deepspeed),
        }
        for key, wanted in wants_deepspeed.items():
            if wanted and self.engine == "plain":
                return f"{key}: only DeepSpeed does this; use engine.engine=deepspeed or remove the key"
        if self.offloads and self.zero_stage == 0:
            return "offload_optimizer: ZeRO-0 keeps everything on the device; use engine.zero_stage=1, 2 or 3"
        if self.offload_parameters != "none" and (self.zero_stage != 3 or not self.offloads):
            return "offload_parameters: needs engine.zero_stage=3 and engine.offload_optimizer=cpu or nvme"
        if nvme and not self.offload_folder:
            return "offload_folder: missing; name a folder on the fast disk of every machine, it is emptied by each run"
        if self.offload_folder and not nvme:
            return "offload_folder: nothing goes there; set engine.offload_optimizer=nvme or remove it"
        if self.communication == "bf16" and self.precision == "fp16":
            return "communication: with precision fp16 gradients travel in fp32; remove the key or use precision bf16"
        if self.compile and self.zero_stage == 3 and self.engine == "deepspeed":
            return "compile: recompiles at every block under ZeRO-3; use engine.zero_stage=1 or 2"
        return ""


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{key}: {value!r} is not known; use {', '.join(known[:-1])} or {known[-1]}")
