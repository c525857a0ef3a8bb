"""The DeepSpeed engine, at ZeRO stages 0 to 3.

No file outside this folder has to know the defects of DeepSpeed 0.19. Those that our training could meet, and how they
are avoided here:

* Mixed precision is torch autocast over fp32 weights (DeepSpeed's ``torch_autocast`` section). Its ``bf16`` section is
  never used: at ZeRO-0 it takes a spurious AdamW step at construction, and it rounds logit scales to bf16.
* We scale the loss for fp16 ourselves (`gradients.py`). At ZeRO 1-3 DeepSpeed's own scale never decreases, and the
  gradients are clipped before the scale is divided out.
* We write checkpoints ourselves (`checkpoint.py`). DeepSpeed's lack frozen parameters (ZeRO-1) and mix up parameter
  groups when loaded (ZeRO-3), and its `latest` file names a checkpoint before it is complete.
* We switch off the autocast cache (`base.py`). With it, autocast keeps a half-precision copy of every weight until the
  end of the pass, which under ZeRO-3 means a copy of the whole model.
* We compute the gradient norm and check for NaN at ZeRO-0, where DeepSpeed does neither.
* We avoid everything that DeepSpeed compiles at run time: its all-reduce for CPUs, its Adam for offloading and its
  access to NVMe. A C++ compiler is therefore not needed.
* We build and check its configuration ourselves (`deepspeed_config.py`): DeepSpeed silently accepts unknown keys.
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
    """DeepSpeed at any ZeRO stage; :class:`base.Engine` documents the methods.

    Use ZeRO-1. Stages 0 and 2 exist for comparison, and stage 3 is for models that do not fit on one device.
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
                # The fused AdamW is several times as fast on the CPU too, and torch ships it compiled.
                group["fused"] = True
        pin_memory = world.device.type == "cuda"
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=build_deepspeed_config(config, step, precision=precision, pin_memory=pin_memory),
        )
        # With fp16 autocast DeepSpeed creates a GradScaler, in the engine at ZeRO-0 and in the optimizer's wrapper at
        # the other stages. Remove it, because the loss scale is ours.
        self._engine.torch_autocast_z0_gradscaler = None
        if self._stage:
            self._engine.optimizer.torch_autocast_gradscaler = None
        # At ZeRO 1-3 a wrapper has replaced the parameters in this AdamW's groups by this rank's flat partitions and
        # delegates each update to it. Its state (moments, step count) is therefore keyed by those partitions.
        self._adamw: torch.optim.Optimizer = optimizer
        try:
            self._partitions = self._find_partitions()
        except AttributeError as error:
            # These attributes are private to DeepSpeed and may move in another version. Fail here, at the start,
            # rather than hours later at the first checkpoint.
            raise UserError(
                f"deepspeed {deepspeed.__version__}: keeps its states in an unknown place ({error}); install the "
                "version in constraints.txt, or use engine.engine=plain"
            ) from error
        if config.offload_folder:
            self._move_to_files(MappedFolder(config.offload_folder, world), config)
        self._average = WeightAverage(self._partitions, step.ema) if step.ema else None

    def _find_partitions(self) -> Sequence[Partition]:
        """The tensors that AdamW updates on this rank and the parameters in each; `zero_layout` shows their layout."""
        zero, world = self._engine.optimizer, self._world
        if self._stage == 0:
            return [WholeParameter(parameter) for parameter in optimized_parameters(self._adamw)]
        # The names speak of 16 bits, but with torch autocast the model's own weights are fp32, so all of these are too:
        # "fp16" or "bit16" are the module's tensors, "fp32" the copies of this rank's part that AdamW updates.
        if self._stage == 3:
            pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
            return [ParameterPartitions(local, parameters, world) for local, parameters in pairs]
        groups = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, zero.bit16_groups_flat, strict=True)
        return [GroupPartition(local, parameters, buffer, world) for local, parameters, buffer in groups]

    def _move_to_files(self, folder: MappedFolder, config: EngineConfig) -> None:
        """Move what is offloaded to nvme into mapped files; DeepSpeed itself was told to offload to the CPU."""
        if config.offload_optimizer == "nvme":
            offload_to_files(self._adamw, self._partitions, folder)
        if config.offload_parameters == "nvme":
            zero = self._engine.optimizer
            for number, flat in enumerate(zero.fp16_partitioned_groups_flat):
                flat.data = folder.map_copy(flat.detach())
                # Each parameter's own partition is a view of the flat tensor. The views still point to the old memory,
                # so let DeepSpeed recreate them.
                zero._unflatten_partitioned_parameters(number)

    def forward(self, *inputs: Any) -> Any:
        """See :class:`base.Engine`."""
        with without_autocast_cache():
            return self._engine(*inputs)  # enters autocast itself, as its config says

    def backward(self, loss: Tensor) -> None:
        """See :class:`base.Engine`."""
        loss = poison_if_not_finite(loss)
        if self._scale and self._stage:
            # ZeRO's wrapper multiplies the loss by this and, in its step, divides norm and gradients by it. Its own
            # scaler is a constant 1 for fp32 weights, so nothing in DeepSpeed changes the value we set.
            self._engine.optimizer.loss_scale = self._scale.scale
        elif self._scale:
            loss = loss * self._scale.scale
        self._engine.backward(loss)  # divides the loss by the accumulation

    def step(self) -> StepOutcome | None:
        """See :class:`base.Engine`."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro-batch
            return None
        outcome = self._full_step()
        if self._average and outcome.applied:
            self._average.update()
        return outcome

    def _full_step(self) -> StepOutcome:
        """Take the optimizer step after the last micro-batch."""
        if self._stage == 0:
            # The last backward() has all-reduced the gradients. All ranks therefore hold the same ones and decide alike
            # whether to skip the step, without another collective.
            outcome = unscale_check_and_clip(self.module, self._clip_norm, self._scale)
            self._engine.step()
            return outcome
        # At ZeRO 1-3 DeepSpeed computes the norm, skips the step if it is not finite on any rank, and clips.
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
            # One parameter at a time, so that a device never holds more than one whole parameter of a ZeRO-3 model.
            with self._gathered([tensor], enabled=self._is_partitioned(tensor)):
                if self._world.rank == 0:
                    found[name] = fp32_cpu_copy(tensor)
        return found if self._world.rank == 0 else None

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """See :class:`base.Engine`."""
        weights = self.weights()
        average = self._average.read(self.module) if self._average else {}  # collective: also on ranks other than 0
        return None if weights is None else weights | average

    @torch.no_grad()
    def write_weights(self, weights: Mapping[str, Tensor] | None) -> None:
        """See :class:`base.Engine`."""
        for name, tensor in named_tensors(self.module).items():
            # Under ZeRO-3, leaving the context broadcasts rank 0's values and partitions them again.
            with self._gathered([tensor], modifier_rank=0, enabled=self._is_partitioned(tensor)):
                if self._world.rank == 0:
                    tensor.copy_((weights or {})[name])
            if not self._is_partitioned(tensor):
                dist.broadcast(tensor, 0)

    def training_state(self) -> TrainingState | None:
        """See :class:`base.Engine`."""
        # All three are collective, so every rank must call them before the ranks other than 0 may return.
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
            # AdamW updates its own copies of the weights: copy the module's new weights into them, or the next step
            # would bring the old ones back.
            self._engine.optimizer.refresh_fp32_params()
        write_moments(self.module, self._adamw, self._partitions, state)
        if self._average:
            self._average.write(self.module, state.ema)
        if self._scale:
            self._scale.restore(state.loss_scale)

    def _is_partitioned(self, tensor: Tensor) -> bool:
        """Whether the tensor has to be gathered to be read. ZeRO-3 partitions parameters; buffers stay whole."""
        return self._stage == 3 and isinstance(tensor, nn.Parameter)


def import_deepspeed(world: World) -> Any:
    """Import the package and prepare it for this device; raises UserError if it cannot be imported.

    Imported here rather than at the top of the file, so that the plain engine works without the package.
    """
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(f"deepspeed: cannot be imported ({error}); install it, or use engine.engine=plain") from error
    if world.device.type == "cpu":
        # Otherwise DeepSpeed compiles a C++ all-reduce for CPUs on first use, which takes 78 s and crashes without
        # ninja or g++. Written into the module's dict, because merely reading the attribute makes DeepSpeed probe each
        # of its ops with a compiler.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    # DeepSpeed sets this global for an engine with autocast and never clears it. An fp32 engine built later in the same
    # process would exchange gradients in the type of the earlier one.
    deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed\.")  # about its own calls
    return deepspeed
