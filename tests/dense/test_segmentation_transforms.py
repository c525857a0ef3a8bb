"""Augmentation of images with masks: crops, flips and padding against loops over pixels, and their draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from video_swinv2.dense.segmentation_transforms import (
    SegmentationAugment,
    distort,
    largest_share,
    pad,
    resize,
    scaled_size,
)

PLAIN = {"scale": (1.0, 1.0), "photometric": False, "max_class_share": 1.0}


def picture(height: int, width: int) -> tuple[Tensor, Tensor]:
    """An image whose red and green are its row and column, and a mask of both."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows, columns, torch.full_like(rows, 9)]).to(torch.uint8)
    return image, ((3 * rows + columns) % 5).to(torch.uint8)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(8, 6), (30, 6), (8, 40), (30, 40)])
def test_crop_flip_and_padding_move_image_and_mask_together(size: tuple[int, int]) -> None:
    image, mask = picture(20, 24)
    augment = SegmentationAugment(size, flip=0.5, **PLAIN)  # type: ignore[arg-type]
    corners, flips = set(), 0
    for seed in range(60):
        found, classes = augment(image, mask, generator(seed))
        assert (tuple(found.shape), tuple(classes.shape)) == ((3, *size), size)
        inside = [(h, w) for h in range(size[0]) for w in range(size[1]) if found[2, h, w] == 9]
        assert len(inside) == min(size[0], 20) * min(size[1], 24)
        for h in range(size[0]):
            for w in range(size[1]):
                if (h, w) in set(inside[:1]) or found[2, h, w] == 9:
                    row, column = int(found[0, h, w]), int(found[1, h, w])
                    assert classes[h, w] == (3 * row + column) % 5
                else:
                    assert (found[:, h, w].tolist(), int(classes[h, w])) == ([124, 116, 104], 255)
        # Neighbours in the crop are neighbours in the image, mirrored if flipped.
        step = int(found[1, 0, 1]) - int(found[1, 0, 0])
        assert abs(step) == 1
        flips += step < 0
        corners.add((int(found[0, 0, 0]), int(found[1, 0, 0]) - (min(size[1], 24) - 1 if step < 0 else 0)))
    tops, lefts = max(20 - size[0], 0) + 1, max(24 - size[1], 0) + 1
    assert 15 < flips < 45
    assert len(corners) > min(tops * lefts, 40) * 0.6
    assert all(0 <= top < tops and 0 <= left < lefts for top, left in corners)


def test_draws_are_a_function_of_the_generator() -> None:
    image, mask = picture(40, 50)
    augment = SegmentationAugment((16, 16), short_side=32)
    torch.manual_seed(0)
    first = augment(image, mask, generator(3))
    torch.rand(5)
    again, other = augment(image, mask, generator(3)), augment(image, mask, generator(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    state = torch.get_rng_state()
    augment(image, mask, generator(5))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_factors_cover_the_range_evenly() -> None:
    image, mask = picture(100, 120)
    augment = SegmentationAugment((400, 400), scale=(0.5, 2.0), photometric=False, flip=0)
    heights = [int((augment(image, mask, generator(seed))[1][:, 0] != 255).sum()) for seed in range(200)]
    assert 50 <= min(heights) < 60
    assert 190 < max(heights) <= 200
    assert 0.35 < np.mean([height < 125 for height in heights]) < 0.65  # the middle of the range


def test_sizes_and_nearest_masks() -> None:
    assert scaled_size((360, 480), None, 0.5) == (180, 240)
    assert scaled_size((360, 480), 512) == (512, 683)
    assert scaled_size((480, 360), 512, 2.0) == (1365, 1024)
    image, mask = picture(12, 10)
    smaller, classes = resize(image, mask, (6, 5))
    assert smaller.shape == (3, 6, 5)
    for h in range(6):
        for w in range(5):  # the centre of a small pixel lies between four; the one below and to the right is taken
            assert classes[h, w] == mask[2 * h + 1, 2 * w + 1]
    assert set(resize(image, mask, (37, 29))[1].unique().tolist()) <= set(range(5))


def test_a_crop_of_one_class_is_drawn_again() -> None:
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[:, 40:] = 1
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    shares = {}
    for limit in (1.0, 0.75):
        augment = SegmentationAugment((16, 16), max_class_share=limit, scale=(1, 1), photometric=False)
        # With a limit of 1, only crops of a single class are drawn again.
        shares[limit] = [largest_share(augment(image, mask, generator(seed))[1]) for seed in range(200)]
    assert np.mean([share >= 0.75 for share in shares[0.75]]) < 0.33
    assert np.mean([share >= 0.75 for share in shares[1.0]]) > 0.4
    assert max(shares[0.75]) == 1  # after ten draws the last one is taken


def test_the_largest_share_leaves_out_pixels_without_a_class() -> None:
    assert largest_share(torch.tensor([[0, 0, 1, 255]], dtype=torch.uint8)) == pytest.approx(2 / 3)
    assert largest_share(torch.full((2, 2), 255, dtype=torch.uint8)) == 1
    assert largest_share(torch.full((2, 2), 3, dtype=torch.uint8)) == 1


def test_distortion_draws_each_change_half_of_the_time() -> None:
    grey = torch.full((3, 1, 1), 100, dtype=torch.uint8)
    values = [int(distort(grey, generator(seed))[0, 0, 0]) for seed in range(2000)]
    # Neither saturation nor hue changes grey, but for rounding. A quarter has neither brightness nor contrast, and a
    # few have little of both.
    assert np.mean([abs(value - 100) <= 1 for value in values]) == pytest.approx(0.27, abs=0.04)
    assert min(values) >= int((100 - 32) * 0.5)
    assert max(values) <= (100 + 32) * 1.5
    assert min(values) < 45
    assert max(values) > 180
    colour = torch.tensor([200, 60, 120], dtype=torch.uint8).view(3, 1, 1)
    hues = [distort(colour, generator(seed))[:, 0, 0] for seed in range(200)]
    assert len({tuple(hue.argsort().tolist()) for hue in hues}) > 1  # green and blue change places


def test_distortion_is_what_its_draws_say() -> None:
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    for seed in range(20):
        draw = generator(seed)

        def uniform(draw: torch.Generator = draw) -> float:
            return float(torch.rand((), generator=draw))

        expected = image.numpy().astype(np.float32)
        if uniform() < 0.5:
            expected = np.floor(np.clip(expected + np.float32(32 * (2 * uniform() - 1)), 0, 255))
        contrast = 0.5 + uniform() if uniform() < 0.5 else 1.0
        before = uniform() < 0.5
        if before:
            expected = np.floor(np.clip(expected * np.float32(contrast), 0, 255))
        bytes_ = torch.from_numpy(expected.astype(np.uint8))
        if uniform() < 0.5:
            bytes_ = F.adjust_saturation(bytes_, 0.5 + uniform())
        if uniform() < 0.5:
            bytes_ = F.adjust_hue(bytes_, -0.1 + 0.2 * uniform())
        if not before:
            bytes_ = torch.from_numpy(np.floor(np.clip(bytes_.numpy() * np.float32(contrast), 0, 255)).astype(np.uint8))
        found = distort(image, generator(seed))
        assert int((found.int() - bytes_.int()).abs().max()) <= 1  # the last bit of a product
        assert float((found != bytes_).float().mean()) < 0.02


def test_padding_leaves_a_full_image_alone() -> None:
    image, mask = picture(5, 4)
    assert pad(image, mask, (5, 4))[0] is image
    with pytest.raises(ValueError, match="scale: invalid value"):
        SegmentationAugment((8, 8), scale=(2, 1))
