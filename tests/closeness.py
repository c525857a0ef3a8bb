"""Assertions on tensors: close relative to the largest expected value, or equal bit for bit.

Rounding errors grow with the size of the numbers, and their last bits depend on the processor's vector units, the
number of threads and the alignment of memory. With an absolute tolerance those would decide whether a test passes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def assert_close(
    got: Tensor | np.ndarray, expected: Tensor | np.ndarray, tolerance: float = 1e-5, *, name: str = ""
) -> None:
    """Assert that no element differs by more than `tolerance` times the largest expected value; NaN never passes.

    Shapes, dtypes and devices must match as in torch.testing.assert_close. `name` is put in front of the message.
    """
    got, expected = torch.as_tensor(got).detach(), torch.as_tensor(expected).detach()
    # With an infinite tolerance this checks everything but the values: shape, dtype, device and layout.
    torch.testing.assert_close(got, expected, rtol=0, atol=torch.inf, equal_nan=True)
    if not expected.numel():
        return
    differences = (got.double() - expected.double()).abs()
    worst, largest = differences.max().item(), expected.double().abs().max().item()
    if not worst <= tolerance * largest:  # written so that NaN fails
        place = tuple(int(i) for i in np.unravel_index(int(differences.argmax()), differences.shape))
        raise AssertionError(
            f"{name + ': ' if name else ''}largest difference {worst:.2e}, largest expected value {largest:.2e}: "
            f"ratio {worst / largest if largest else torch.inf:.2e}, tolerance {tolerance:.0e}; "
            f"at {place} got {got[place].item()!r}, expected {expected[place].item()!r}"
        )


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Assert equal names and bit-identical tensors: for tensors that were copied, not computed.

    What a model computes from a copy of its weights is only close: tensors of a memory-mapped file have the alignment
    they have in the file, and a matrix product may be summed in another order at another alignment.
    """
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
