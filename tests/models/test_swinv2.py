"""The model: one implementation for images and clips, start values, drop path, shapes, wrong arguments."""

import pytest
import torch

import video_swinv2 as vs
from tests.closeness import assert_close
from tests.models.reference import randomise
from video_swinv2.models.swinv2 import DropPath


def test_clip_model_differs_from_image_model_in_two_kinds_of_tensor():
    image = vs.create_model("swinv2_nano", num_classes=5, image_size=64).state_dict()
    clip = vs.create_model("swinv2_nano", num_classes=5, frames=8, image_size=64).state_dict()
    assert image.keys() == clip.keys()
    different = {name for name in image if image[name].shape != clip[name].shape}
    assert different == {"patch_embed.proj.weight"} | {n for n in image if n.endswith("cpb_mlp.0.weight")}


def test_checkpointed_blocks_change_nothing():
    gradients = []
    for blocks in (0, 3, 99):
        torch.manual_seed(1)
        model = vs.create_model(
            "swinv2_nano", num_classes=3, frames=4, image_size=64, window=4, drop_path=0.3, checkpoint_blocks=blocks
        )
        randomise(model).double().train()  # in fp64: rounding grows a lot where gradients are sums that cancel
        torch.manual_seed(2)
        model(torch.randn(2, 3, 4, 64, 64).double()).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert_close(a, b, 1e-6)


def test_fresh_blocks_are_the_identity():
    model = vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=64)
    x = torch.randn(1, 4, 8, 8, 32)
    assert torch.equal(model.layers[0](x, 0), x)


def test_drop_path_keeps_the_expectation():
    out = DropPath(0.25)(torch.zeros(40_000, 2), torch.ones(40_000, 2))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(out[:, 0], out[:, 1])
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(DropPath(0.25).eval()(out, torch.ones(40_000, 2)), out + 1)


def test_dropped_branches_leave_a_sample_as_it_is():
    stage = randomise(vs.create_model("swinv2_nano", num_classes=3, image_size=32, window=4)).train().layers[0]
    x = torch.randn(32, 8, 8, 32)
    for block in stage.blocks:
        block.drop_path.rate = 0.5
    unchanged = (stage(x, 0) == x).flatten(1).all(dim=1).float().mean().item()
    assert 0 < unchanged < 0.3  # four branches of two blocks: 1 / 16 of the samples pass all of them by
    stage.eval()
    assert not (stage(x, 0) == x).flatten(1).all(dim=1).any()


def test_dropped_branches_still_have_gradients():
    """A rank that left a branch out would reduce fewer gradients than the others: ZeRO 1-3 abort or hang."""
    model = randomise(vs.create_model("swinv2_nano", num_classes=3, image_size=32, window=4)).train()
    for block in model.blocks():
        block.drop_path.rate = 1 - 1e-7
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    for block in model.blocks():
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_drop_path_rates_rise_over_the_blocks():
    model = vs.create_model("swinv2_tiny", num_classes=3, image_size=64, drop_path=0.2)
    rates = [block.drop_path.rate for block in model.blocks()]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.2)
    assert rates == sorted(rates)


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
    with torch.device("meta"):
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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("simmim", [False, True])
def test_pixels_that_are_not_normalised_are_refused(dtype, simmim):
    """What a decoder returns, with what to do about it."""
    model = vs.create_model("swinv2_nano", num_classes=0, image_size=64, window=4)
    pixels = torch.zeros(1, 3, 64, 64, dtype=dtype)
    words = rf"^swinv2_nano takes normalised floating-point pixels, not {dtype}; divide pixels of 0 to 255 by 255, then"
    with pytest.raises(TypeError, match=words):
        vs.SimMIM(model, 32)(pixels, torch.zeros(1, 2, 2, dtype=torch.bool)) if simmim else model(pixels)


def test_a_pass_in_inference_mode_does_not_spoil_training():
    model = vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=64, window=(2, 4, 4))
    x = torch.randn(1, 3, 4, 64, 64)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert model.head.weight.grad.any()
