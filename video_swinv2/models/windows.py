"""Windows over a grid of any number of axes: shrink, pad, roll, split, join, and who may attend to whom.

Letters: B batch, *S the grid (T, H, W or H, W), C channels, W windows, N tokens in a window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, ...]


def shrink(window: Sequence[int], grid: Sequence[int]) -> tuple[Size, Size]:
    """The window and the shift that a grid really gets, axis by axis.

    An axis no longer than the window is covered by one window of its own length, which has nothing to shift against
    (Video Swin and timm; Microsoft's image code takes the smaller of both axes, the same on square images).
    """
    shrunk = tuple(min(w, s) for w, s in zip(window, grid, strict=True))
    shift = tuple(0 if s <= w else w // 2 for w, s in zip(window, grid, strict=True))
    return shrunk, shift


def padded(grid: Sequence[int], window: Sequence[int]) -> Size:
    """The grid rounded up to whole windows."""
    return tuple(math.ceil(s / w) * w for s, w in zip(grid, window, strict=True))


def pad_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Zeros at the end of every axis: (B, *S, C) -> (B, *size, C)."""
    grid = x.shape[1:-1]
    if tuple(grid) == tuple(size):
        return x
    amounts = [0, 0]  # F.pad counts from the last axis, which is C
    for s, target in zip(reversed(grid), reversed(size), strict=True):
        amounts += [0, target - s]
    return F.pad(x, amounts)


def crop_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first `size` tokens of every axis: (B, *S, C) -> (B, *size, C)."""
    for axis, length in enumerate(size, start=1):
        x = x.narrow(axis, 0, length)
    return x


def roll(x: Tensor, shift: Sequence[int]) -> Tensor:
    """A cyclic shift of every grid axis of (B, *S, C); positive moves towards the end."""
    if not any(shift):
        return x
    return torch.roll(x, tuple(shift), tuple(range(1, 1 + len(shift))))


def partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """(B, *S, C) -> (B, W, N, C); windows and the tokens in them in row-major order.

    In 2-D: (B, H, W, C) -> (B, H/h, h, W/w, w, C) -> (B, H/h, W/w, h, w, C) -> (B, H/h * W/w, h * w, C).
    """
    batch, *grid, channels = x.shape
    axes = len(window)
    split = [n for s, w in zip(grid, window, strict=True) for n in (s // w, w)]
    x = x.reshape(batch, *split, channels)
    x = x.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return x.reshape(batch, -1, math.prod(window), channels)


def merge(windows: Tensor, window: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The inverse of `partition`: (B, W, N, C) -> (B, *grid, C)."""
    batch, _, _, channels = windows.shape
    axes = len(window)
    counts = [s // w for s, w in zip(grid, window, strict=True)]
    x = windows.reshape(batch, *counts, *window, channels)
    order = [axis for pair in zip(range(1, axes + 1), range(axes + 1, 2 * axes + 1), strict=True) for axis in pair]
    return x.permute(0, *order, 2 * axes + 1).reshape(batch, *grid, channels)


def bands(length: int, window: int, shift: int) -> list[int]:
    """What each place of one padded, shifted axis is: -1 padding, else the band of tokens that belong together.

    The roll brings the two ends of an axis into its last window, which is cut in two there.
    """
    size = math.ceil(length / window) * window
    places = [(i + shift) % size for i in range(size)]
    return [-1 if place >= length else int(i >= size - shift) for i, place in enumerate(places)]


def regions(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """(W, N) int64: a label for every token after padding and shifting; tokens see each other only inside one label.

    Padding is one more region, -1: no real token ever looks at it, and it looks only at itself, which keeps its softmax
    finite.
    """
    label = torch.zeros((), dtype=torch.int64)
    real = torch.ones((), dtype=torch.bool)
    for length, w, s in zip(grid, window, shift, strict=True):
        band = torch.tensor(bands(length, w, s))
        label = label[..., None] * 2 + band
        real = real[..., None] & (band >= 0)
    return partition(label.where(real, -1)[None, ..., None], window)[0, ..., 0]


@dataclass(frozen=True)
class Layout:
    """How the blocks of a stage cut a grid into windows: everything that depends on sizes alone."""

    grid: Size
    padded: Size
    window: Size
    shift: Size
    label: Tensor | None
    """(W, N) int64, `regions`; None when every token may see all others of its window."""
    divided: tuple[bool, ...] = ()
    """For every window, whether it has more than one label; most have not."""

    @property
    def allowed(self) -> Tensor | None:
        """(W, N, N) bool, True where the query (first) may see the key; made anew, since it is large."""
        return None if self.label is None else same(self.label)


def same(label: Tensor) -> Tensor:
    """(W, N) labels -> (W, N, N) bool: whether query (first) and key have one label."""
    return label[:, :, None] == label[:, None, :]


def layout(grid: Size, window: Sequence[int], shifted: bool, device: torch.device) -> Layout:
    """The layout of one kind of block (shifted or not) over `grid`, its labels on `device`."""
    shrunk, shift = shrink(window, grid)
    if not shifted:
        shift = (0,) * len(grid)
    size = padded(grid, shrunk)
    if not any(shift) and size == tuple(grid):
        return Layout(tuple(grid), size, shrunk, shift, None)
    pieces = []
    for length, w, s in zip(grid, shrunk, shift, strict=True):
        band = bands(length, w, s)
        pieces.append([len(set(band[i : i + w])) > 1 for i in range(0, len(band), w)])
    divided = tuple(any(window_) for window_ in itertools.product(*pieces))
    return Layout(tuple(grid), size, shrunk, shift, regions(grid, shrunk, shift).to(device), divided)
