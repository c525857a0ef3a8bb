"""Views of a test: windows against a loop over pixels, averages of scales and flips against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as TF

from video_swinv2.dense.segmentation_views import SegmentationViews, class_probabilities, predicted_classes, windows


def per_pixel(images: Tensor) -> Tensor:
    """Logits that depend on each pixel alone: (B, 3, H, W) -> (B, 4, H, W)."""
    red, green, blue = images.unbind(1)
    return torch.stack([red, green, blue, red * green], dim=1)


def within_window(images: Tensor) -> Tensor:
    """Logits that depend on the place in the window, as at a border: the first class gets the row, the second 1."""
    rows = torch.arange(images.shape[2], dtype=torch.float32)[:, None].expand(images.shape[2:])
    return torch.stack([rows, torch.ones_like(rows)]).expand(len(images), -1, -1, -1)


@pytest.mark.parametrize(
    ("size", "crop", "stride"), [((20, 31), (8, 12), None), ((8, 12), (8, 12), (4, 4)), ((5, 40), (8, 12), (8, 12))]
)
def test_windows_cover_an_image_and_stay_in_it(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int] | None
) -> None:
    seen = torch.zeros(size)
    places = list(windows(size, crop, stride))
    for rows, columns in places:
        assert 0 <= rows.start < rows.stop <= size[0]
        assert 0 <= columns.start < columns.stop <= size[1]
        assert (rows.stop - rows.start, columns.stop - columns.start) == tuple(map(min, crop, size))
        seen[rows, columns] += 1
    assert seen.min() >= 1
    assert len(places) == len(set(map(str, places)))
    # As in mmsegmentation: ceil((side - crop) / stride) + 1 along each axis.
    steps = stride or tuple(max(round(side * 2 / 3), 1) for side in crop)
    counts = [max(-(-(side - c) // s), 0) + 1 for side, c, s in zip(size, crop, steps, strict=True)]
    assert len(places) == counts[0] * counts[1]


def test_a_sliding_window_averages_logits() -> None:
    image = torch.randn(3, 20, 31)
    slide = SegmentationViews(mode="slide", crop=(8, 12), windows_at_once=3)
    whole = class_probabilities(per_pixel, image, SegmentationViews())
    torch.testing.assert_close(class_probabilities(per_pixel, image, slide), whole)
    found = class_probabilities(within_window, image, slide)
    for h in range(20):
        for w in (0, 17, 30):
            places = [rows.start for rows, columns in windows((20, 31), (8, 12)) if h in range(rows.start, rows.stop)
                      and w in range(columns.start, columns.stop)]  # fmt: skip
            logits = torch.tensor([sum(h - top for top in places) / len(places), 1.0])
            torch.testing.assert_close(found[:, h, w], logits.softmax(0))


def test_scales_and_flips_average_probabilities() -> None:
    image = torch.randn(3, 16, 20)
    views = SegmentationViews(short_side=32, scales=(0.5, 1.0), flip=True)
    expected = torch.zeros(2, 16, 20)
    for size in ((16, 20), (32, 40)):
        for mirrored in (False, True):
            shown = TF.resize(image, list(size), antialias=True)
            shown = shown.flip(-1) if mirrored else shown
            columns = torch.arange(size[1], dtype=torch.float32).expand(1, *size)
            logits = torch.stack([shown[:1], columns / 10], dim=1)
            logits = logits.flip(-1) if mirrored else logits
            expected += interpolate(logits, (16, 20), mode="bilinear")[0].softmax(0) / 4

    def segment(images: Tensor) -> Tensor:
        columns = torch.arange(images.shape[3], dtype=torch.float32).expand(len(images), *images.shape[2:])
        return torch.stack([images[:, 0], columns / 10], dim=1)

    found = class_probabilities(segment, image, views)
    torch.testing.assert_close(found, expected)
    assert torch.equal(predicted_classes(segment, image, views), expected.argmax(0).to(torch.uint8))


def test_views_that_cannot_be_are_refused() -> None:
    for values, message in (
        ({"mode": "tiles"}, "mode: 'tiles'"),
        ({"mode": "slide"}, "crop: a sliding window needs its size"),
        ({"scales": ()}, "scales: invalid value"),
        ({"crop": (0, 4)}, "crop: invalid value"),
        ({"mode": "slide", "crop": (8, 8), "stride": (9, 4)}, "leaves gaps"),
    ):
        with pytest.raises(ValueError, match=message):
            SegmentationViews(**values)  # type: ignore[arg-type]
