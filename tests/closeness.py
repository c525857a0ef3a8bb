"""Closeness of computed tensors in units of their largest value.

Rounding grows with the size of the numbers, and its last bits are up to the processor's vector units, the number of
threads and where memory lies. An absolute limit on values of any size would leave the verdict to those.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def assert_close(
    got: Tensor | np.ndarray, expected: Tensor | np.ndarray, tolerance: float = 1e-5, *, name: str = ""
) -> None:
    """No element differs by more than `tolerance` times the largest expected value; NaN is close to nothing.

    Shapes, dtypes and devices must agree, as in torch.testing.assert_close; `name` opens the message.
    """
    got, expected = torch.as_tensor(got).detach(), torch.as_tensor(expected).detach()
    # Values apart; what is left to this call are shape, dtype, device and layout, and its words about them.
    torch.testing.assert_close(got, expected, rtol=0, atol=torch.inf, equal_nan=True)
    if not expected.numel():
        return
    differences = (got.double() - expected.double()).abs()
    worst, largest = differences.max().item(), expected.double().abs().max().item()
    if not worst <= tolerance * largest:  # written so that NaN fails
        place = tuple(int(i) for i in np.unravel_index(int(differences.argmax()), differences.shape))
        raise AssertionError(
            f"{name + ': ' if name else ''}differ by {worst:.2e} where the largest value is {largest:.2e}: "
            f"{worst / largest if largest else torch.inf:.2e} of it, above {tolerance:.0e}; "
            f"at {place} {got[place].item()!r} instead of {expected[place].item()!r}"
        )


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same tensors to the bit under the same names: for what was copied, not computed.

    What a model computes with a copy of its weights is only close: tensors of a mapped file lie where they lie in it,
    and products of matrices may be summed in another order where those begin at another address.
    """
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
