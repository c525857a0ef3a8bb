"""The model: counts, names, equality with timm, one implementation for images and clips."""

import pytest
import timm
import torch
from torch import nn

import video_swinv2 as vs

IMAGE_PARAMETERS = {  # with 1000 classes; the specification's table, equal to timm and Hugging Face
    "swinv2_tiny": 28_347_154,
    "swinv2_small": 49_728_418,
    "swinv2_base": 87_918_816,
    "swinv2_large": 196_739_932,
    "swinv2_huge": 658_036_370,
    "swinv2_giant": 3_001_940_680,
}
CLIP_PARAMETERS = {  # with 400 classes and patches of two frames
    "swinv2_tiny": 27_896_506,
    "swinv2_small": 49_283_914,
    "swinv2_base": 87_322_248,
    "swinv2_large": 195_839_236,
    "swinv2_huge": 656_375_354,
    "swinv2_giant": 2_999_532_656,
}


def randomise(model: nn.Module) -> nn.Module:
    """Every tensor away from its start: post-norms begin at zero, which would make any comparison empty."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5)
            elif name.endswith("logit_scale"):
                p.uniform_(1.0, 3.0)
                p[1:2] = 5.2  # one head past the clamp at ln 100 = 4.6
            elif "cpb_mlp" in name:
                p.normal_(std=0.4)
            else:
                p.normal_(std=0.02 if p.ndim > 1 else 0.1)
    return model.eval()


def from_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names to Microsoft's: merging sits at the start of the next stage there, the head one level deeper."""
    ours = {}
    for name, tensor in state.items():
        if any(part in name for part in ("relative_", "attn_mask", "k_bias")):
            continue
        parts = name.replace("head.fc.", "head.").split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        ours[".".join(parts)] = tensor
    return ours


@pytest.mark.parametrize(("name", "count"), IMAGE_PARAMETERS.items())
def test_image_parameters(name, count):
    with torch.device("meta"):
        model = vs.create_model(name, num_classes=1000, image_size=256, window=8)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("name", "count"), CLIP_PARAMETERS.items())
def test_clip_parameters(name, count):
    with torch.device("meta"):
        model = vs.create_model(name, num_classes=400, frames=16, patch_size=(2, 4, 4), window=(8, 7, 7))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_names_and_shapes_are_microsofts(size):
    """timm keeps Microsoft's names but for merging and head, so its shapes stand for Microsoft's here."""
    with torch.device("meta"):
        ours = vs.create_model(f"swinv2_{size}", num_classes=1000, image_size=192, window=12).state_dict()
        variant = {"tiny": "tiny_window8_256", "small": "small_window8_256"}.get(size, f"{size}_window12_192")
        theirs = from_timm(timm.create_model(f"swinv2_{variant}", num_classes=1000).state_dict())
    assert {k: tuple(v.shape) for k, v in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}


def test_clip_model_differs_from_image_model_in_two_kinds_of_tensor():
    image = vs.create_model("swinv2_nano", num_classes=5, image_size=64).state_dict()
    clip = vs.create_model("swinv2_nano", num_classes=5, frames=8, image_size=64).state_dict()
    assert image.keys() == clip.keys()
    different = {name for name in image if image[name].shape != clip[name].shape}
    assert different == {"patch_embed.proj.weight"} | {n for n in image if n.endswith("cpb_mlp.0.weight")}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("timm_name", "size", "window", "norm"),
    [
        ("swinv2_tiny_window8_256", (256, 256), 8, None),
        ("swinv2_tiny_window8_256", (128, 256), 8, None),
        ("swinv2_tiny_window16_256", (256, 256), 16, ((12, 12), (12, 12), (12, 12), (6, 6))),
    ],
)
def test_equal_to_timm(timm_name, size, window, norm, attention):
    pretrained = [n[0] for n in norm] if norm else (0, 0, 0, 0)
    theirs = randomise(timm.create_model(timm_name, num_classes=7, img_size=size, pretrained_window_sizes=pretrained))
    ours = vs.create_model(
        "swinv2_tiny", num_classes=7, image_size=size, window=window, cpb_norm=norm, attention=attention
    )
    ours.load_state_dict(from_timm(theirs.state_dict()))
    ours.eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, got = theirs(x), ours(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 5, 8, 11])
