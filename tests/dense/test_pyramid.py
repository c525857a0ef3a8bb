"""The pyramid of dense heads: its shapes, its norms, and the window that is free at test time."""

import math

import pytest
import torch

from tests.closeness import assert_close
from video_swinv2.dense.pyramid import PyramidBackbone
from video_swinv2.models.variants import create_model


def pyramid(**sizes):
    return PyramidBackbone(create_model("swinv2_nano", features_only=True, **sizes))


@pytest.mark.parametrize("size", [(64, 64), (61, 130), (33, 7)])
def test_maps_of_images_of_any_size(size):
    backbone = pyramid(image_size=64, window=4).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, *size))
    grid = tuple(math.ceil(pixels / 4) for pixels in size)
    for stage, found in enumerate(maps):
        assert found.shape == (2, backbone.channels[stage], *grid)
        grid = tuple(math.ceil(n / 2) for n in grid)
    assert backbone.channels == [32, 64, 128, 256]
    assert backbone.strides == [4, 8, 16, 32]


def test_every_map_is_normalised_by_its_own_norm():
    backbone = pyramid(image_size=32, window=4).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for stage in range(4):
            backbone.get_submodule(f"norm{stage}").bias.fill_(stage + 1.0)
        maps = backbone(image)
        raw = backbone.encoder.forward_pyramid(image)
    for stage, (found, before) in enumerate(zip(maps, raw, strict=True)):
        centred = before - before.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        assert_close(found, centred / (variance + 1e-5).sqrt() + stage + 1)
    # The names are those of Swin's detection code.
    assert {name.split(".")[0] for name in backbone.state_dict()} == {"encoder", "norm0", "norm1", "norm2", "norm3"}


def test_another_window_keeps_the_normaliser_and_the_weights():
    small = pyramid(image_size=64, window=4).eval()
    large = pyramid(image_size=64, window=16, cpb_norm=small.encoder.cpb_norm).eval()
    large.load_state_dict(small.state_dict())
    assert large.encoder.cpb_norm == small.encoder.cpb_norm == [(4, 4), (4, 4), (4, 4), (2, 2)]
    image = torch.randn(1, 3, 16, 16)  # one window of 4 x 4 tokens for both models
    with torch.no_grad():
        for ours, theirs in zip(small(image), large(image), strict=True):
            assert_close(ours, theirs)


def test_the_pyramid_of_a_clip():
    backbone = pyramid(frames=4, image_size=32, window=(2, 4, 4)).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 4, 32, 48))
    assert [tuple(found.shape) for found in maps] == [
        (1, 32, 2, 8, 12),
        (1, 64, 2, 4, 6),
        (1, 128, 2, 2, 3),
        (1, 256, 2, 1, 2),
    ]


def test_every_parameter_has_a_gradient():
    backbone = pyramid(image_size=32, window=4)
    sum((found * torch.randn_like(found)).sum() for found in backbone(torch.randn(2, 3, 32, 32))).backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_a_model_with_a_head_is_refused():
    with pytest.raises(ValueError, match="use features_only=True"):
        PyramidBackbone(create_model("swinv2_nano", num_classes=3))
