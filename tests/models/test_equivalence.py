"""Inflation: a still clip is its image, and order in time is free until something tells it."""

import pytest

from tests.closeness import assert_close
from tests.models.equivalence import (
    STILL,
    Still,
    image_model,
    inflated,
    order_answers,
    order_difference,
    padding_attended,
    perturb_time,
    still_answers,
    still_difference,
)
from tests.models.parity import KINDS

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.parametrize("case", STILL, ids=str)
def test_still_clip_equals_its_image(case):
    """T = 1, whole windows, shifted windows, padded windows and padded patches."""
    for got, expected in still_answers(image_model(), case):
        assert_close(got, expected)


@pytest.mark.parametrize("backend", KINDS)
def test_padded_still_clip_equals_its_image_in_every_backend(backend):
    for got, expected in still_answers(image_model(attention=backend), Still(4, 7, 1)):
        assert_close(got, expected)


@pytest.mark.parametrize("backend", KINDS)
def test_attending_to_padding_would_be_seen(backend):
    """The check has teeth: the same model without its mask over padding fails it by four orders of magnitude."""
    with padding_attended():
        assert min(still_difference(image_model(attention=backend), Still(8, 12, 1))) > 0.1


@pytest.mark.parametrize("backend", KINDS)
def test_order_in_time_is_free_at_inflation_while_one_window_holds_all_frames(backend):
    clip = inflated(image_model(attention=backend), 5, 8, 1)
    assert_close(*order_answers(clip, 5))
    assert order_difference(perturb_time(clip), 5) > 1e-2


@pytest.mark.parametrize("frames", [7, 8])
def test_order_in_time_is_seen_when_windows_divide_the_clip(frames):
    assert order_difference(inflated(image_model(), frames, 4, 1), frames) > 1e-2
