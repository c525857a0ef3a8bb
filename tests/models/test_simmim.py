"""SimMIM: masks, loss, target and decoder against direct computations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import video_swinv2 as vs
from tests.closeness import assert_close
from video_swinv2.models.simmim import (
    hidden_cells,
    mask_cells,
    masked_l1,
    masked_mean,
    normalise_target,
    pixel_shuffle,
    random_mask,
    restore_target,
    tube_unit,
    upsample_mask,
)


def pretraining(**changes):
    return vs.SimMIM(vs.create_model("swinv2_nano", num_classes=0, **({"image_size": 64, "window": 4} | changes)), 32)


def test_mask_of_the_published_recipe():
    cells = mask_cells(192, 32, 2)
    assert cells == (6, 6)
    masks = [random_mask(cells, 0.6, torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert {int(mask.sum()) for mask in masks} == {22}  # ceil(36 * 0.6)
    hits = torch.stack(masks).float().mean(0)
    assert hits.min() > 0.3
    assert hits.max() < 0.9
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], random_mask(cells, 0.6, torch.Generator().manual_seed(0)))


def test_mask_grows_in_blocks():
    mask = torch.tensor([[[True, False], [False, False]]])
    grown = upsample_mask(mask, (8, 8), (16, 12))
    assert grown.shape == (1, 16, 12)
    assert grown[0, :8, :8].all()
    assert grown.sum() == 64


def test_decoder_shuffles_like_torch():
    x = torch.randn(2, 3 * 32 * 32, 2, 3)
    assert torch.equal(pixel_shuffle(x, (32, 32)), F.pixel_shuffle(x, 32))


def test_state_dict_is_the_official_one():
    state = pretraining().state_dict()
    assert state["encoder.mask_token"].shape == (1, 1, 32)
    assert state["decoder.0.weight"].shape == (3072, 256, 1, 1)
    assert state["decoder.0.bias"].shape == (3072,)
    assert all(name.startswith(("encoder.", "decoder.")) for name in state)


def test_loss_is_the_mean_over_hidden_pixels():
    prediction, target = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    mask = torch.tensor([[[True, False], [False, True]], [[False, True], [False, False]]])
    loss = masked_l1(prediction, target, mask, (32, 32))
    hidden = torch.zeros(2, 64, 64, dtype=torch.bool)
    hidden[0, :32, :32] = hidden[0, 32:, 32:] = hidden[1, :32, 32:] = True
    errors = (prediction - target).abs().movedim(1, -1)[hidden]
    assert loss.item() == pytest.approx(errors.mean().item(), rel=1e-5)
    changed = prediction.clone()
    changed.movedim(1, -1)[~hidden] += 5
    assert torch.equal(masked_l1(changed, target, mask, (32, 32)), loss)


def test_hidden_pixels_do_not_reach_the_prediction():
    model = pretraining().eval()
    for block in model.encoder.blocks():
        torch.nn.init.ones_(block.norm1.weight)
    mask = torch.tensor([[[True, False], [False, False]]])
    x = torch.randn(1, 3, 64, 64)
    other = x.clone()
    other[..., :32, :32] += 3
    with torch.no_grad():
        assert_close(model(other, mask), model(x, mask))
        other[..., 32:, 32:] += 3
        assert (model(x, mask) - model(other, mask)).abs().max() > 1e-2


def test_mask_token_learns_only_where_something_is_hidden():
    model = pretraining()
    for count, learns in ((0, False), (4, True)):
        model.zero_grad()
        mask = torch.zeros(1, 4, dtype=torch.bool)
        mask[:, :count] = True
        model(torch.randn(1, 3, 64, 64), mask.view(1, 2, 2)).square().sum().backward()
        gradient = model.encoder.mask_token.grad
        assert (gradient is not None and gradient.abs().sum() > 0) == learns


def test_clips_are_masked_and_rebuilt_in_three_axes():
    encoder = vs.create_model("swinv2_nano", num_classes=0, frames=8, image_size=64, window=(2, 4, 4))
    model = vs.SimMIM(encoder, (4, 32, 32))
    assert model.stride == (2, 32, 32)
    mask = random_mask(mask_cells((8, 64, 64), (4, 32, 32), 3), 0.5, torch.Generator())[None]
    assert model(torch.randn(1, 3, 8, 64, 64), mask).shape == (1, 3, 8, 64, 64)


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.55, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("cells", [(6, 6), (2, 5), (7, 4, 5), (1, 3, 3)])
def test_exactly_the_share_is_hidden(cells, ratio):
    count = math.prod(cells)
    hidden = hidden_cells(cells, ratio)
    assert hidden == -(-round(ratio * 100) * count // 100)  # in whole numbers, since 0.55 * 20 is a little over 11
    assert int(random_mask(cells, ratio, torch.Generator()).sum()) == hidden


def test_every_choice_of_cells_is_equally_likely():
    """3 of 5 cells: the ten choices, 4,000 draws, within five deviations of 400."""
    generator = torch.Generator().manual_seed(1)
    draws = [tuple(random_mask((5,), 0.6, generator).tolist()) for _ in range(4000)]
    counts = [draws.count(choice) for choice in set(draws)]
    assert len(counts) == 10
    assert all(abs(count - 400) < 5 * math.sqrt(400 * 0.9) for count in counts)


@pytest.mark.parametrize(
    ("frames", "patch", "unit"),
    [(None, 4, 32), (None, 8, 16), (None, 2, 2), (None, 4, (8, 16)), (4, (2, 4, 4), (2, 8, 8)), (5, (1, 8, 8), 16)],
)
def test_any_patch_and_unit(frames, patch, unit):
    """Whole cells are hidden and nothing else: the mask of tokens is that of pixels; the prediction has their size."""
    encoder = vs.create_model(
        "swinv2_nano", num_classes=0, frames=frames, image_size=(32, 48), patch_size=patch, window=2
    )
    model = vs.SimMIM(encoder, unit)
    pixels = (32, 48) if frames is None else (frames, 32, 48)
    mask = random_mask(mask_cells(pixels, unit, len(pixels)), 0.5, torch.Generator())[None]
    hidden = upsample_mask(mask, model.mask_unit, pixels)
    factors = [u // p for u, p in zip(model.mask_unit, encoder.patch_size, strict=True)]
    tokens = upsample_mask(mask, factors, tuple(-(-n // p) for n, p in zip(pixels, encoder.patch_size, strict=True)))
    assert torch.equal(upsample_mask(tokens, encoder.patch_size, pixels), hidden)
    assert model(torch.randn(1, 3, *pixels), mask).shape == (1, 3, *pixels)


def test_a_tube_hides_the_same_in_all_frames():
    assert tube_unit((4, 8, 8), 7, 2) == (8, 8, 8)
    mask = random_mask(mask_cells((7, 16, 16), tube_unit(8, 7, 2), 3), 0.5, torch.Generator())[None]
    hidden = upsample_mask(mask, tube_unit(8, 7, 2), (7, 16, 16))
    assert hidden[0, 0].sum() == 128
    assert all(torch.equal(hidden[0, 0], frame) for frame in hidden[0, 1:])


def by_brute_force(image, patch):
    """Window by window in fp64, as the official recipes define it: (3, H, W) -> (3, H, W)."""
    reach = patch // 2
    out = np.empty(image.shape)
    for channel, row, column in np.ndindex(image.shape):
        around = image[channel, max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1]
        out[channel, row, column] = (image[channel, row, column] - around.mean()) / np.sqrt(around.var(ddof=1) + 1e-6)
    return out


@pytest.mark.parametrize(("patch", "size"), [(47, (40, 52)), (7, (12, 20)), (3, (5, 4))])
def test_normalised_target_is_brute_force(patch, size):
    """Every pixel, borders included; the window may be larger than the image."""
    x = torch.randn(1, 3, *size) * 2 + 0.5
    got = normalise_target(x, patch)
    assert_close(got[0].double(), by_brute_force(x[0].double().numpy(), patch))
    assert_close(restore_target(got, x, patch), x)


def test_frames_are_normalised_one_by_one():
    clip = torch.randn(2, 3, 4, 20, 24)
    torch.testing.assert_close(normalise_target(clip, 7)[1, :, 2], normalise_target(clip[1:, :, 2], 7)[0])


def test_the_masked_mean_is_the_best_of_all_flat_pictures_in_squares():
    """It is the mean of what is hidden, per sample and channel, and nothing else."""
    x = torch.randn(2, 3, 16, 16)
    mask = torch.tensor([[[True, False], [False, False]], [[False, True], [True, True]]])
    got = masked_mean(x, mask, (8, 8))
    assert got.shape == (2, 3, 1, 1)
    torch.testing.assert_close(got[0, :, 0, 0], x[0, :, :8, :8].mean((1, 2)))
    hidden = torch.cat([x[1, :, :8, 8:].flatten(1), x[1, :, 8:].flatten(1)], dim=1)
    torch.testing.assert_close(got[1, :, 0, 0], hidden.mean(1))


def test_mask_unit_must_be_whole_patches():
    with pytest.raises(ValueError, match="mask_unit"):
        vs.SimMIM(vs.create_model("swinv2_nano", num_classes=0, image_size=64), 30)
