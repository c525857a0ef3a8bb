"""The DeepSpeed engine, ZeRO 0-3. Every known defect of DeepSpeed 0.19 that it could meet is contained in this room:

* Mixed precision is torch autocast over fp32 weights (DeepSpeed's ``torch_autocast`` section), never its ``bf16``
  section: with ZeRO-0 that one takes a spurious AdamW step at construction, and it rounds logit scales to bf16.
* The fp16 loss scale is ours (`gradients.py`): DeepSpeed's never falls at ZeRO 1-3 and clips scaled gradients.
* Checkpoints are ours (`checkpoint.py`): DeepSpeed's lose frozen parameters (ZeRO-1), mix up parameter groups when
  loaded (ZeRO-3), and name a checkpoint the newest before it is complete.
* DeepSpeed's autocast keeps a half-precision copy of every weight until the end of the pass, of the whole model even
  under ZeRO-3; the autocast cache is switched off.
* ZeRO-0 has no gradient norm and no check for NaN; both are done here.
* Nothing is compiled at run time: neither the all-reduce for CPUs, nor Adam for offloading, nor access to NVMe.
* Its configuration is built and checked by us (`deepspeed_config.py`): DeepSpeed silently accepts unknown keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from video_swinv2.config import EngineConfig
from video_swinv2.distributed.world import World
from video_swinv2.engine.base import StepOutcome, StepSettings, fp32_cpu_copy, named_tensors, without_autocast_cache
from video_swinv2.engine.checkpoint import TrainingState
from video_swinv2.engine.deepspeed_config import build_deepspeed_config
from video_swinv2.engine.ema import WeightAverage
from video_swinv2.engine.gradients import LossScale, poison_if_not_finite, unscale_check_and_clip
from video_swinv2.engine.offload import MappedFolder, offload_to_files
from video_swinv2.engine.optimizer import write_hyperparameters
from video_swinv2.engine.zero_layout import (
    GroupPartition,
    ParameterPartitions,
    Partition,
    WholeParameter,
    applied_steps,
    check_state_fits,
    optimized_parameters,
    read_moments,
    write_moments,
)
from video_swinv2.errors import UserError


class DeepSpeedEngine:
    """DeepSpeed at any ZeRO stage; see :class:`base.Engine` for what each method promises.

    ZeRO-1 is the stage to use; 0 and 2 exist for comparison, 3 for models that are too large for one device.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.AdamW,
        config: EngineConfig,
        step: StepSettings,
        world: World,
        *,
        precision: str,
    ) -> None:
        deepspeed = import_deepspeed(world)
        self.module = module
        self._stage = config.zero_stage
        self._clip_norm = step.clip_norm
        self._world = world
        self._scale = LossScale() if precision == "fp16" else None
        self._gathered = deepspeed.zero.GatheredParameters
        if config.offloads:
            for group in optimizer.param_groups:
                group["fused"] = True  # on the CPU too it is several times as fast, and torch ships it compiled
        pin_memory = world.device.type == "cuda"
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=build_deepspeed_config(config, step, precision=precision, pin_memory=pin_memory),
        )
        # Switch off both of DeepSpeed's loss scales, that of ZeRO-0 and that of the other stages.
        self._engine.torch_autocast_z0_gradscaler = None
        if self._stage:
            self._engine.optimizer.torch_autocast_gradscaler = None
        # ZeRO's wrapper delegates to this AdamW, whose state is keyed by this rank's flat partitions.
        self._adamw: torch.optim.Optimizer = optimizer
        try:
            self._partitions = self._find_partitions()
        except AttributeError as error:
            # These names are private to DeepSpeed: better to find them missing here than at the first checkpoint.
            raise UserError(
                f"deepspeed {deepspeed.__version__}: keeps its states in an unknown place ({error}); install the "
                "version in constraints.txt, or use engine.engine=plain"
            ) from error
        if config.offload_folder:
            self._move_to_files(MappedFolder(config.offload_folder, world), config)
        self._average = WeightAverage(self._partitions, step.ema) if step.ema else None

    def _find_partitions(self) -> Sequence[Partition]:
        """The flat tensors that AdamW updates on this rank, with the parameters in them; `zero_layout` explains."""
        zero, world = self._engine.optimizer, self._world
        if self._stage == 0:
            return [WholeParameter(parameter) for parameter in optimized_parameters(self._adamw)]
        # DeepSpeed names these after half precision, but with torch autocast all of them are fp32.
        if self._stage == 3:
            pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
            return [ParameterPartitions(local, parameters, world) for local, parameters in pairs]
        groups = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, zero.bit16_groups_flat, strict=True)
        return [GroupPartition(local, parameters, buffer, world) for local, parameters, buffer in groups]

    def _move_to_files(self, folder: MappedFolder, config: EngineConfig) -> None:
        if config.offload_optimizer == "nvme":
            offload_to_files(self._adamw, self._partitions, folder)
        if config.offload_parameters == "nvme":
            zero = self._engine.optimizer
            for number, flat in enumerate(zero.fp16_partitioned_groups_flat):
                flat.data = folder.map_copy(flat.detach())
                # Each parameter's partition is a view of the flat tensor, which has just moved.
                zero._unflatten_partitioned_parameters(number)

    def forward(self, *inputs: Any) -> Any:
        """See :class:`base.Engine`."""
        with without_autocast_cache():
            return self._engine(*inputs)  # DeepSpeed enters autocast itself

    def backward(self, loss: Tensor) -> None:
        """See :class:`base.Engine`."""
        loss = poison_if_not_finite(loss)
        if self._scale and self._stage:
            # ZeRO's optimizer multiplies the loss by this, and divides norm and gradients by it in its step.
            self._engine.optimizer.loss_scale = self._scale.scale
        elif self._scale:
            loss = loss * self._scale.scale
        self._engine.backward(loss)  # divides by the accumulation

    def step(self) -> StepOutcome | None:
        """See :class:`base.Engine`."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        outcome = self._full_step()
        if self._average and outcome.applied:
            self._average.update()
        return outcome

    def _full_step(self) -> StepOutcome:
        if self._stage == 0:
            # backward() has just done the all-reduce, so all ranks hold the same gradients and make the same decision
            # without another collective.
            outcome = unscale_check_and_clip(self.module, self._clip_norm, self._scale)
            self._engine.step()
            return outcome
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        applied = self._engine.was_step_applied()
        rescaled = self._scale.update(applied) if self._scale else False
        return StepOutcome(applied=applied, grad_norm=norm, rescaled=rescaled)

    def set_lr(self, lr: float) -> None:
        """See :class:`base.Engine`."""
        write_hyperparameters(self._adamw, lr)

    def weights(self) -> dict[str, Tensor] | None:
        """See :class:`base.Engine`."""
        found: dict[str, Tensor] = {}
        for name, tensor in named_tensors(self.module).items():
            with self._gathered([tensor], enabled=self._is_partitioned(tensor)):
                if self._world.rank == 0:
                    found[name] = fp32_cpu_copy(tensor)
        return found if self._world.rank == 0 else None

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """See :class:`base.Engine`."""
        weights = self.weights()
        average = self._average.read(self.module) if self._average else {}  # collective, so before any return
        return None if weights is None else weights | average

    @torch.no_grad()
    def write_weights(self, weights: Mapping[str, Tensor] | None) -> None:
        """See :class:`base.Engine`."""
        for name, tensor in named_tensors(self.module).items():
            # Under ZeRO-3 rank 0's values are broadcast and partitioned again when the context ends.
            with self._gathered([tensor], modifier_rank=0, enabled=self._is_partitioned(tensor)):
                if self._world.rank == 0:
                    tensor.copy_((weights or {})[name])
            if not self._is_partitioned(tensor):
                dist.broadcast(tensor, 0)

    def training_state(self) -> TrainingState | None:
        """See :class:`base.Engine`."""
        # All three are collective, so every rank calls them before the ranks other than 0 return.
        weights = self.weights()
        moments = read_moments(self.module, self._adamw, self._partitions)
        average = self._average.read(self.module) if self._average else {}
        if weights is None:
            return None
        scale = self._scale.state() if self._scale else None
        return TrainingState(weights, *moments, applied_steps(self._adamw), average, scale)

    @torch.no_grad()
    def load(self, state: TrainingState) -> None:
        """See :class:`base.Engine`."""
        check_state_fits(self.module, state)
        self.write_weights(state.weights)
        if self._stage > 0:
            # The partitions that AdamW updates are copies of the module's weights.
            self._engine.optimizer.refresh_fp32_params()
        write_moments(self.module, self._adamw, self._partitions, state)
        if self._average:
            self._average.write(self.module, state.ema)
        if self._scale:
            self._scale.restore(state.loss_scale)

    def _is_partitioned(self, tensor: Tensor) -> bool:
        """Whether the tensor is empty outside a gather. ZeRO-3 partitions parameters; buffers stay whole."""
        return self._stage == 3 and isinstance(tensor, nn.Parameter)


def import_deepspeed(world: World) -> Any:
    """Import the package and prepare it for this device; raises UserError if it cannot be imported."""
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(f"deepspeed: cannot be imported ({error}); install it, or use engine.engine=plain") from error
    if world.device.type == "cpu":
        # Otherwise DeepSpeed compiles a C++ all-reduce for CPUs on first use: 78 s, and a crash without ninja or g++.
        # Written into the module's dict, because merely reading the attribute probes every op with a compiler.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    # A global that outlives an engine: with it set, an fp32 engine would exchange gradients in the type of the engine
    # before it.
    deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed\.")  # about DeepSpeed's own calls
    return deepspeed
