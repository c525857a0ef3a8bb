"""What SimMIM sees and makes: original, masked and reconstructed samples in one picture.

Letters: B samples, R rows (original, masked, reconstructed), T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from video_swinv2.data.datasets import Batch, SampleDataset, collate
from video_swinv2.data.transforms import GREY

IMAGES, CLIPS = 8, 2  # samples in a picture
GAP = 2  # white pixels between tiles


def chosen_samples(samples: SampleDataset) -> Batch:
    """The same few validation samples at every call, spread over the list."""
    wanted = min(len(samples), IMAGES if samples.data.frames is None else CLIPS)
    return collate([samples[(0, index * len(samples) // wanted)] for index in range(wanted)])


def draw(original: Tensor, reconstructed: Tensor, hidden: Tensor) -> Tensor:
    """(B, 3, ..., H, W) uint8 twice and the mask (B, ..., H, W) bool, True = hidden -> one picture (3, *, *) uint8.

    The reconstruction is what was predicted for hidden pixels, amid the visible ones. Images stand side by side, with
    the three rows below each other; each clip is a block of three rows with its frames from left to right.
    """
    grey = torch.tensor(GREY, dtype=torch.uint8, device=original.device).view(1, 3, *[1] * (original.ndim - 2))
    masked, rebuilt = (torch.where(hidden[:, None], filling, original) for filling in (grey, reconstructed))
    return contact_sheet([original, masked, rebuilt])


def contact_sheet(rows: Sequence[Tensor]) -> Tensor:
    """R rows of (B, 3, T, H, W), or of images (B, 3, H, W), which take the place of frames -> (3, B R H, T W)."""
    clips = [row.transpose(0, 1)[None] if row.ndim == 4 else row for row in rows]
    tiles = F.pad(torch.stack(clips, dim=1), (0, GAP, 0, GAP), value=255)
    samples, count, channels, frames, height, width = tiles.shape
    sheet = tiles.permute(2, 0, 1, 4, 3, 5)
    return sheet.reshape(channels, samples * count * height, frames * width)[:, :-GAP, :-GAP]
