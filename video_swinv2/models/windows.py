"""Attention windows over a token grid with any number of axes: their sizes, partition, shift and masks.

Letters: B batch, *S the grid (T, H, W or H, W), C channels, W windows, N tokens in a window.

A block divides its grid into windows and attends within each of them. Every second block shifts the windows by half
their size, so that information crosses their borders. For a grid of (H, W) = (6, 6) and windows of (4, 4), the shifted
block proceeds as follows:

    pad      (B, 6, 6, C) -> (B, 8, 8, C)          zeros at the end of each axis, up to whole windows
    roll     by (-2, -2)                           the first two rows and columns move to the end
    split    (B, 8, 8, C) -> (B, 4, 16, C)         four windows of sixteen tokens
    attend   within each window and each region    see `region_labels`
    join, roll back, crop                          the same steps in reverse

The steps before and those after the attention only move tokens. `window_layout` applies them to the numbers of the
tokens once (`token_moves`), and `to_windows` and `from_windows` then copy each token straight to its place.

A shifted window can contain tokens that are not neighbours: tokens from opposite ends of an axis, which the roll has
brought together, and padding. They are told apart by labels, and a token attends only to tokens with its own label.
Microsoft instead adds -100 to the logits of such pairs, which leaves some influence. Here the result does not depend
on the padding at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PerAxis = tuple[int, ...]
"""One number per axis of the grid: (T, H, W), or (H, W) for images."""


def shrink_window(window: Sequence[int], grid: Sequence[int]) -> tuple[PerAxis, PerAxis]:
    """The window and the shift that are used for a grid, decided axis by axis.

    An axis that is not longer than the window is covered by a single window of its own length. It is not shifted, since
    there is no border to cross. Video Swin and timm do the same. Microsoft's image code decides by the smaller of the
    two axes, which makes no difference for square images.
    """
    shrunk = tuple(min(w, s) for w, s in zip(window, grid, strict=True))
    shift = tuple(0 if s <= w else w // 2 for w, s in zip(window, grid, strict=True))
    return shrunk, shift


def padded_grid(grid: Sequence[int], window: Sequence[int]) -> PerAxis:
    """The grid, with every axis rounded up to a multiple of the window."""
    return tuple(math.ceil(s / w) * w for s, w in zip(grid, window, strict=True))


def pad_to(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Append zeros to the end of every axis: (B, *S, C) -> (B, *grid, C)."""
    present = x.shape[1:-1]
    if tuple(present) == tuple(grid):
        return x
    # F.pad takes (before, after) for each axis, starting with the last, C, which is not padded.
    amounts = [0, 0]
    for length, target in zip(reversed(present), reversed(grid), strict=True):
        amounts += [0, target - length]
    return F.pad(x, amounts)


