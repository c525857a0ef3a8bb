"""Attention: every layout against the definition, every backend against eager, half precision, the kept bias."""

import itertools
import math

import pytest
import torch

import video_swinv2 as vs
import video_swinv2.models.sequential as pieces
from tests.closeness import assert_close
from tests.models.equivalence import answers, can_differentiate
from tests.models.parity import KINDS
from tests.models.reference import GRIDS, Grid, features, randomise, reference_answers
from video_swinv2.models.attention import WindowAttention
from video_swinv2.models.position_bias import window_coordinates
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


@pytest.mark.parametrize("piece", [1, 2**13, 2**15])
@pytest.mark.parametrize("frames", [1, 8])
def test_pieces_of_any_size_have_the_same_gradients(monkeypatch, piece, frames):
    """Limits in bytes: a window and head at a time (8 KiB each), several heads of a window, and several windows."""
    expected = answers("eager", frames, (70, 57), torch.float64)  # as above
    monkeypatch.setattr(pieces, "CPU_PIECE", piece)
    got = answers("sequential", frames, (70, 57), torch.float64)
    for name, gradient in expected.items():
        assert_close(got[name], gradient, 1e-9, name=name)


def test_groups_of_heads_have_the_same_gradients(monkeypatch):
    """When the expanded bias of all heads is too large, they are computed in groups; here, head by head."""
    expected = answers("eager", 8, (70, 57), torch.float64)
    monkeypatch.setattr(pieces, "PIECE_LIMIT", 1)
    got = answers("sequential", 8, (70, 57), torch.float64)
    for name, gradient in expected.items():
        assert_close(got[name], gradient, 1e-9, name=name)


@pytest.mark.parametrize(("scale", "limit"), [(10.0, 0.03), (100.0, 0.09)])
def test_gradients_in_bf16_are_near_those_in_fp64(scale, limit):
    """As near as the rounding of q and k allows, also where logits reach 100 and their rounding alone would be 0.25.

    The errors measured when q and k are the only numbers that are rounded are 0.012 and 0.075.
    """
    layout = window_layout((8, 14, 14), (8, 7, 7), True, torch.device("cpu"))
    coordinates = window_coordinates((8, 7, 7), (8, 7, 7), torch.device("cpu"))
    x, grad = torch.randn(2, 1, 4, 392, 64, dtype=torch.float64)
    found = []
    layer = WindowAttention(64, 2, 3, "sequential").double()
    torch.nn.init.normal_(layer.qkv.weight, std=0.1)
    torch.nn.init.normal_(layer.cpb_mlp[2].weight, std=0.4)
    torch.nn.init.constant_(layer.logit_scale, math.log(scale) - 1e-6)  # just below the clamp
    for dtype in (torch.float64, torch.float32):
        layer.to(dtype).zero_grad()
        given = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            out = layer(given, layout, coordinates)
        out.backward(grad.to(out.dtype))
        found.append({"input": given.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()})
    for name, expected in found[0].items():
        error = (found[1][name].double() - expected).norm() / expected.norm()
        assert error < limit, f"{name}: {error:.3f}"


def test_padding_is_never_attended_to():
    """The same clip in a grid of whole windows and in one that needs padding, with windows that hold it whole."""
    model = randomise(vs.create_model("swinv2_nano", num_classes=3, frames=8, image_size=64, window=(4, 4, 4)))
    block = model.layers[0].blocks[0]
    norm = model.cpb_norm[0]
    x = torch.randn(1, 3, 6, 7, 32)
    with torch.no_grad():
        layout = window_layout((3, 6, 7), (4, 4, 4), False, x.device)
        out = block(x, layout, window_coordinates(layout.window, norm, x.device))
        # The last window of the last two axes holds rows 4-5 and columns 4-6 alone: a window of its own.
        alone = x[:, :, 4:6, 4:7]
        layout = WindowLayout((3, 2, 3), (3, 2, 3), (3, 2, 3), (0, 0, 0), None)
        expected = block(alone, layout, window_coordinates(layout.window, norm, x.device))
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


class Scaled(torch.nn.Module):
    """A parametrization whose factor is not a parameter, as in low-rank adapters that are switched on and off."""

    factor = 1.0

    def forward(self, weight):
        return self.factor * weight


def swap_by_data(weights):
    for weight in weights:
        weight.data = 3 * weight.data


def write_with_numpy(weights):
    for weight in weights:
        weight.detach().numpy()[:] *= 3


def average_by_hand(weights):
    """As in EMA and MoCo written by hand."""
    for weight in weights:
        weight.data.mul_(0.5).add_(2.5 * weight.data)


# How the weights of the bias network come to be three times what they were.
TRIPLED = {
    "in place": lambda model, weights: [weight.mul_(3) for weight in weights],
    "data.mul_": lambda model, weights: [weight.data.mul_(3) for weight in weights],
    "data.copy_": lambda model, weights: [weight.data.copy_(3 * weight) for weight in weights],
    "data swapped": lambda model, weights: swap_by_data(weights),
    "average by hand": lambda model, weights: average_by_hand(weights),
    "_foreach on data": lambda model, weights: torch._foreach_mul_([weight.data for weight in weights], 3),
    "NumPy": lambda model, weights: write_with_numpy(weights),
    "load_state_dict": lambda model, weights: model.load_state_dict(
        {name: (3 * value if "cpb_mlp" in name else value) for name, value in model.state_dict().items()}
    ),
}


def bias_weights(model):
    return [weight for name, weight in model.named_parameters() if "cpb_mlp" in name]


def stale_by(model, x):
    """How far the logits of a model are from those of a new one with the same weights, relative to the largest."""
    fresh = vs.SwinV2(**model.architecture()).to(x).eval()
    fresh.load_state_dict(model.state_dict())
    expected = fresh(x)
    return ((model(x) - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def used():
    """A model in eval mode after a forward pass, in fp64, and its pixels."""
    model = vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=32, window=(2, 4, 4))
    randomise(model).double().eval()
    x = torch.randn(1, 3, 4, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    return model, x


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", TRIPLED)
def test_the_bias_follows_the_weights_whatever_changes_them(used, change, context):
    """The next pass is a new model's. Nothing of the weights is kept: not every write leaves a trace that tells."""
    model, x = used
    with torch.no_grad():
        before = model(x)
        TRIPLED[change](model, bias_weights(model))
    with context():
        after = model(x)
        assert (after - before).abs().max() > 1e-3 * before.abs().max()
        assert stale_by(model, x) < 1e-12


def test_the_bias_follows_weights_made_in_inference_mode():
    """Such tensors have no version counter, and may be written to as long as the mode lasts."""
    with torch.inference_mode():
        model = randomise(vs.create_model("swinv2_nano", num_classes=3, image_size=32, window=4)).double().eval()
        x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
        model(x)
        for weight in bias_weights(model):
            weight.mul_(3)
        assert stale_by(model, x) < 1e-12


def test_the_bias_follows_a_parametrization(used):
    model, x = used
    scaled = Scaled()
    for block in model.blocks():
        torch.nn.utils.parametrize.register_parametrization(block.attn.cpb_mlp[2], "weight", scaled)
    with torch.no_grad():
        model(x)
        scaled.factor = 3.0
        after = model(x)
        for block in model.blocks():
            torch.nn.utils.parametrize.remove_parametrizations(block.attn.cpb_mlp[2], "weight")
        assert_close(model(x), after, 1e-12)
        assert stale_by(model, x) < 1e-12


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
