"""log-CPB: the constants of the released weights, the index, windows larger than the trained one."""

import itertools
import math

import pytest
import torch
from torch import nn

from video_swinv2.models.position_bias import log_coordinates, offsets, pair_index, position_bias


@pytest.mark.parametrize(
    ("window", "norm", "corner"),  # specification 1.4
    [(12, 12, 1.0566), (14, 12, 1.1287), (16, 12, 1.1913), (24, 12, 1.3826), (7, 6, 1.1353), (16, 8, 1.3938)],
)
def test_coordinates_of_the_released_weights(window, norm, corner):
    table = log_coordinates(offsets((window, window)), (norm, norm))
    assert table.shape == ((2 * window - 1) ** 2, 2)
    assert table.max().item() == pytest.approx(corner, abs=1e-4)
    assert torch.equal(table, -table.flip(0))


def test_one_token_windows_do_not_divide_by_zero():
    assert torch.equal(log_coordinates(offsets((1, 3)), (1, 3))[:, 0], torch.zeros(5))


@pytest.mark.parametrize("window", [(3, 4), (2, 3, 5), (1, 7, 7)])
def test_index_points_to_query_minus_key(window):
    table, index = offsets(window), pair_index(window)
    positions = torch.tensor(list(itertools.product(*map(range, window))))
    assert torch.equal(table[index], (positions[:, None] - positions[None, :]).float())


def test_larger_window_keeps_the_bias_of_common_offsets():
    mlp = nn.Sequential(nn.Linear(3, 512), nn.ReLU(), nn.Linear(512, 4, bias=False))
    nn.init.normal_(mlp[2].weight, std=0.3)
    norm, cpu = (4, 6, 6), torch.device("cpu")
    small = position_bias(mlp, (4, 6, 6), norm, cpu)
    large = position_bias(mlp, (8, 9, 12), norm, cpu)
    inside = [
        i for i, p in enumerate(itertools.product(range(8), range(9), range(12))) if p[0] < 4 and p[1] < 6 and p[2] < 6
    ]
    torch.testing.assert_close(large[:, inside][:, :, inside], small, rtol=0, atol=1e-6)
    assert not torch.allclose(
        position_bias(mlp, (8, 9, 12), (8, 9, 12), cpu)[:, inside][:, :, inside], small, atol=1e-2
    )


def test_bias_is_the_formula():
    mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, 3, bias=False))
    bias = position_bias(mlp, (3, 5), (3, 5), torch.device("cpu"))
    positions = list(itertools.product(range(3), range(5)))
    for i, j in [(0, 14), (7, 3), (5, 5)]:
        coordinates = [
            math.copysign(math.log2(1 + abs(8 * (a - b) / (n - 1))) / 3, a - b)
            for a, b, n in zip(positions[i], positions[j], (3, 5), strict=True)
        ]
        expected = 16 * torch.sigmoid(mlp(torch.tensor(coordinates)))
        torch.testing.assert_close(bias[:, i, j], expected, rtol=0, atol=1e-5)
