"""Windows over a token grid with any number of axes: shrink, pad, shift, partition, and which tokens see each other.

Letters: B batch, *S the grid (T, H, W or H, W), C channels, W windows, N tokens in a window.

A stage cuts its grid into windows and attends inside each. Every second block shifts the windows by half their size,
so that information crosses their borders. For a grid of (H, W) = (6, 6) and windows of (4, 4), the shifted block does

    pad      (B, 6, 6, C) -> (B, 8, 8, C)          zeros at the end, up to whole windows
    roll     by (-2, -2)                           the first two rows and columns move to the end
    split    (B, 8, 8, C) -> (B, 4, 16, C)         four windows of sixteen tokens
    attend   within each window and each region    see `region_labels`
    join, roll back, crop                          the same steps in reverse

Two kinds of tokens share a window there without being neighbours: those from opposite ends of an axis, which the roll
has brought together, and padding. Both are separated by labels rather than by large negative numbers added to the
logits: a token attends only to tokens with its own label, so the result does not depend on the padding at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PerAxis = tuple[int, ...]
"""One number per axis of the grid: (T, H, W), or (H, W) for images."""


def shrink_window(window: Sequence[int], grid: Sequence[int]) -> tuple[PerAxis, PerAxis]:
    """The window and the shift that a grid really gets, axis by axis.

    An axis that is no longer than the window is covered by a single window of its own length and is not shifted: there
    is no border to cross. Video Swin and timm do the same. Microsoft's image code decides by the smaller of both axes,
    which is equal on square images.
    """
    shrunk = tuple(min(w, s) for w, s in zip(window, grid, strict=True))
    shift = tuple(0 if s <= w else w // 2 for w, s in zip(window, grid, strict=True))
    return shrunk, shift


def padded_grid(grid: Sequence[int], window: Sequence[int]) -> PerAxis:
    """The grid rounded up to whole windows."""
    return tuple(math.ceil(s / w) * w for s, w in zip(grid, window, strict=True))


def pad_to(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Append zeros to every axis: (B, *S, C) -> (B, *grid, C)."""
    present = x.shape[1:-1]
    if tuple(present) == tuple(grid):
        return x
    amounts = [0, 0]  # F.pad counts from the last axis, which is C
    for length, target in zip(reversed(present), reversed(grid), strict=True):
        amounts += [0, target - length]
    return F.pad(x, amounts)


