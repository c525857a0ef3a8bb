"""Parameters of every size, and multiply-accumulates of some; `make proof` counts them all."""

import pytest

from tests.models.costs import CLIP_MACS, COUNTS, IMAGE_MACS, beyond_rounding, giga_macs, parameters


@pytest.mark.parametrize("count", COUNTS, ids=str)
def test_parameters(count):
    assert parameters(count) == count.parameters


@pytest.mark.parametrize(
    ("setting", "specified"),
    [(setting, figures["tiny"]) for setting, figures in (*IMAGE_MACS[:2], CLIP_MACS[0], CLIP_MACS[-1])],
)
def test_multiply_accumulates(setting, specified):
    assert beyond_rounding(giga_macs("tiny", setting), specified) <= 1e-3


def test_rounding_allows_half_a_digit_and_no_more():
    assert beyond_rounding(87.84, "87.8") == 0
    assert beyond_rounding(88.0, "87.8") > 1e-3
    assert beyond_rounding(6143.0, "6.14e3") == 0
