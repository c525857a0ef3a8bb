"""Attention: every layout against the definition, every backend against eager, half precision, the kept bias."""

import itertools

import pytest
import torch

import video_swinv2 as vs
import video_swinv2.models.sequential as pieces
from tests.closeness import assert_close
from tests.models.equivalence import answers, can_differentiate
from tests.models.parity import KINDS
from tests.models.reference import GRIDS, Grid, features, randomise, reference_answers
from video_swinv2.models.windows import WindowLayout, window_layout

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

AXES = ((1, 2, 4, 3), (2, 3, 6, 5), (3, 4, 8, 6))  # for windows of 2, 3, 4: shorter, as long, twice, not a multiple


def agree(case: Grid) -> None:
    """Every backend gives the features of the definition."""
    expected, *found = reference_answers(case, KINDS)
    for backend, got in zip(KINDS, found, strict=True):
        assert_close(got.double(), expected, name=backend)


@pytest.mark.parametrize("case", GRIDS, ids=str)
def test_blocks_are_the_definition(case):
    agree(case)


@pytest.mark.parametrize("grid", list(itertools.product(*AXES)))
def test_every_combination_of_axes_is_the_definition(grid):
    """Each axis shorter than its window, as long, twice as long (and so shifted), or not a multiple: 64 layouts."""
    agree(Grid(grid, (2, 3, 4)))


def test_whole_clip_model_is_the_definition():
    """All stages, patches and mergings that need padding, normalisers that are not the windows."""
    norms = [(8, 7, 7), (8, 7, 7), (8, 7, 7), (8, 6, 6)]
    model = vs.create_model("swinv2_nano", num_classes=0, frames=7, image_size=44, window=(3, 4, 4), cpb_norm=norms)
    randomise(model)
    x = torch.randn(1, 3, 7, 44, 37)
    with torch.no_grad():
        got = model.forward_features(x)
    assert got.shape == (1, 4, 2, 2, 256)
    assert_close(got.double(), features(model, x))


@pytest.mark.parametrize("size", [(64, 64), (70, 57)])
@pytest.mark.parametrize("frames", [1, 5, 8])
@pytest.mark.parametrize("backend", [kind for kind in KINDS if kind != "eager"])
def test_backends_have_the_same_gradients(backend, frames, size):
    """In the input and every parameter, logit scales and the bias network among them; with padding and shifts.

    In fp64, where 1e-13 of the largest element is left: in fp32, sums that cancel leave up to 2e-4.
    """
    if not can_differentiate(backend):
        pytest.skip(f"torch has no gradients of {backend} on CPUs")
    expected, got = (answers(kind, frames, size, torch.float64) for kind in ("eager", backend))
    for name, gradient in expected.items():
        assert_close(got[name], gradient, 1e-9, name=name)


@pytest.mark.parametrize("piece", [1, 2**10, 2**19])
@pytest.mark.parametrize("frames", [1, 8])
def test_sequential_makes_weights_again_or_keeps_them(monkeypatch, piece, frames):
    """A window and head at a time, several, and all at once; small problems keep their weights, others do not."""
    kept = answers("sequential", frames, (70, 57), torch.float64)  # as above
    monkeypatch.setattr(pieces, "CPU_KEPT", 0)
    monkeypatch.setattr(pieces, "CPU_PIECE", piece)
    again = answers("sequential", frames, (70, 57), torch.float64)
    for name, expected in kept.items():
        assert_close(again[name], expected, 1e-9, name=name)


def test_padding_is_never_attended_to():
    """The same clip in a grid of whole windows and in one that needs padding, with windows that hold it whole."""
    model = randomise(vs.create_model("swinv2_nano", num_classes=3, frames=8, image_size=64, window=(4, 4, 4)))
    block = model.layers[0].blocks[0]
    norm = model.cpb_norm[0]
    x = torch.randn(1, 3, 6, 7, 32)
    with torch.no_grad():
        out = block(x, window_layout((3, 6, 7), (4, 4, 4), False, x.device), norm)
        # The last window of the last two axes holds rows 4-5 and columns 4-6 alone: a window of its own.
        alone = x[:, :, 4:6, 4:7]
        expected = block(alone, WindowLayout((3, 2, 3), (3, 2, 3), (3, 2, 3), (0, 0, 0), None), norm)
    assert_close(out[:, :, 4:6, 4:7], expected)


def test_the_key_has_no_bias_and_logit_scales_are_clamped():
    """Below ln 100 the scale acts and learns, above it nothing changes: the clamp is in the forward pass."""
    model = randomise(vs.create_model("swinv2_nano", num_classes=3, image_size=32, window=4))
    x = torch.randn(1, 3, 32, 32)
    scales = [block.attn.logit_scale for block in model.blocks()]
    outputs = []
    for value in (4.0, 4.605171, 6.0):
        for scale in scales:
            torch.nn.init.constant_(scale, value)
        outputs.append(model(x))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert_close(outputs[1], outputs[2])
    outputs[2].sum().backward()
    assert all(not scale.grad.any() for scale in scales)
    assert not any("k_bias" in name for name in model.state_dict())


def test_kept_bias_follows_the_weights():
    model = randomise(vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=32))
    x = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        before = model(x)
        assert_close(model(x), before)
        model.layers[0].blocks[0].attn.cpb_mlp[2].weight.add_(1.0 * torch.randn(1, 512))
        after = model(x)
        assert (after - before).abs().max() > 1e-3 * before.abs().max()
        fresh = vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=32).eval()
        fresh.load_state_dict(model.state_dict())
        assert_close(fresh(x), after)


@pytest.mark.parametrize(("partitioned", "tables"), [(False, 1), (True, 2)])
def test_a_partitioned_model_keeps_no_bias(partitioned, tables):
    """Under ZeRO-3 each table is a collective, so the processes must not decide alone whether to compute one."""
    model = vs.create_model("swinv2_nano", num_classes=3, image_size=32).eval()
    computed = []
    network = model.layers[0].blocks[0].attn.cpb_mlp
    network.register_forward_hook(lambda *_: computed.append(1))
    for parameter in network.parameters() if partitioned else ():
        parameter.ds_shape = parameter.shape  # as DeepSpeed does
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(1, 3, 32, 32))
    assert len(computed) == tables


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", KINDS)
def test_half_precision_stays_finite_and_near(dtype, attention):
    model = randomise(
        vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=32, window=(2, 4, 4), attention=attention)
    )
    x = torch.randn(2, 3, 6, 32, 32)
    x[1] = 0  # equal tokens; q and k of a dead image
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=dtype):
            half = model(x)
    assert half.isfinite().all()
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()