@pytest.mark.parametrize("size", [(64, 64), (70, 57)])
def test_backends_agree_in_outputs_and_gradients(frames, size):
    outputs, gradients = [], []
    for attention in ("eager", "sdpa"):
        torch.manual_seed(1)
        model = vs.create_model(
            "swinv2_nano", num_classes=3, frames=8, image_size=64, window=(2, 4, 4), attention=attention
        )
        randomise(model)
        x = torch.randn(2, 3, frames, *size, requires_grad=True)
        logits = model(x)
        logits.square().sum().backward()
        outputs.append(logits.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters()} | {"input": x.grad})
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_checkpointed_blocks_change_nothing():
    gradients = []
    for blocks in (0, 3, 99):
        torch.manual_seed(1)
        model = vs.create_model(
            "swinv2_nano", num_classes=3, frames=4, image_size=64, window=4, drop_path=0.3, checkpoint_blocks=blocks
        )
        randomise(model).train()
        torch.manual_seed(2)
        model(torch.randn(2, 3, 4, 64, 64)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_padding_is_never_attended_to():
    """The same clip in a grid of whole windows and in one that needs padding, with windows that hold it whole."""
    model = randomise(vs.create_model("swinv2_nano", num_classes=3, frames=8, image_size=64, window=(4, 4, 4)))
    attention = model.layers[0].blocks[0]
    norm = model.cpb_norm[0]
    from video_swinv2.models.windows import Layout, layout

    x = torch.randn(1, 3, 6, 7, 32)
    with torch.no_grad():
        out = attention(x, layout((3, 6, 7), (4, 4, 4), False, x.device), norm)
        # The last window of the last two axes holds rows 4-5 and columns 4-6 alone: a window of its own.
        alone = x[:, :, 4:6, 4:7]
        expected = attention(alone, Layout((3, 2, 3), (3, 2, 3), (3, 2, 3), (0, 0, 0), None), norm)
    torch.testing.assert_close(out[:, :, 4:6, 4:7], expected, rtol=0, atol=1e-5)


def test_fresh_blocks_are_the_identity():
    model = vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=64)
    x = torch.randn(1, 4, 8, 8, 32)
    assert torch.equal(model.layers[0](x, 0), x)


def test_drop_path_keeps_the_expectation():
    from video_swinv2.models.swinv2 import DropPath

    out = DropPath(0.25)(torch.ones(40_000, 2))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(out[:, 0], out[:, 1])
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(DropPath(0.25).eval()(out), out)


def test_drop_path_rates_rise_over_the_blocks():
    model = vs.create_model("swinv2_tiny", num_classes=3, image_size=64, drop_path=0.2)
    rates = [block.drop_path.rate for block in model.blocks()]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.2)
    assert rates == sorted(rates)


def test_kept_bias_follows_the_weights():
    model = randomise(vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=32))
    x = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before)
        model.layers[0].blocks[0].attn.cpb_mlp[2].weight.add_(1.0 * torch.randn(1, 512))
        after = model(x)
        assert not torch.equal(before, after)
        fresh = vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=32).eval()
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(fresh(x), after, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision_stays_finite_and_near(dtype, attention):
    model = randomise(
        vs.create_model("swinv2_nano", num_classes=3, frames=8, image_size=64, window=4, attention=attention)
    )
    x = torch.randn(2, 3, 8, 64, 64)
    x[1] = 0  # equal tokens; q and k of a dead image
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=dtype):
            half = model(x)
    assert half.isfinite().all()
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_pyramid_and_features_have_the_documented_shapes():
    model = vs.create_model("swinv2_nano", num_classes=3, frames=8, image_size=64).eval()
    x = torch.randn(2, 3, 8, 64, 96)
    with torch.no_grad():
        assert [tuple(f.shape) for f in model.forward_pyramid(x)] == [
            (2, 32, 4, 16, 24),
            (2, 64, 4, 8, 12),
            (2, 128, 4, 4, 6),
            (2, 256, 4, 2, 3),
        ]
        assert model.forward_features(x).shape == (2, 4, 2, 3, 256)


def test_normalisers_are_the_native_windows_and_do_not_follow_the_test_window():
    simmim = vs.create_model("swinv2_base", num_classes=0, image_size=192, window=12)
    assert simmim.cpb_norm == [(12, 12), (12, 12), (12, 12), (6, 6)]
    clip = vs.create_model(
        "swinv2_tiny", num_classes=4, frames=8, image_size=224, patch_size=(2, 4, 4), window=(8, 7, 7)
    )
    assert clip.cpb_norm == [(4, 7, 7)] * 4
    other = vs.create_model(
        "swinv2_tiny", num_classes=4, frames=8, image_size=224, window=(4, 14, 14), cpb_norm=clip.cpb_norm
    )
    assert other.cpb_norm == clip.cpb_norm


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "swinv2_tinny"}, "did you mean 'swinv2_tiny'"),
        ({"window": (8, 7)}, "window"),
        ({"patch_size": 0}, "patch_size"),
        ({"attention": "quick"}, "attention"),
        ({"cpb_norm": [(1, 2, 3)]}, "cpb_norm"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        vs.create_model(**({"name": "swinv2_tiny", "num_classes": 3, "frames": 8} | arguments))


def test_wrong_input_is_refused():
    model = vs.create_model("swinv2_nano", num_classes=3, frames=8, image_size=64)
    with pytest.raises(ValueError, match=r"takes \(B, 3, T, H, W\)"):
        model(torch.randn(1, 3, 64, 64))
