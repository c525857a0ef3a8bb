"""Two engines behind one surface: DeepSpeed (ZeRO 0-3) and plain PyTorch; the only file that imports deepspeed.

Every known defect of DeepSpeed 0.19 that these calls could meet is contained here, so that no other file has to know:

* Mixed precision is torch autocast over fp32 weights (DeepSpeed's ``torch_autocast`` section), never its ``bf16``
  section: with ZeRO-0 that one takes a phantom AdamW step at construction, and it rounds logit scales to bf16.
* The loss scale of fp16 is ours (``scaling.py``): DeepSpeed's never falls at ZeRO 1-3, and clips scaled gradients.
* Checkpoints are ours (:class:`Portable`): DeepSpeed's lose frozen parameters (ZeRO-1), mix up parameter groups when
  loaded (ZeRO-3), and name the newest before it is whole.
* Its autocast keeps a half-precision copy of every weight to the end of the pass, the whole model's even under ZeRO-3.
* ZeRO-0 has no gradient norm and no guard against NaN: both are done here.
* Nothing is compiled at run time: neither the all-reduce for CPUs, nor Adam for offloading, nor access to NVMe.
* Its configuration is built and checked by ``zero.py``: DeepSpeed takes unknown keys in silence.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from video_swinv2.distributed.collectives import print_on_rank_zero
from video_swinv2.distributed.world import World
from video_swinv2.engine.checkpoint import Portable
from video_swinv2.engine.deepspeed_config import deepspeed_config
from video_swinv2.engine.ema import Average
from video_swinv2.engine.gradients import StepOutcome, guard_and_clip, poisoned
from video_swinv2.engine.loss_scale import LossScale
from video_swinv2.engine.offload import MappedFolder, map_optimizer
from video_swinv2.engine.optimizer import build_optimizer, write_hyperparameters
from video_swinv2.engine.settings import EngineSettings
from video_swinv2.engine.zero_layout import (
    GroupShard,
    ParameterShards,
    Shard,
    Whole,
    applied_steps,
    check_fit,
    optimized,
    read_moments,
    write_moments,
)
from video_swinv2.errors import UsageError, UserError
from video_swinv2.models.swinv2 import Block

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Engine(Protocol):
    """What the loop may ask of an engine. Per micro-batch: forward, backward, step; all ranks make the same calls."""

    module: nn.Module

    def forward(self, *inputs: Any) -> Any:
        """The module's own forward, in autocast where the settings ask for bf16 or fp16."""

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients; ``loss`` is its mean, not divided by the accumulation."""

    def step(self) -> StepOutcome | None:
        """Count a micro-batch; at the last of a step update the weights and say so, otherwise return None.

        Where a loss or gradient of any rank is not finite, no weight and no moment changes on any rank.
        """

    def set_lr(self, lr: float) -> None:
        """Write the learning rate, scaled per group, and the weight decay for the next step."""

    def weights(self) -> dict[str, Tensor] | None:
        """Parameters and buffers by name: fp32 copies on the CPU of rank 0, None elsewhere. Collective."""

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """The same with averages in place of the trained parameters; as they are if none are kept. Collective."""

    def write_weights(self, weights: Mapping[str, Tensor] | None) -> None:
        """Put rank 0's weights into the module everywhere, to be validated. Collective; between steps only.

        The optimizer does not hear of it: before the next step the module's own weights must be written back.
        """

    def states(self) -> Portable | None:
        """Everything a checkpoint needs, on rank 0, None elsewhere. Collective; between steps only."""

    def load(self, portable: Portable) -> None:
        """Continue from a checkpoint; every rank passes the same whole tensors. Collective; between steps only.

        Raises UserError naming the parameter where it does not fit the module.
        """


def make_engine(
    module: nn.Module,
    groups: Sequence[dict[str, Any]],
    settings: EngineSettings,
    world: World,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> Engine:
    """Move the module to the device, build AdamW over the groups and wrap both; rank 0's weights are everybody's.

    ``groups`` come from :func:`optim.parameter_groups`. Raises UsageError for the plain engine in several processes.
    """
    if settings.engine == "plain" and world.size > 1:
        raise UsageError(f"engine: plain runs in one process, and here are {world.size}; use engine=deepspeed")
    precision = _precision(settings, world)
    module.to(world.device)
    if settings.compile:
        compile_blocks(module)
    optimizer = build_optimizer(groups, betas=betas, eps=eps, device=world.device)
    write_hyperparameters(optimizer, lr)
    if settings.engine == "plain":
        return PlainEngine(module, optimizer, settings, world, precision=precision)
    return DeepSpeedEngine(module, optimizer, settings, world, precision=precision)


def _precision(settings: EngineSettings, world: World) -> str:
    cuda = world.device.type == "cuda"
    if settings.precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        print_on_rank_zero(world, "precision: this GPU has no bf16, so fp32 is used; fp16 is quicker there")
        return "fp32"
    return settings.precision


def compile_blocks(module: nn.Module, backend: str = "inductor") -> None:
    """torch.compile for each transformer block by itself, in place: names and checkpoints stay as they are.

    By block, since all blocks of a stage share one compilation, and activation checkpointing goes around it.
    """
    for part in module.modules():
        if isinstance(part, Block):
            part.compile(backend=backend)


class PlainEngine:
    """PyTorch alone in one process: the reference every ZeRO stage is compared with, and enough for one GPU."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.AdamW, settings: EngineSettings, world: World, *, precision: str
    ) -> None:
        self.module = module
        self._optimizer = optimizer
        self._settings = settings
        self._device = world.device
        self._dtype = AUTOCAST.get(precision)
        self._scale = LossScale() if precision == "fp16" else None
        self._micro = 0
        self._shards = [Whole(parameter) for parameter in optimized(optimizer)]
        self._average = Average(self._shards, settings.ema) if settings.ema else None

    def forward(self, *inputs: Any) -> Any:
        """See :class:`Engine`."""
        with _without_copies(), torch.autocast(self._device.type, self._dtype) if self._dtype else nullcontext():
            return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        """See :class:`Engine`."""
        scale = self._scale.scale if self._scale else 1.0
        torch.autograd.backward(poisoned(loss) * (scale / self._settings.accumulation))

    def step(self) -> StepOutcome | None:
        """See :class:`Engine`."""
        self._micro += 1
        if self._micro % self._settings.accumulation:
            return None
        outcome = guard_and_clip(self.module, self._settings.clip_norm, self._scale)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average and outcome.applied:
            self._average.update()
        return outcome

    def set_lr(self, lr: float) -> None:
        """See :class:`Engine`."""
        write_hyperparameters(self._optimizer, lr)

    def weights(self) -> dict[str, Tensor] | None:
        """See :class:`Engine`."""
        return {name: _to_cpu(tensor) for name, tensor in _named(self.module).items()}

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """See :class:`Engine`."""
        return (self.weights() or {}) | (self._average.read(self.module) if self._average else {})

    @torch.no_grad()
    def write_weights(self, weights: Mapping[str, Tensor] | None) -> None:
        """See :class:`Engine`."""
        for name, tensor in _named(self.module).items():
            tensor.copy_((weights or {})[name])

    def states(self) -> Portable | None:
        """See :class:`Engine`."""
        moments = read_moments(self.module, self._optimizer, self._shards)
        average = self._average.read(self.module) if self._average else {}
        scale = self._scale.state() if self._scale else None
        return Portable(self.weights() or {}, *moments, applied_steps(self._optimizer), average, scale)

    @torch.no_grad()
    def load(self, portable: Portable) -> None:
        """See :class:`Engine`."""
        check_fit(self.module, portable)
        self.write_weights(portable.weights)
        write_moments(self.module, self._optimizer, self._shards, portable)
        if self._average:
            self._average.write(self.module, portable.ema)
        if self._scale:
            self._scale.restore(portable.loss_scale)


