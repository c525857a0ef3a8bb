"""torch.compile without graph breaks: the same outputs and gradients, and one compilation per shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import video_swinv2 as vs
from tests.closeness import assert_close
from tests.models.reference import randomise
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.variants import VARIANTS

# Frames and pixels: whole windows, and ones that need padding on every axis, a merging of an odd grid included.
INPUTS = [(None, (32, 32)), (5, (37, 42))]


def small(frames: int | None, *, depths: tuple[int, ...] = (2, 1), drop_path: float = 0.0) -> SwinV2:
    """Shifted and unshifted windows and one merging; torch.compile takes seconds per block."""
    return randomise(
        SwinV2(
            embed_dim=32,
            depths=depths,
            num_heads=[2**i for i in range(len(depths))],
            num_classes=3,
            frames=frames,
            image_size=32,
            window=(2, 4, 4) if frames else 4,
            patch_size=(1, 4, 4) if frames else 4,
            drop_path=drop_path,
        )
    )


def inputs(frames: int | None, size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *(() if frames is None else (frames,)), *size)


def gradients(model: SwinV2, logits: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(logits.square().sum(), parameters), strict=True))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize("frames, size", INPUTS)
def test_training(frames: int | None, size: tuple[int, int]) -> None:
    """Forward and backward with drop path; the compiler runs the same kernels, so even the draws agree."""
    model = small(frames, drop_path=0.5).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = inputs(frames, size, batch=4)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    got = compiled(x)
    torch.manual_seed(4)
    assert not torch.allclose(model(x), expected, atol=1e-2), "drop path changes nothing: the test proves nothing"
    assert_close(got, expected)
    of_compiled = gradients(model, got)
    for name, gradient in gradients(model, expected).items():
        torch.testing.assert_close(
            of_compiled[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name
        )


def test_evaluation_compiles_once_per_shape() -> None:
    """The first call sees no kept layouts and fills them in; neither that nor other values may compile again."""
    model = small(5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    first, second = inputs(5, (37, 42)), inputs(5, (37, 42))
    with torch.no_grad():
        got = [compiled(first), compiled(second), compiled(first)]
        assert_close(got[0], model(first))
        assert_close(got[1], model(second))
        assert_close(got[2], got[0])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["swinv2_nano", "swinv2_tiny"])
def test_a_size_is_one_graph(name: str) -> None:
    one_graph(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_size_is_one_graph(name: str) -> None:
    one_graph(name)


def one_graph(name: str) -> None:
    """True widths and heads, one block per stage, with the extra norms where the size has them."""
    variant = VARIANTS[name]
    model = SwinV2(
        embed_dim=variant.embed_dim,
        depths=(1,) * 4,
        num_heads=variant.num_heads,
        extra_norm_every=bool(variant.extra_norm_every),
        num_classes=3,
        frames=2,
        image_size=32,
        window=(1, 4, 4),
    ).eval()
    # The eager backend traces and then runs the very same operations.
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    x = inputs(2, (32, 32), batch=1)
    with torch.no_grad():
        assert_close(compiled(x), model(x))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_whole_nano_with_checkpointing_trains_compiled() -> None:
    model = randomise(vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=32, checkpoint_blocks=4))
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = inputs(4, (32, 32))
    expected, got = gradients(model, model(x)), gradients(model, compiled(x))
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)
