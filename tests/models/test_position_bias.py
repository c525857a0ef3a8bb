"""log-CPB: the constants of the released weights, the index, windows larger than the trained one."""

import itertools
import math

import pytest
import torch
from torch import nn

from tests.closeness import assert_close
from video_swinv2.models.position_bias import (
    _Expand,
    _expand_strided,
    _reduce_skewed,
    bias_table,
    expand_table,
    log_coordinates,
    reduce_to_table,
    token_codes,
    window_coordinates,
    window_offsets,
)


def pair_bias(mlp, window, norm):
    return expand_table(bias_table(mlp, window_coordinates(window, norm, torch.device("cpu"))), window)


@pytest.mark.parametrize(
    ("window", "norm", "corner"),  # specification 1.4
    [(12, 12, 1.0566), (14, 12, 1.1287), (16, 12, 1.1913), (24, 12, 1.3826), (7, 6, 1.1353), (16, 8, 1.3938)],
)
def test_coordinates_of_the_released_weights(window, norm, corner):
    table = log_coordinates(window_offsets((window, window)), (norm, norm))
    assert table.shape == ((2 * window - 1) ** 2, 2)
    assert table.max().item() == pytest.approx(corner, abs=1e-4)
    assert_close(table, -table.flip(0), 1e-6)  # the end of a vectorised loop may take another logarithm


def test_one_token_windows_do_not_divide_by_zero():
    assert torch.equal(log_coordinates(window_offsets((1, 3)), (1, 3))[:, 0], torch.zeros(5))


@pytest.mark.parametrize("window", [(3, 4), (2, 3, 5), (1, 7, 7), (5,), (2, 1, 3)])
def test_pairs_find_query_minus_key(window):
    """Both ways from a table of offsets to pairs: the codes that index it, and the copies that spread it out."""
    positions = torch.tensor(list(itertools.product(*map(range, window))))
    expected = (positions[:, None] - positions[None, :]).float()
    table = window_offsets(window)
    code, constant = token_codes(window)
    assert torch.equal(table[code[:, None] - code[None, :] + constant], expected)
    for expand in (expand_table, _expand_strided):  # on CPUs and on GPUs
        assert torch.equal(expand(table.t(), window), expected.movedim(-1, 0))


@pytest.mark.parametrize("window", [(3, 4), (2, 3, 5), (1, 7, 7), (5,), (2, 1, 3)])
@pytest.mark.parametrize("reduce", [reduce_to_table, _reduce_skewed])  # on CPUs and on GPUs
def test_gradients_of_pairs_add_up_in_the_table(window, reduce):
    table = torch.randn(2, math.prod(2 * w - 1 for w in window), dtype=torch.float64, requires_grad=True)
    tokens = math.prod(window)
    grad = torch.randn(2, tokens, tokens, dtype=torch.float64)
    code, constant = token_codes(window)
    table[:, code[:, None] - code[None, :] + constant].backward(grad)
    assert_close(reduce(grad, window), table.grad, 1e-12)


def test_the_expansion_of_gpus_has_the_gradient_of_that_of_cpus():
    window, found = (2, 3, 5), []
    table, grad = torch.randn(4, 135, dtype=torch.float64), torch.randn(4, 30, 30, dtype=torch.float64)
    for expand in (expand_table, _Expand.apply):
        given = table.clone().requires_grad_()
        expand(given, window).backward(grad)
        found.append(given.grad)
    assert_close(found[1], found[0], 1e-12)


def test_larger_window_keeps_the_bias_of_common_offsets():
    """With the normaliser of the weights; with the new window's own, as a naive change of window has it, it differs."""
    mlp = nn.Sequential(nn.Linear(3, 512), nn.ReLU(), nn.Linear(512, 4, bias=False))
    nn.init.normal_(mlp[2].weight, std=0.3)
    norm, small_window, large_window = (4, 6, 6), (4, 6, 6), (8, 9, 12)
    large_offsets = window_offsets(large_window)
    common = (large_offsets.abs() < torch.tensor(small_window)).all(dim=1)
    coordinates = log_coordinates(large_offsets, norm)[common]
    assert_close(coordinates, log_coordinates(window_offsets(small_window), norm), 1e-6)
    assert not torch.allclose(coordinates, log_coordinates(large_offsets, large_window)[common], atol=1e-2)
    small, large = pair_bias(mlp, small_window, norm), pair_bias(mlp, large_window, norm)
    positions = itertools.product(*map(range, large_window))
    inside = [i for i, p in enumerate(positions) if all(a < b for a, b in zip(p, small_window, strict=True))]
    assert_close(large[:, inside][:, :, inside], small, 1e-6)
    renormalised = pair_bias(mlp, large_window, large_window)[:, inside][:, :, inside]
    assert (renormalised - small).abs().max() > 1e-2


def test_bias_is_the_formula():
    mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, 3, bias=False))
    bias = pair_bias(mlp, (3, 5), (3, 5))
    positions = list(itertools.product(range(3), range(5)))
    for i, j in [(0, 14), (7, 3), (5, 5)]:
        coordinates = [
            math.copysign(math.log2(1 + abs(8 * (a - b) / (n - 1))) / 3, a - b)
            for a, b, n in zip(positions[i], positions[j], (3, 5), strict=True)
        ]
        expected = 16 * torch.sigmoid(mlp(torch.tensor(coordinates)))
        assert_close(bias[:, i, j], expected)