class DeepSpeedEngine:
    """DeepSpeed at any ZeRO stage; ZeRO-1 is the one to use, 0 and 2 are for comparison, 3 for models too large."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.AdamW, settings: EngineSettings, world: World, *, precision: str
    ) -> None:
        deepspeed = import_deepspeed(world)
        self.module = module
        self._stage = settings.zero_stage
        self._clip_norm = settings.clip_norm
        self._world = world
        self._scale = LossScale() if precision == "fp16" else None
        self._gathered = deepspeed.zero.GatheredParameters
        if settings.offloads:
            for group in optimizer.param_groups:
                group["fused"] = True  # on the CPU too it is several times as fast, and comes compiled with torch
        cuda = world.device.type == "cuda"
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(settings, precision=precision, cuda=cuda)
        )
        self._engine.torch_autocast_z0_gradscaler = None  # the scale is ours
        if self._stage:
            self._engine.optimizer.torch_autocast_gradscaler = None
        # ZeRO's wrapper delegates to the AdamW inside, whose state is keyed by this rank's flat pieces.
        self._adamw: torch.optim.Optimizer = optimizer
        try:
            self._shards = self._find_shards()
        except AttributeError as error:
            # Private names of DeepSpeed's: better found missing here than at the first checkpoint.
            raise UserError(
                f"deepspeed {deepspeed.__version__} keeps its states where this does not look for them ({error}); "
                "install the version in constraints.txt, or use engine=plain"
            ) from error
        if settings.offload_folder:
            self._map_files(MappedFolder(settings.offload_folder, world), settings)
        self._average = Average(self._shards, settings.ema) if settings.ema else None

    def _map_files(self, folder: MappedFolder, settings: EngineSettings) -> None:
        if settings.offload_optimizer == "nvme":
            map_optimizer(self._adamw, self._shards, folder)
        if settings.offload_parameters == "nvme":
            zero = self._engine.optimizer
            for number, flat in enumerate(zero.fp16_partitioned_groups_flat):
                flat.data = folder.mapped(flat.detach())
                zero._unflatten_partitioned_parameters(number)  # each parameter's piece is a view of it

    def forward(self, *inputs: Any) -> Any:
        """See :class:`Engine`."""
        with _without_copies():
            return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """See :class:`Engine`."""
        loss = poisoned(loss)
        if self._scale and self._stage:
            self._engine.optimizer.loss_scale = self._scale.scale  # it multiplies by it and unscales norm and gradients
        elif self._scale:
            loss = loss * self._scale.scale
        self._engine.backward(loss)

    def step(self) -> StepOutcome | None:
        """See :class:`Engine`."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        outcome = self._full_step()
        if self._average and outcome.applied:
            self._average.update()
        return outcome

    def _full_step(self) -> StepOutcome:
        if self._stage == 0:
            # After the all-reduce, which backward() has just done, all ranks hold the same gradients and so decide
            # alike without another collective.
            outcome = guard_and_clip(self.module, self._clip_norm, self._scale)
            self._engine.step()
            return outcome
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        applied = self._engine.was_step_applied()
        rescaled = self._scale.update(applied) if self._scale else False
        return StepOutcome(applied=applied, grad_norm=norm, rescaled=rescaled)

    def set_lr(self, lr: float) -> None:
        """See :class:`Engine`."""
        write_hyperparameters(self._adamw, lr)

    def weights(self) -> dict[str, Tensor] | None:
        """See :class:`Engine`."""
        found: dict[str, Tensor] = {}
        for name, tensor in _named(self.module).items():
            with self._gathered([tensor], enabled=self._partitioned(tensor)):
                if self._world.rank == 0:
                    found[name] = _to_cpu(tensor)
        return found if self._world.rank == 0 else None

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """See :class:`Engine`."""
        weights = self.weights()
        average = self._average.read(self.module) if self._average else {}
        return None if weights is None else weights | average

    @torch.no_grad()
    def write_weights(self, weights: Mapping[str, Tensor] | None) -> None:
        """See :class:`Engine`."""
        for name, tensor in _named(self.module).items():
            # Under ZeRO-3 rank 0's value is broadcast and cut up again when the context ends.
            with self._gathered([tensor], modifier_rank=0, enabled=self._partitioned(tensor)):
                if self._world.rank == 0:
                    tensor.copy_((weights or {})[name])
            if not self._partitioned(tensor):
                dist.broadcast(tensor, 0)

    def states(self) -> Portable | None:
        """See :class:`Engine`."""
        weights = self.weights()
        moments = read_moments(self.module, self._adamw, self._shards)
        average = self._average.read(self.module) if self._average else {}
        if weights is None:
            return None
        scale = self._scale.state() if self._scale else None
        return Portable(weights, *moments, applied_steps(self._adamw), average, scale)

    @torch.no_grad()
    def load(self, portable: Portable) -> None:
        """See :class:`Engine`."""
        check_fit(self.module, portable)
        self.write_weights(portable.weights)
        if self._stage > 0:
            self._engine.optimizer.refresh_fp32_params()  # the pieces AdamW updates are copies of the module's
        write_moments(self.module, self._adamw, self._shards, portable)
        if self._average:
            self._average.write(self.module, portable.ema)
        if self._scale:
            self._scale.restore(portable.loss_scale)

    def _partitioned(self, tensor: Tensor) -> bool:
        return self._stage == 3 and isinstance(tensor, nn.Parameter)

    def _find_shards(self) -> Sequence[Shard]:
        zero, world = self._engine.optimizer, self._world
        if self._stage == 0:
            return [Whole(parameter) for parameter in optimized(self._adamw)]
        if self._stage == 3:
            pieces = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
            return [ParameterShards(piece, parameters, world) for piece, parameters in pieces]
        groups = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, zero.bit16_groups_flat, strict=True)
        return [GroupShard(piece, parameters, buffer, world) for piece, parameters, buffer in groups]


def import_deepspeed(world: World) -> Any:
    """The package, made fit for this device; UserError where it cannot be had."""
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(f"deepspeed cannot be imported ({error}); install it, or use engine=plain") from error
    if world.device.type == "cpu":
        # Without this DeepSpeed compiles a C++ all-reduce for CPUs on first use: 78 s, and death without ninja or g++.
        # Written into the module's dict, since merely asking for the attribute probes every op with a compiler.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    # It is kept in a global, and an engine of fp32 would take the type of its gradients' travel from the one before.
    deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed\.")  # about calls it makes, not ours
    return deepspeed


@contextmanager
def _without_copies() -> Iterator[None]:
    """Inside, autocast forgets a weight's half-precision copy after its use: each is used once in a pass.

    Autograd keeps what the backward pass needs; where blocks are computed again, that is nothing.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _named(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameter and buffer objects, under the names its state dict has."""
    return module.state_dict(keep_vars=True)


def _to_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU, fp32 where it is a number with a fraction; always a copy, since training goes on."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True)
