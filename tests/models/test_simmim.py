"""SimMIM: masks, loss, target and decoder against direct computations."""

import math

import pytest
import torch
import torch.nn.functional as F

import video_swinv2 as vs
from video_swinv2.models.simmim import grow, mask_cells, masked_l1, normalise_target, pixel_shuffle, random_mask


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
    grown = grow(mask, (8, 8), (16, 12))
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
        assert torch.equal(model(x, mask), model(other, mask))
        other[..., 32:, 32:] += 3
        assert not torch.allclose(model(x, mask), model(other, mask))


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


def test_normalised_target_is_brute_force():
    x = torch.randn(1, 3, 20, 24)
    got = normalise_target(x, 7)
    for channel, row, column in [(0, 0, 0), (1, 10, 12), (2, 19, 3)]:
        around = x[0, channel, max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4]
        expected = (x[0, channel, row, column] - around.mean()) / math.sqrt(around.var().item() + 1e-6)
        assert got[0, channel, row, column].item() == pytest.approx(expected.item(), abs=1e-4)
    clip = torch.randn(2, 3, 4, 20, 24)
    torch.testing.assert_close(normalise_target(clip, 7)[1, :, 2], normalise_target(clip[1:, :, 2], 7)[0])


def test_mask_unit_must_be_whole_patches():
    with pytest.raises(ValueError, match="mask_unit"):
        vs.SimMIM(vs.create_model("swinv2_nano", num_classes=0, image_size=64), 30)
