"""torchvision's region proposal network, with anchors that are exact for images of any size and numbers in float32.

Letters: N images (always 1 here), A anchors per token, H W the grid of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height / width


class ExactAnchors(AnchorGenerator):
    """Anchors at the true strides of the maps, in float32.

    torchvision divides the size of the image by the grid and rounds down. If the image is no multiple of the stride,
    the anchors are then misplaced: 101 pixels give 26 tokens of 4, for which it computes 3. It also gives the anchors
    the dtype of the maps, in which, under autocast to bf16, the coordinate 801 is 800.

    sizes: the side of the anchors of each map in pixels. strides: the pixels per token of each map.
    """

    def __init__(self, sizes: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__(tuple((size,) for size in sizes), (ASPECT_RATIOS,) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of every image, (anchors of all maps, 4) as x1, y1, x2, y2 in pixels."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        grids = [list(feature.shape[-2:]) for feature in feature_maps]
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        return [torch.cat(self.grid_anchors(grids, strides))] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """torchvision's head, whose outputs are float32 under autocast too: they become the coordinates of boxes."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (N, C, H, W) -> objectness (N, A, H, W) and box deltas (N, 4A, H, W) of each."""
        objectness, deltas = super().forward(x)
        return [m.float() for m in objectness], [m.float() for m in deltas]


class Sampler(BalancedPositiveNegativeSampler):
    """torchvision's random choice of positive and negative boxes for the loss, optionally from a generator of its own.

    With `generator` None it draws from torch's global generator, as torchvision does.
    """

    generator: torch.Generator | None = None
    """A generator on the CPU."""

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Labels of the boxes of each image, above 0 positive, 0 negative, -1 ignored -> two lists of uint8 masks."""
        if self.generator is None:
            return super().__call__(matched_idxs)
        # The global generator of the device would depend on what was drawn for other images.
        masks = [self._draw(labels, self.generator) for labels in matched_idxs]
        return [positive for positive, _ in masks], [negative for _, negative in masks]

    def _draw(self, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
        positives = min(int(self.batch_size_per_image * self.positive_fraction), len(positive))
        masks = []
        for places, count in ((positive, positives), (negative, self.batch_size_per_image - positives)):
            drawn = torch.randperm(len(places), generator=generator)[:count].to(labels.device)
            mask = torch.zeros_like(labels, dtype=torch.uint8)
            mask[places[drawn]] = 1
            masks.append(mask)
        return masks[0], masks[1]


def proposal_network(
    channels: int, anchor_sizes: Sequence[int], strides: Sequence[int], proposals: int, sampled_anchors: int
) -> RegionProposalNetwork:
    """The network that proposes boxes on the maps of a feature pyramid, with torchvision's thresholds.

    Args:
        channels: of every map.
        anchor_sizes, strides: as in `ExactAnchors`, one per map.
        proposals: the most proposals that are kept per image.
        sampled_anchors: anchors per image that the loss is computed on.
    """
    network = RegionProposalNetwork(
        ExactAnchors(anchor_sizes, strides),
        ProposalHead(channels, len(ASPECT_RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=sampled_anchors,
        positive_fraction=0.5,
        # In training, twice as many boxes per map compete in the suppression, as in torchvision.
        pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
        post_nms_top_n={"training": 2 * proposals, "testing": proposals},
        nms_thresh=0.7,
    )
    network.fg_bg_sampler = Sampler(sampled_anchors, 0.5)
    return network