def crop_to(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Keep the first tokens of every axis: (B, *S, C) -> (B, *grid, C)."""
    for axis, length in enumerate(grid, start=1):
        x = x.narrow(axis, 0, length)
    return x


def roll(x: Tensor, shift: Sequence[int]) -> Tensor:
    """Shift every grid axis of (B, *S, C) cyclically; positive numbers move tokens towards the end."""
    if not any(shift):
        return x
    return torch.roll(x, tuple(shift), tuple(range(1, 1 + len(shift))))


def window_partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """(B, *S, C) -> (B, W, N, C); the windows, and the tokens within each, are in row-major order."""
    batch, *grid, channels = x.shape
    axes = len(window)
    # 2-D: (B, H, W, C) -> (B, H/h, h, W/w, w, C): every axis splits into (which window, where in it).
    split = [n for s, w in zip(grid, window, strict=True) for n in (s // w, w)]
    x = x.reshape(batch, *split, channels)
    # -> (B, H/h, W/w, h, w, C): the odd axes count windows, the even ones count tokens within a window.
    x = x.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    # -> (B, H/h * W/w, h * w, C)
    return x.reshape(batch, -1, math.prod(window), channels)


def window_reverse(windows: Tensor, window: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The inverse of `window_partition`: (B, W, N, C) -> (B, *grid, C)."""
    batch, _, _, channels = windows.shape
    axes = len(window)
    counts = [s // w for s, w in zip(grid, window, strict=True)]
    # 2-D: (B, W, N, C) -> (B, H/h, W/w, h, w, C)
    x = windows.reshape(batch, *counts, *window, channels)
    # -> (B, H/h, h, W/w, w, C): each axis's window count beside its position within the window.
    order = [axis for pair in zip(range(1, axes + 1), range(axes + 1, 2 * axes + 1), strict=True) for axis in pair]
    # -> (B, H, W, C)
    return x.permute(0, *order, 2 * axes + 1).reshape(batch, *grid, channels)


def axis_bands(length: int, window: int, shift: int) -> list[int]:
    """A label for every position of one padded and shifted axis: -1 for padding, otherwise its band.

    After the roll, the last window of an axis holds its end and, behind it, its beginning. Band 1 is that beginning,
    band 0 everything else. For length 6, window 4 and shift 2, the padded axis has 8 positions:

        position after the roll   0  1  2  3 | 4  5  6  7
        token                     2  3  4  5 | -  -  0  1
        label                     0  0  0  0 |-1 -1  1  1
    """
    size = math.ceil(length / window) * window
    tokens = [(position + shift) % size for position in range(size)]
    return [-1 if token >= length else int(position >= size - shift) for position, token in enumerate(tokens)]


def region_labels(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """(W, N) int64: a label for every token after padding and shifting; tokens see each other only within one label.

    A token's label combines its bands along all axes. Padding is a region of its own, -1: no real token ever attends
    to it. Padding attends to padding, which keeps its softmax finite; its output is cropped away.
    """
    label = torch.zeros((), dtype=torch.int64)
    real = torch.ones((), dtype=torch.bool)
    for length, w, s in zip(grid, window, shift, strict=True):
        band = torch.tensor(axis_bands(length, w, s))
        # Outer combination, one axis more per turn: () -> (T,) -> (T, H) -> (T, H, W). Two bands per axis make the
        # label a binary number with one digit per axis.
        label = label[..., None] * 2 + band
        real = real[..., None] & (band >= 0)
    # (*S) -> (1, *S, 1) -> (1, W, N, 1) -> (W, N)
    return window_partition(label.where(real, -1)[None, ..., None], window)[0, ..., 0]


@dataclass(frozen=True)
class WindowLayout:
    """How the blocks of a stage cut a grid into windows: everything that depends on sizes alone."""

    grid: PerAxis
    padded: PerAxis
    window: PerAxis
    shift: PerAxis
    label: Tensor | None
    """(W, N) int64, `region_labels`; None when every token may see all tokens of its window."""
    divided: tuple[bool, ...] = ()
    """For every window, whether it contains more than one label. Most windows do not, and need no mask."""

    @property
    def allowed(self) -> Tensor | None:
        """(W, N, N) bool, True where the query (first) may see the key; computed on each call, because it is large."""
        return None if self.label is None else same_region(self.label)


def same_region(label: Tensor) -> Tensor:
    """(W, N) labels -> (W, N, N) bool: whether query (first) and key have the same label."""
    return label[:, :, None] == label[:, None, :]


def window_layout(grid: PerAxis, window: Sequence[int], shifted: bool, device: torch.device) -> WindowLayout:
    """The layout of one kind of block (shifted or not) over `grid`, with its labels on `device`."""
    shrunk, shift = shrink_window(window, grid)
    if not shifted:
        shift = (0,) * len(grid)
    padded = padded_grid(grid, shrunk)
    if not any(shift) and padded == tuple(grid):
        return WindowLayout(tuple(grid), padded, shrunk, shift, None)
    # A window is divided if any axis brings two bands into it. Counted on the host from short lists, since reading it
    # back from the labels would synchronise a GPU.
    divided_per_axis = []
    for length, w, s in zip(grid, shrunk, shift, strict=True):
        bands = axis_bands(length, w, s)
        divided_per_axis.append([len(set(bands[i : i + w])) > 1 for i in range(0, len(bands), w)])
    divided = tuple(any(along_axes) for along_axes in itertools.product(*divided_per_axis))
    return WindowLayout(tuple(grid), padded, shrunk, shift, region_labels(grid, shrunk, shift).to(device), divided)
