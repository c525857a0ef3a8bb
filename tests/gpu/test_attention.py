"""Every attention backend on the GPU beside `eager` in fp64: outputs and all gradients, in fp32 and in bf16."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import video_swinv2 as vs
from tests.closeness import assert_close
from tests.models import equivalence
from tests.models.reference import Grid, randomise
from video_swinv2.models.attention import LARGE_WINDOW, Backend
from video_swinv2.models.swinv2 import SwinV2

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")]

BACKENDS: tuple[Backend, ...] = ("eager", "sdpa", "flex", "sequential")
# Both blocks of a stage: without and with shift. Whole windows, odd ones, and axes that need padding.
GRIDS = (
    Grid((8, 14, 14), (8, 7, 7)),
    Grid((6, 14, 21), (3, 7, 7)),
    Grid((5, 16, 13), (3, 5, 7)),
    Grid((2, 9, 11), (8, 4, 8)),
)
LARGE = (
    Grid((4, 32, 32), (4, 16, 16)),  # windows of 1,024 tokens
    Grid((8, 24, 40), (8, 24, 24)),  # windows of 4,608 tokens, the second padded
)
# Of the largest expected value. With a scale of 100 in one head, rounding in fp32 reaches 1e-4 in a gradient.
FP32 = {"output": 1e-4, "gradients": 2e-3}
# bf16 has 8 bits, so a rounding is 0.004; CPUs reach 0.006. Gradients of scales and norms are sums that cancel:
# CPUs reach 0.15, also with `eager`. A wrong mask or offset does more than that, and fp32 shows what does less.
BF16 = {"output": 0.03, "gradients": 0.3}


@pytest.fixture(autouse=True)
def _fresh(device: torch.device) -> Iterator[None]:
    """Forget what was compiled: torch.compile gives up after eight versions of one function. Leave no memory taken."""
    yield
    if device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()


def stage_of(case: Grid) -> nn.Module:
    """A stage of two blocks, in training mode, with a scale that bf16 can stand."""
    model = SwinV2(
        embed_dim=64, depths=(2,), num_heads=(2,), num_classes=0, frames=4, image_size=32, window=case.window,
        cpb_norm=[case.norm or case.window],
    )  # fmt: skip
    stage = randomise(model).stages()[0].train()
    with torch.no_grad():
        for block in model.blocks():
            block.attn.logit_scale.fill_(math.log(10))
    return stage


def answers(stage: nn.Module, case: Grid, backend: Backend, x: Tensor, *, bf16: bool = False) -> dict[str, Tensor]:
    """The output for tokens x (1, T, H, W, C), and the gradients of x and of every parameter, by name."""
    stage = copy.deepcopy(stage).to(x.device, x.dtype)
    for block in stage.blocks:
        block.attn.attention = backend
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        out = stage(x, 0)
    # Random weights: with equal ones, the last norm would make most gradients vanish.
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * weights.to(x.device)).sum().backward()
    found = {"output": out.detach(), "input": x.grad}
    found |= {name: parameter.grad for name, parameter in stage.named_parameters() if parameter.requires_grad}
    if not all(tensor is not None and tensor.any() for tensor in found.values()):
        raise AssertionError("a gradient that is zero proves nothing")
    return {name: tensor.double() for name, tensor in found.items() if tensor is not None}


def compare(
    case: Grid, backend: Backend, device: torch.device, tolerance: dict[str, float], record: Callable[..., None]
) -> None:
    """Compare a backend with eager in fp64 on the same device, and record the largest ratio of difference to value."""
    if backend == "flex" and device.type == "cpu":
        pytest.skip("torch has no gradients of flex on CPUs")
    stage = stage_of(case)
    x = torch.randn(1, *case.grid, 64, generator=torch.Generator().manual_seed(2)).to(device)
    expected = answers(stage, case, "eager", x.double())
    got = answers(stage, case, backend, x, bf16=tolerance is BF16)
    ratios = {name: float((got[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()}
    worst = max((ratio, name) for name, ratio in ratios.items() if name != "output")
    record("backend", backend)
    record("precision", "bf16" if tolerance is BF16 else "fp32")
    record("output_error", ratios["output"])
    record("gradient_error", worst[0])
    record("gradient", worst[1])
    for name, value in expected.items():
        assert_close(got[name], value, tolerance["output" if name == "output" else "gradients"], name=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GRIDS, ids=str)
def test_backends_agree(
    case: Grid, backend: Backend, precision: str, device: torch.device, record_property: Callable[..., None]
) -> None:
    compare(case, backend, device, FP32 if precision == "fp32" else BF16, record_property)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_backends_agree_in_large_windows(
    case: Grid, backend: Backend, precision: str, device: torch.device, record_property: Callable[..., None]
) -> None:
    if device.type == "cpu":  # the same with 64 tokens
        case = Grid((4, 8, 8), (4, 4, 4))
    compare(case, backend, device, FP32 if precision == "fp32" else BF16, record_property)


@pytest.mark.parametrize("size", [(64, 64), (70, 57)])
@pytest.mark.parametrize("frames", [1, 5, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_model_is_that_of_the_cpu(
    backend: Backend, frames: int, size: tuple[int, int], device: torch.device
) -> None:
    """All stages and mergings, with one head's scale past its limit of 100, against eager in fp64 on the CPU."""
    if backend == "flex" and device.type == "cpu":
        pytest.skip("torch has no gradients of flex on CPUs")
    expected = equivalence.answers("eager", frames, size, torch.float64)
    for name, got in equivalence.answers(backend, frames, size, device=device.type).items():
        assert_close(got.double(), expected[name], 1e-2 if name != "logits" else 1e-3, name=name)


def test_half_precision_is_finite_and_near(device: torch.device) -> None:
    """A whole model under autocast, with a dead image among the clips, in both half precisions."""
    model = randomise(vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=32, window=(2, 4, 4)))
    model.to(device)
    x = torch.randn(2, 3, 6, 32, 32).to(device)
    x[1] = 0
    for backend in BACKENDS:
        for block in model.blocks():
            block.attn.attention = backend
        with torch.no_grad():
            exact = model(x)
            for dtype in (torch.bfloat16, torch.float16):
                with torch.autocast(device.type, dtype=dtype):
                    half = model(x)
                assert half.isfinite().all(), backend
                assert_close(half.float(), exact, 0.05, name=f"{backend}, {dtype}")


def test_auto_trains_large_windows_in_less_memory(cuda: torch.device, record_property: Callable[..., None]) -> None:
    """What `auto` is for: from LARGE_WINDOW tokens on, no N x N gradient of the bias for every window."""
    case = LARGE[0]
    assert math.prod(case.window) >= LARGE_WINDOW
    x = torch.randn(1, *case.grid, 64, device=cuda)
    peaks: dict[str, int] = {}
    backends: tuple[Backend, ...] = ("auto", "eager")
    for backend in backends:
        torch.cuda.reset_peak_memory_stats()
        answers(stage_of(case), case, backend, x, bf16=True)
        peaks[backend] = torch.cuda.max_memory_allocated()
        record_property(f"{backend}_peak_bytes", peaks[backend])
    assert peaks["auto"] < peaks["eager"]
