"""Blocks compiled one by one, as `engine.compile` does it, beside the same blocks uncompiled: outputs and gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.closeness import assert_close
from tests.models.test_compile import INPUTS, gradients, inputs, small
from video_swinv2.engine.factory import compile_blocks, compiles_flex
from video_swinv2.models.attention import Backend

pytestmark = pytest.mark.gpu

IMAGE, CLIP = INPUTS


@pytest.mark.parametrize(
    ("sizes", "attention", "recomputed"), [(IMAGE, "auto", 2), (CLIP, "auto", 0), (CLIP, "flex", 0)]
)
def test_blocks_compile(
    sizes: tuple[int | None, tuple[int, int]], attention: Backend, recomputed: int, device: torch.device
) -> None:
    """Training, with activation checkpointing around the first blocks, then evaluation."""
    if attention == "flex" and device.type == "cpu":
        pytest.skip("torch has no gradients of flex on CPUs")
    if attention == "flex" and not compiles_flex():
        pytest.skip(f"torch {torch.__version__} fails to compile flex within a block")
    torch.compiler.reset()
    plain = small(sizes[0], depths=(2, 1) if device.type == "cuda" else (1, 1)).to(device)
    plain.checkpoint_blocks = recomputed
    compiled = copy.deepcopy(plain)
    for block in compiled.blocks():
        block.attn.attention = attention
    # Inductor takes most of a minute on a CPU. There, Dynamo alone shows that the test itself is right.
    compile_blocks(compiled, "inductor" if device.type == "cuda" else "eager")
    x = inputs(*sizes).to(device)
    expected = gradients(plain.train(), plain(x))
    for name, got in gradients(compiled.train(), compiled(x)).items():
        assert_close(got, expected[name], 5e-3, name=name)
    with torch.no_grad():
        assert_close(compiled.eval()(x), plain.eval()(x), 1e-3)
