"""Augmentation treats all frames of a clip alike; mixing and normalisation do what they say."""

import math
from typing import Any

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tests.closeness import assert_close
from video_swinv2.config import AugmentConfig
from video_swinv2.data.transforms import (
    GREY,
    OPERATIONS,
    mix,
    normalise,
    training_transform,
    validation_transform,
)

WARP: dict[str, Any] = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": list(GREY)}


def test_all_frames_get_the_same_change():
    augment = AugmentConfig(crop_area=(0.3, 1.0), flip=0.5, rand_augment=2, rand_magnitude=9, erasing=0.5)
    frame = torch.randint(0, 256, (3, 40, 52), dtype=torch.uint8)
    transform = training_transform(augment, (32, 32))
    results = []
    for seed in range(20):
        torch.manual_seed(seed)
        clip = transform(frame.expand(4, -1, -1, -1).contiguous())
        assert clip.shape == (4, 3, 32, 32)
        assert clip.dtype == torch.uint8
        assert all(torch.equal(clip[0], other) for other in clip[1:])
        results.append(clip)
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("size", [(32, 32), (24, 32)])
def test_flip_can_be_switched_off(size):
    """A ramp from dark to bright remains one: nothing swaps left and right."""
    ramp = torch.arange(64, dtype=torch.uint8).expand(2, 3, 48, 64) * 3
    transform = training_transform(AugmentConfig(flip=0.0), size)
    for seed in range(30):
        torch.manual_seed(seed)
        row = transform(ramp)[0, 0, 0].int()
        assert row[-1] > row[0]
    flipping = training_transform(AugmentConfig(flip=1.0), size)
    assert flipping(ramp)[0, 0, 0, -1] < flipping(ramp)[0, 0, 0, 0]


def test_validation_takes_the_centre():
    frame = torch.zeros(1, 3, 256, 512, dtype=torch.uint8)
    frame[..., 255:257] = 255
    out = validation_transform((224, 224))(frame)
    assert out.shape == (1, 3, 224, 224)
    assert out[0, 0, 0].argmax() in (111, 112)


def test_normalise():
    pixels = torch.randint(0, 256, (2, 3, 4, 5, 6), dtype=torch.uint8)
    out = normalise(pixels, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert out[1, 2, 3, 4, 5].item() == pytest.approx((pixels[1, 2, 3, 4, 5].item() / 255 - 0.3) / 0.3, abs=1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (4, 3, 2, 16, 16)])
@pytest.mark.parametrize("kind", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_inputs_have_the_shares_they_claim(shape, kind):
    """Constant images equal to their label: the mean pixel must be the mean label of the mixed target."""
    labels = torch.arange(4)
    inputs = labels.float().view(4, *[1] * (len(shape) - 1)).expand(shape).clone()
    changed = False
    for seed in range(10):
        torch.manual_seed(seed)
        mixed, shares = mix(inputs, labels, 4, AugmentConfig(**kind))
        assert type(mixed) is torch.Tensor
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        assert_close(mixed.flatten(1).mean(1), shares @ labels.float(), 1e-5)
        changed |= not torch.equal(mixed, inputs)
    assert changed


def test_nothing_to_mix_gives_plain_shares():
    inputs, labels = torch.randn(2, 3, 4, 4), torch.tensor([1, 0])
    mixed, shares = mix(inputs, labels, 3, AugmentConfig())
    assert mixed is inputs
    assert shares.tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("name", ["equalize", "sharpness", "rotate", "shear_y", "translate_x", "solarize_add"])
def test_operations_give_the_bits_of_torchvision(name: str) -> None:
    """Those that are computed in another way; on noise, few values, a single value and frames that are too small."""
    theirs = {
        "equalize": lambda clip, level, sign: F.equalize(clip),
        "sharpness": lambda clip, level, sign: F.adjust_sharpness(clip, max(0.1, 1.0 + sign * 0.9 * level)),
        "rotate": lambda clip, level, sign: F.rotate(clip, sign * 30.0 * level, **WARP),
        "shear_y": lambda clip, level, sign: F.affine(
            clip, 0.0, [0, 0], 1.0, [0, math.degrees(math.atan(sign * 0.3 * level))], center=[0, 0], **WARP
        ),
        "translate_x": lambda clip, level, sign: F.affine(
            clip, 0.0, [sign * 0.45 * level * clip.shape[-1], 0], 1.0, [0.0, 0.0], center=[0, 0], **WARP
        ),
        "solarize_add": lambda clip, level, sign: torch.where(
            clip < 128, (clip.int() + int(level * 110)).clamp(max=255).to(torch.uint8), clip
        ),
    }[name]
    noise = torch.randint(256, (5, 3, 40, 51), dtype=torch.uint8)
    smooth = F.resize(torch.randint(256, (4, 3, 6, 7), dtype=torch.uint8), [60, 70], antialias=True)
    few = torch.randint(3, (2, 3, 20, 30), dtype=torch.uint8) * 100
    same = torch.full((2, 3, 20, 30), 7, dtype=torch.uint8)
    for clip in (noise, smooth, few, same, noise[..., :2, :9], noise.transpose(0, 1)[:, :3].transpose(-1, -2)):
        for level in (0.0, 0.13, 0.5, 0.7, 0.9, 1.0):
            for sign in (1, -1):
                assert torch.equal(OPERATIONS[name](clip, level, sign), theirs(clip, level, sign)), (clip.shape, level)
