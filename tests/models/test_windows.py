"""Windows: split and join, padding, and the mask against a definition by coordinates."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from tests.closeness import assert_close
from video_swinv2.models.position_bias import expand_table
from video_swinv2.models.windows import (
    crop_to,
    from_windows,
    pad_to,
    padded_grid,
    roll,
    shrink_window,
    to_windows,
    window_layout,
    window_partition,
    window_reverse,
)


@pytest.mark.parametrize(("grid", "window"), [((8, 12), (4, 3)), ((4, 6, 8), (2, 3, 4)), ((5, 5, 5), (5, 5, 5))])
def test_partition_and_merge_are_inverse(grid, window):
    x = torch.arange(2 * torch.Size(grid).numel() * 3.0).view(2, *grid, 3)
    windows = window_partition(x, window)
    assert windows.shape == (2, torch.Size(grid).numel() // torch.Size(window).numel(), torch.Size(window).numel(), 3)
    assert torch.equal(window_reverse(windows, window, grid), x)


def test_partition_order_is_row_major():
    x = torch.arange(16).view(1, 4, 4, 1)
    assert window_partition(x, (2, 2))[0, :, :, 0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_pad_crop_and_roll():
    x = torch.randn(2, 3, 5, 7, 4)
    wide = pad_to(x, (4, 6, 8))
    assert wide.shape == (2, 4, 6, 8, 4)
    assert torch.equal(crop_to(wide, (3, 5, 7)), x)
    assert wide.count_nonzero() == x.count_nonzero()
    assert torch.equal(roll(roll(x, (1, 2, 3)), (-1, -2, -3)), x)


def test_shrink_works_axis_by_axis():
    assert shrink_window((8, 7, 7), (4, 14, 7)) == ((4, 7, 7), (0, 3, 0))
    assert shrink_window((8, 7, 7), (9, 8, 6)) == ((8, 7, 6), (4, 3, 0))
    assert padded_grid((9, 8, 6), (8, 7, 6)) == (16, 14, 6)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("grid", "window"),
    [
        ((8, 8), (4, 4)),
        ((9, 6), (4, 4)),
        ((7, 14), (7, 7)),
        ((5, 6, 7), (2, 3, 3)),
        ((4, 9, 5), (8, 4, 3)),
        ((6, 8, 8), (3, 8, 4)),
    ],
)
def test_mask_is_the_definition(grid, window, shifted):
    """Two tokens may attend to each other if and only if both are real and in one window cell of the shifted tiling.

    The tiling is written down with coordinates: on a shifted axis the cut points are s, s + w, s + 2w, ... and the two
    ends, so the pieces at both ends stay apart although the roll brings them into one window.
    """
    plan = window_layout(grid, window, shifted, torch.device("cpu"))
    index = torch.arange(1, 1 + torch.Size(grid).numel()).view(1, *grid, 1)
    tokens = window_partition(roll(pad_to(index, plan.padded), [-s for s in plan.shift]), plan.window)[0, :, :, 0]
    cell = {}
    for flat, position in enumerate(itertools.product(*map(range, grid)), start=1):
        cell[flat] = tuple((p - s) // w for p, s, w in zip(position, plan.shift, plan.window, strict=True))
    seen = set()
    mask = None if plan.allowed is None else plan.allowed.tolist()
    for w, row in enumerate(tokens.tolist()):
        for (i, query), (j, key) in itertools.product(enumerate(row), repeat=2):
            allowed = mask is None or mask[w][i][j]
            if query and key:
                assert allowed == (cell[query] == cell[key]), (query, key)
                if allowed:
                    seen.add((query, key))
            elif query or key:
                assert not allowed, "a real token and padding"
    expected = {(a, b) for a, b in itertools.product(cell, repeat=2) if cell[a] == cell[b]}
    assert seen == expected, "some pair of one cell never meets"


@pytest.mark.parametrize(
    ("grid", "window", "patterns"),
    [
        ((4, 8, 8), (2, 4, 4), 8),  # inner or at the end, on three axes
        ((2, 8, 8), (2, 4, 4), 4),  # one window in time does not shift
        ((8, 8), (4, 4), 4),
        ((8, 4), (4, 4), 2),
        ((6, 9, 12), (3, 3, 4), 8),
    ],
)
def test_shifted_windows_have_so_many_masks(grid, window, patterns):
    plan = window_layout(grid, window, True, torch.device("cpu"))
    assert len(plan.allowed.flatten(1).unique(dim=0)) == patterns
    assert torch.equal(plan.allowed, plan.allowed.transpose(1, 2))
    assert plan.allowed.diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize(("grid", "window"), [((9, 6), (4, 4)), ((5, 6, 7), (2, 3, 3)), ((3, 9, 5), (8, 4, 3))])
@pytest.mark.parametrize("shifted", [False, True])
def test_padding_sees_itself_so_that_no_softmax_is_empty(grid, window, shifted):
    plan = window_layout(grid, window, shifted, torch.device("cpu"))
    assert torch.equal(plan.allowed, plan.allowed.transpose(1, 2))
    assert plan.allowed.diagonal(dim1=1, dim2=2).all()
    assert plan.divided == tuple(len(set(labels)) > 1 for labels in plan.label.tolist())


def test_whole_unshifted_windows_need_no_mask():
    assert window_layout((4, 8, 8), (2, 4, 4), False, torch.device("cpu")).allowed is None
    assert window_layout((4, 8, 8), (8, 8, 8), True, torch.device("cpu")).allowed is None


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(4, 6, 8), (2, 6, 8), (6, 9, 4), (1, 6, 12), (8, 3, 8)])
def test_windows_are_those_of_torchvisions_video_swin(grid, shifted):
    """Dot-product attention with a bias table, as Video Swin V1 has it, on our windows: nothing but windows is shared.

    No padded grids, where torchvision attends to padding; its table has no window shrunk in space.
    """
    window, heads = (2, 3, 4), 2
    theirs = ShiftedWindowAttention3d(16, list(window), [w // 2 if shifted else 0 for w in window], heads).eval()
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    x = torch.randn(2, *grid, 16)
    plan = window_layout(grid, window, shifted, x.device)
    tokens = window_partition(roll(x, [-s for s in plan.shift]), plan.window)
    qkv = F.linear(tokens, theirs.qkv.weight, theirs.qkv.bias)
    q, k, v = qkv.view(*tokens.shape[:3], 3, heads, 8).permute(3, 0, 1, 4, 2, 5)
    offsets_in_time = 2 * plan.window[0] - 1
    table = theirs.relative_position_bias_table.view(3, -1, heads)
    table = table.narrow(0, (3 - offsets_in_time) // 2, offsets_in_time).reshape(-1, heads)
    logits = q @ k.transpose(-2, -1) / 8**0.5 + expand_table(table.t(), plan.window)
    if plan.allowed is not None:
        logits = logits.masked_fill(~plan.allowed[:, None], -torch.inf)
    out = theirs.proj((logits.softmax(-1) @ v).transpose(2, 3).flatten(3))
    with torch.no_grad():
        assert_close(roll(window_reverse(out, plan.window, grid), plan.shift), theirs(x))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("grid", "window"), [((8, 8), (4, 4)), ((6, 7), (4, 3)), ((3, 6, 7), (2, 4, 7)), ((2, 3), (4, 4))]
)
def test_tokens_move_as_in_the_steps_one_by_one(grid, window, shifted):
    """To the windows and back, bit for bit, and so do their gradients; with padding, without, and in one window."""
    layout = window_layout(grid, window, shifted, torch.device("cpu"))
    found = []
    for way in (layout, dataclasses.replace(layout, moves=None)):
        x = torch.arange(2.0 * math.prod(grid) * 3).view(2, *grid, 3).requires_grad_()
        windows = to_windows(x, way)
        back = from_windows(windows * torch.arange(1.0, 1 + windows[0].numel()).view_as(windows[0]), way)
        (gradient,) = torch.autograd.grad(back, x, torch.arange(x.numel()).view_as(x).float())
        found.append((windows, back, gradient))
    assert (layout.moves is None) == (grid == (2, 3))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("grid", [(8, 8), (6, 7)])
def test_a_layout_made_in_inference_mode_serves_training(grid):
    """As when a model is validated before its first step: layouts are kept."""
    with torch.inference_mode():
        layout = window_layout(grid, (4, 4), True, torch.device("cpu"))
    x = torch.randn(1, *grid, 2).requires_grad_()
    from_windows(to_windows(x, layout), layout).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
