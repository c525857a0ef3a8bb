"""On a GPU the model leaves no tensor on the CPU and never waits: every backend, with fake tensors on `cuda`.

Not covered, because it needs a GPU: autocast, gradients of `flex` (compiled with Triton there), and all values.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from tests.models.fake_gpu import CUDA, backward, fake_gpu, place
from video_swinv2.models import attention, windows
from video_swinv2.models.attention import BACKENDS
from video_swinv2.models.swinv2 import SwinV2, _initialise

# Grids of 10 x 8 tokens (three in time) and then 5 x 4: both have to be padded to whole windows, and both are shifted.
IMAGES: dict[str, Any] = {"image_size": (37, 30), "patch_size": (4, 4), "window": (3, 2)}
CLIPS: dict[str, Any] = {"frames": 5, "image_size": (37, 30), "patch_size": (2, 4, 4), "window": (2, 3, 2)}
SHAPES = {"images": (2, 3, 37, 30), "clips": (2, 3, 5, 37, 30)}


def build(kind: str, backend: str = "auto") -> SwinV2:
    """A small model with everything that a model can have, on the fake GPU."""
    with torch.device("meta"):
        model = SwinV2(
            embed_dim=8,
            depths=(2, 1),
            num_heads=(2, 4),
            num_classes=7,
            drop_path=0.2,
            head_dropout=0.1,
            checkpoint_blocks=1,
            extra_norm_every=2,
            attention=backend,  # type: ignore[arg-type]  # pytest's parameters are plain strings
            **(IMAGES if kind == "images" else CLIPS),
        )
    return place(model)


@pytest.fixture
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`flex` without Triton, as on CPUs."""
    monkeypatch.setattr(attention, "_flex_attention", lambda _: flex_attention)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    ("backend", "mode"),
    [(backend, mode) for backend in BACKENDS for mode in ("train", "eval") if (backend, mode) != ("flex", "train")],
)
def test_the_forward_pass_stays_on_the_gpu(backend: str, kind: str, mode: str) -> None:
    """The second pass finds the kept layouts, and has nothing to copy."""
    waits: list[str] = []
    with fake_gpu(waits):
        model, pixels = build(kind, backend).train(mode == "train"), torch.empty(SHAPES[kind], device=CUDA)
        with torch.set_grad_enabled(mode == "train"):
            for _ in range(2):
                waits.clear()
                logits = model(pixels)
                assert (logits.device, logits.shape) == (CUDA, (2, 7))
            assert not waits
            assert {level.device for level in model.forward_pyramid(pixels)} == {CUDA}


@pytest.mark.parametrize("backend", ["eager", "sdpa", "sequential"])
def test_gradients_stay_on_the_gpu(backend: str) -> None:
    """The first block is recomputed in the backward pass (`checkpoint_blocks`), the others are not."""
    waits: list[str] = []
    with fake_gpu(waits):
        model = build("clips", backend).train()
        loss = model(torch.empty(SHAPES["clips"], device=CUDA)).sum()
        waits.clear()  # the layouts were copied in the forward pass, once
        backward(loss)
        assert not waits
        assert {None if p.grad is None else p.grad.device for p in model.parameters()} == {CUDA}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_model_that_moves_takes_its_kept_tensors_along(kind: str) -> None:
    """Layouts are kept between passes. A model that was used on the CPU before must not use those."""
    with fake_gpu(), torch.no_grad():
        model = build(kind).eval()
        for device in ("cpu", "cuda", "cpu"):
            assert place(model, device)(torch.empty(SHAPES[kind], device=device)).device.type == device


def test_start_values_are_drawn_on_the_cpu_for_a_weight_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a seed means the same weights under ZeRO-3, where they are on the GPU when they get their values."""
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, std: drawn.append(tensor))  # torch's reads values
    copies: list[str] = []
    with fake_gpu(copies):
        _initialise(place(nn.Linear(3, 2)))
    assert [(tensor.device.type, tensor.shape) for tensor in drawn] == [("cpu", (2, 3))]
    assert copies == ["aten.copy_.default"]


def test_waiting_is_found() -> None:
    """The other tests can fail: what makes the CPU wait for the GPU, and what does not."""
    waits: list[str] = []
    with fake_gpu(waits):
        on_gpu, on_cpu = torch.empty(3, device=CUDA), torch.empty(3)
        on_gpu.copy_(on_cpu, non_blocking=True)
        assert on_cpu.to(CUDA, non_blocking=True).sum() is not None
        assert float(on_cpu.sum()) == 1.0
        assert not waits
        torch.tensor([1.0, 2.0], device=CUDA)
        on_gpu.copy_(on_cpu)
        assert on_gpu[[0, 1]].cpu().shape == (2,)
        assert float(on_gpu.sum()) == 1.0
    assert len(waits) == 5


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_forgotten_device_is_found(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """These tests can fail: labels left on the CPU, as if `window_layout` did not move them."""
    same_region = windows.same_region
    monkeypatch.setattr(windows, "same_region", lambda label: same_region(label.cpu()))
    with fake_gpu():
        model = build("images", "eager").train(mode == "train")
        with pytest.raises(RuntimeError, match="device"), torch.set_grad_enabled(mode == "train"):
            model(torch.empty(SHAPES["images"], device=CUDA))