def crop_to(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Keep the first tokens of every axis, undoing `pad_to`: (B, *S, C) -> (B, *grid, C)."""
    for axis, length in enumerate(grid, start=1):
        x = x.narrow(axis, 0, length)
    return x


def roll(x: Tensor, shift: Sequence[int]) -> Tensor:
    """Roll every grid axis of (B, *S, C) cyclically; positive numbers move tokens towards the end."""
    if not any(shift):
        return x
    return torch.roll(x, tuple(shift), tuple(range(1, 1 + len(shift))))


def window_partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """(B, *S, C) -> (B, W, N, C); the windows, and the tokens within each, are in row-major order."""
    batch, *grid, channels = x.shape
    axes = len(window)
    # 2-D: (B, H, W, C) -> (B, H/h, h, W/w, w, C): every axis is split into the window and the position within it.
    split = [n for s, w in zip(grid, window, strict=True) for n in (s // w, w)]
    x = x.reshape(batch, *split, channels)
    # -> (B, H/h, W/w, h, w, C): the odd axes, which count windows, come before the even ones, which count tokens.
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
    # -> (B, H/h, h, W/w, w, C): for each axis, the window is followed by the position within it.
    order = [axis for pair in zip(range(1, axes + 1), range(axes + 1, 2 * axes + 1), strict=True) for axis in pair]
    # -> (B, H, W, C)
    return x.permute(0, *order, 2 * axes + 1).reshape(batch, *grid, channels)


def axis_bands(length: int, window: int, shift: int) -> list[int]:
    """A label for every position of one padded and shifted axis: -1 for padding, otherwise the band of its token.

    After the roll, the last window of an axis contains the end of the axis followed by its beginning. That beginning is
    band 1, and everything else is band 0. For length 6, window 4 and shift 2, the padded axis has 8 positions:

        position after the roll   0  1  2  3 | 4  5  6  7
        token                     2  3  4  5 | -  -  0  1
        label                     0  0  0  0 |-1 -1  1  1
    """
    size = math.ceil(length / window) * window
    tokens = [(position + shift) % size for position in range(size)]
    return [-1 if token >= length else int(position >= size - shift) for position, token in enumerate(tokens)]


def region_labels(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """(W, N) int64: the label of every token after padding and shifting. Tokens attend only to their own label.

    The label of a token combines its bands along all axes. Padding has the label -1, so no real token attends to it.
    Padding attends to padding, which keeps its softmax finite, and its output is cropped away.
    """
    label = torch.zeros((), dtype=torch.int64)
    real = torch.ones((), dtype=torch.bool)
    for length, w, s in zip(grid, window, shift, strict=True):
        band = torch.tensor(axis_bands(length, w, s))
        # Each iteration adds an axis by broadcasting: () -> (T,) -> (T, H) -> (T, H, W). With two bands per axis, the
        # label is a binary number with one digit per axis.
        label = label[..., None] * 2 + band
        real = real[..., None] & (band >= 0)
    # Labels travel like tokens: (*S) -> (1, *S, 1) -> (1, W, N, 1) -> (W, N)
    return window_partition(label.where(real, -1)[None, ..., None], window)[0, ..., 0]


@dataclass(frozen=True)
class WindowLayout:
    """How a block divides a grid into windows: everything that depends only on sizes and not on the tokens."""

    grid: PerAxis
    padded: PerAxis
    window: PerAxis
    shift: PerAxis
    label: Tensor | None
    """(W, N) int64, `region_labels`; None when every token may see all tokens of its window."""
    divided: tuple[bool, ...] = ()
    """For each of the W windows, whether it contains more than one label. Most do not, and need no mask."""
    moves: tuple[Tensor, Tensor] | None = None
    """The steps before and after the attention as copies of tokens, `token_moves`; None to apply them one by one."""

    @property
    def allowed(self) -> Tensor | None:
        """(W, N, N) bool, True where the query (first) may attend to the key. None if there are no restrictions.

        It is computed on each access rather than stored, because it is large.
        """
        return None if self.label is None else same_region(self.label)


def same_region(label: Tensor) -> Tensor:
    """(W, N) labels -> (W, N, N) bool, True where the query (first) and the key have the same label."""
    return label[:, :, None] == label[:, None, :]


def token_moves(grid: PerAxis, window: PerAxis, shift: PerAxis) -> tuple[Tensor, Tensor]:
    """Where tokens go when a grid is padded, rolled and split into windows: two int64 tensors.

    The first, (W * N,), gives for every place in the windows the number of its token, in row-major order of the grid;
    padding has the number after the last. The second, (tokens,), gives the place of every token.
    """
    tokens = math.prod(grid)
    # From 1, because `pad_to` fills in zeros: (1, *S, 1) -> (W * N,)
    numbers = torch.arange(1, tokens + 1).view(1, *grid, 1)
    numbers = roll(pad_to(numbers, padded_grid(grid, window)), [-s for s in shift])
    order = (window_partition(numbers, window).flatten() - 1) % (tokens + 1)
    return order, order.argsort()[:tokens]


def to_windows(x: Tensor, layout: WindowLayout) -> Tensor:
    """Pad, roll and split a grid into windows: (B, *S, C) -> (B, W, N, C). Padding is zero."""
    if layout.moves is None:
        return window_partition(roll(pad_to(x, layout.padded), [-s for s in layout.shift]), layout.window)
    order, places = layout.moves
    moved: Tensor = _Move.apply(x.flatten(1, -2), order, places)
    return moved.unflatten(1, (-1, math.prod(layout.window)))


def from_windows(windows: Tensor, layout: WindowLayout) -> Tensor:
    """Join windows, roll back and crop: (B, W, N, C) -> (B, *S, C)."""
    if layout.moves is None:
        return crop_to(roll(window_reverse(windows, layout.window, layout.padded), layout.shift), layout.grid)
    order, places = layout.moves
    moved: Tensor = _Move.apply(windows.flatten(1, 2), places, order)
    return moved.unflatten(1, layout.grid)


class _Move(torch.autograd.Function):
    """Moves tokens: place i of the result holds the token `sources[i]` of (B, tokens, C), or zeros for padding.

    `targets` is the inverse. The gradient of indexing in general adds up, since an index may occur twice; that is slow,
    and on GPUs not reproducible. Here every token has one place at most, where its gradient is found.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        # Not by save_for_backward, which refuses tensors made in inference mode, as layouts of a validation are.
        ctx.moves = sources, targets
        return _take(x, sources, len(targets))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        sources, targets = ctx.moves
        return _Move.apply(grad, targets, sources), None, None


def _take(x: Tensor, sources: Tensor, present: int) -> Tensor:
    """(B, present, C) -> (B, sources, C), where the number after the last token stands for zeros."""
    if len(sources) > present:  # with padding
        x = F.pad(x, (0, 0, 0, 1))
    return x.index_select(1, sources)


def window_layout(grid: PerAxis, window: Sequence[int], shifted: bool, device: torch.device) -> WindowLayout:
    """The layout of one kind of block (shifted or not) over `grid`, with its labels on `device`."""
    shrunk, shift = shrink_window(window, grid)
    if not shifted:
        shift = (0,) * len(grid)
    padded = padded_grid(grid, shrunk)
    moves = None
    # Not for a single window, which needs no steps, and not in compiled programs, which would compute it in each pass.
    if shrunk != padded and not torch.compiler.is_compiling():
        order, places = token_moves(tuple(grid), shrunk, shift)
        moves = order.to(device), places.to(device)
    if not any(shift) and padded == tuple(grid):
        return WindowLayout(tuple(grid), padded, shrunk, shift, None, moves=moves)
    # A window is divided if it contains two bands of any axis. This is computed on the host from short lists, because
    # reading it back from the labels would synchronise with the GPU.
    divided_per_axis = []
    for length, w, s in zip(grid, shrunk, shift, strict=True):
        bands = axis_bands(length, w, s)
        divided_per_axis.append([len(set(bands[i : i + w])) > 1 for i in range(0, len(bands), w)])
    # The product combines one entry per axis, in the row-major order of `window_partition`.
    divided = tuple(any(along_axes) for along_axes in itertools.product(*divided_per_axis))
    label = region_labels(grid, shrunk, shift).to(device)
    return WindowLayout(tuple(grid), padded, shrunk, shift, label, divided, moves)
