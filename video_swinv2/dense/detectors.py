"""Object detectors on the pyramid of SwinV2: Faster R-CNN, Mask R-CNN and Cascade Mask R-CNN.

Letters: B images, N objects, D detections, K classes without the background, C channels, H W pixels.

    image (3, H, W) -> PyramidBackbone: four maps -> FeaturePyramidNetwork: five maps of C channels, strides 4 to 64
    -> region proposals (R, 4) -> CascadeHeads: boxes, labels, scores and masks

The pieces but the backbone and the cascade are torchvision's, and a detector is called as torchvision's are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from video_swinv2.data.datasets import Target
from video_swinv2.dense.cascade import CascadeHeads
from video_swinv2.dense.detection_transforms import fitted_size, resize
from video_swinv2.dense.detection_views import View
from video_swinv2.dense.proposals import Sampler, proposal_network
from video_swinv2.dense.pyramid import PyramidBackbone
from video_swinv2.dense.suppression import Suppression, detections
from video_swinv2.models.attention import Backend
from video_swinv2.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from video_swinv2.models.swinv2 import IntOrPerAxis, SwinV2
from video_swinv2.models.variants import create_model

KINDS = ("faster_rcnn", "mask_rcnn", "cascade_mask_rcnn")


@dataclass(frozen=True)
class DetectorDesign:
    """What a detector is, beside its backbone. Model files record it.

    Raises ValueError for values that no detector has.
    """

    num_classes: int
    """K, without the background."""
    kind: str = "faster_rcnn"
    """faster_rcnn (boxes), mask_rcnn (boxes and masks) or cascade_mask_rcnn (both, refined in three stages)."""
    fpn_channels: int = 256
    """Channels of the feature pyramid network."""
    head_channels: int = 1024
    """Channels of the hidden layers of the box heads."""
    mask_channels: int = 256
    """Channels of the hidden layers of the mask head; unused without masks."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Side of the anchors on each of the five maps, in pixels of the resized image."""
    proposals: int = 1000
    """The most proposals per image; twice as many in training."""
    sampled_anchors: int = 256
    """Anchors per image that the loss of the proposals is computed on."""
    sampled_boxes: int = 512
    """Proposals per image that the loss of the heads is computed on."""
    short_side: int = 800
    """Images are scaled to this shorter side in pixels,"""
    max_side: int = 1333
    """or less, so that the longer side has at most this many."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r} is not one of {', '.join(KINDS)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numbers = value if field.name == "anchor_sizes" else () if field.name == "kind" else (value,)
            if any(not isinstance(number, int) or number < 1 for number in numbers):
                raise ValueError(f"{field.name}: invalid value {value}; give a positive number")
        if self.short_side > self.max_side:
            raise ValueError(
                f"short_side: {self.short_side} is more than max_side, {self.max_side}; order them by size"
            )

    @property
    def has_masks(self) -> bool:
        """Whether the detector predicts masks, and needs them for training."""
        return self.kind != "faster_rcnn"


class Detector(nn.Module):
    """A detector, called as torchvision's: images and targets in, losses out (training) or detections out (eval mode).

    Each image goes through the network by itself. There is no padding to the size of other images, on which the result
    could depend, and the losses are the means over the images, so that two processes with one image each compute the
    gradient of one process with both.

    encoder: a `features_only` SwinV2 for images. Its weights are loaded with `load_weights(detector.encoder, path)`.
    """

    def __init__(self, encoder: SwinV2, design: DetectorDesign) -> None:
        super().__init__()
        if encoder.frames is not None:
            raise ValueError("frames: a detector takes images; omit frames")
        if encoder.in_chans != len(IMAGENET_MEAN):
            raise ValueError(f"in_chans: {encoder.in_chans}, but detectors read images as RGB; omit in_chans")
        self.design = design
        self.backbone = PyramidBackbone(encoder)
        strides = self.backbone.strides
        if len(design.anchor_sizes) != len(strides) + 1:
            raise ValueError(f"anchor_sizes: {len(design.anchor_sizes)} of them; give {len(strides) + 1}, one per map")
        self.fpn = FeaturePyramidNetwork(self.backbone.channels, design.fpn_channels, LastLevelMaxPool())
        self.rpn = proposal_network(
            design.fpn_channels,
            design.anchor_sizes,
            [*strides, 2 * strides[-1]],  # LastLevelMaxPool adds a map of half the size
            design.proposals,
            design.sampled_anchors,
        )
        self.roi_heads = CascadeHeads(
            design.fpn_channels,
            design.head_channels,
            design.num_classes,
            stages=3 if design.kind == "cascade_mask_rcnn" else 1,
            mask_channels=design.mask_channels if design.has_masks else None,
            strides=strides,
            sampled_boxes=design.sampled_boxes,
        )

    @property
    def encoder(self) -> SwinV2:
        """The SwinV2, a part of the backbone."""
        return self.backbone.encoder

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes: label k is the name of number k - 1, because 0 is the background. () if unknown."""
        return self.encoder.classes

    @classes.setter
    def classes(self, names: Sequence[str]) -> None:
        if names and len(names) != self.design.num_classes:
            raise ValueError(f"classes: {len(names)} names for {self.design.num_classes} classes; give one per class")
        self.encoder.classes = tuple(names)

    @property
    def suppression(self) -> Suppression:
        """Which boxes are kept as detections. It is no part of the weights; assign another one at any time."""
        return self.roi_heads.suppression

    @suppression.setter
    def suppression(self, suppression: Suppression) -> None:
        self.roi_heads.suppression = suppression

    def dense_design(self) -> dict[str, object]:
        """What model files record beside the architecture of the encoder, as plain data."""
        return {"task": "detection", **dataclasses.asdict(self.design)}

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target] | None = None,
        resized: bool = False,
        seeds: Sequence[int] | None = None,
        paste_masks: bool = True,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Images -> in training the losses by name, each the mean over the images; in eval mode one dict per image.

        Args:
            images: (3, H, W) each, of any sizes, RGB: float in 0..1 or uint8.
            targets: one per image, needed in training: `boxes` float (N, 4) as x1, y1, x2, y2 in pixels, `labels` int64
                (N,) from 1 and, for masks, `masks` uint8 (N, H, W). N may be 0; other keys are ignored.
            resized: whether the images already have the size that the network is to see. Otherwise each is scaled, as
                `short_side` and `max_side` of the design say, in training too.
            seeds: one number per image, from which the anchors and boxes for its losses are drawn. By default they are
                drawn from torch's global generator.
            paste_masks: whether masks are made masks of the whole image; otherwise they are as `detect` returns them.

        The dict of an image has `boxes` float32 (D, 4) in pixels of the image as given, `labels` int64 (D,) from 1,
        `scores` (D,), best first, and with a mask head `masks` float32 (D, 1, H, W) in 0..1.

        Raises ValueError for images or targets of another form, and for boxes without height or width.
        """
        if self.training and targets is None:
            raise ValueError("targets: none, which training needs; pass them, or call eval()")
        for number, image in enumerate(images):
            if image.ndim != 3 or image.shape[0] != 3:
                raise ValueError(f"images[{number}]: shape {tuple(image.shape)} instead of (3, H, W)")
        if self.training and targets is not None:
            self._check(images, targets)
            chosen: Sequence[int | None] = [None] * len(images) if seeds is None else seeds
            triples = zip(images, targets, chosen, strict=True)
            losses = [self._image_losses(image, target, resized, seed) for image, target, seed in triples]
            return {name: torch.stack([parts[name] for parts in losses]).mean() for name in losses[0]}
        found = []
        for image in images:
            result = self.detect(image, [View()] if resized else None)
            if "masks" in result and paste_masks:
                result["masks"] = paste_masks_in_image(result["masks"], result["boxes"], tuple(image.shape[-2:]))
            found.append(result)
        return found

    def detect(self, image: Tensor, views: Sequence[View] | None = None) -> dict[str, Tensor]:
        """The detections of one image in eval mode, as `forward` returns them, but with masks (D, 1, 28, 28).

        views: the image is looked at in each of these ways. The boxes of all views compete in one suppression, and the
        masks of what is kept are the means over the views. By default once, as `short_side` and `max_side` say.

        A mask covers the box of its detection. `paste_masks_in_image` of torchvision makes it one of the whole image,
        which for 100 detections in a large image takes hundreds of megabytes.
        """
        size = (image.shape[-2], image.shape[-1])
        seen, boxes, scores = [], [], []
        default = View(self.design.short_side, self.design.max_side)
        for view in [default] if views is None else views:
            shown = self._pixels(view.show(image))
            maps = self._maps(shown)
            proposals, _ = self._propose(shown, maps, None)
            shown_size = (shown.shape[-2], shown.shape[-1])
            found, probabilities = self.roi_heads.candidates(maps, proposals, shown_size)
            boxes.append(view.boxes_in_image(found.reshape(-1, 4), shown_size, size).view_as(found))
            scores.append(probabilities)
            seen.append((view, maps if self.design.has_masks else {}, shown_size))
        kept, kept_scores, labels = detections(torch.cat(boxes), torch.cat(scores), size, self.suppression)
        result = {"boxes": kept, "labels": labels, "scores": kept_scores}
        if self.design.has_masks:
            masks = []
            for view, maps, shown_size in seen:
                found = self.roi_heads.masks(maps, view.boxes_in_view(kept, shown_size, size), labels, shown_size)
                masks.append(found.flip(-1) if view.flip else found)
            result["masks"] = torch.stack(masks).mean(dim=0)
        return result

    def _image_losses(self, image: Tensor, target: Target, resized: bool, seed: int | None) -> dict[str, Tensor]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for module in (self.rpn, *self.roi_heads.stages):
            sampler = module.fg_bg_sampler
            if isinstance(sampler, Sampler):
                sampler.generator = generator
        wanted = {key: target[key] for key in ("boxes", "labels", "masks") if key in target}
        if not resized:
            design = self.design
            size = fitted_size((image.shape[-2], image.shape[-1]), design.short_side, design.max_side)
            image, wanted = resize(image, wanted, size)
        shown = self._pixels(image)
        maps = self._maps(shown)
        proposals, losses = self._propose(shown, maps, wanted)
        _, others = self.roi_heads(maps, proposals, tuple(shown.shape[-2:]), wanted)
        return losses | others

    def _pixels(self, image: Tensor) -> Tensor:
        """An image (3, H, W), float in 0..1 or uint8 -> (1, 3, H, W), normalised."""
        pixels = image.float() if image.is_floating_point() else image.float() / 255
        preprocessing = self.encoder.preprocessing
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if preprocessing is None else (preprocessing.mean, preprocessing.std)
        shape = (3, 1, 1)
        return ((pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape))[None]

    def _maps(self, pixels: Tensor) -> dict[str, Tensor]:
        """(1, 3, H, W) -> the maps "0" to "3" and "pool", (1, C, H_i, W_i)."""
        return self.fpn({str(stage): found for stage, found in enumerate(self.backbone(pixels))})

    def _propose(
        self, pixels: Tensor, maps: dict[str, Tensor], target: Target | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The proposals (R, 4) and, in training, their losses."""
        images = ImageList(pixels, [(pixels.shape[-2], pixels.shape[-1])])
        proposals, losses = self.rpn(images, maps, None if target is None else [dict(target)])
        return proposals[0], losses

    def _check(self, images: Sequence[Tensor], targets: Sequence[Target]) -> None:
        """Raise ValueError for targets that training cannot use; torchvision would fail later or not at all."""
        if len(images) != len(targets):
            raise ValueError(f"targets: {len(targets)} for {len(images)} images; give one per image")
        for number, (image, target) in enumerate(zip(images, targets, strict=True)):
            where = f"targets[{number}]"
            for key in ("boxes", "labels", *(("masks",) if self.design.has_masks else ())):
                if key not in target:
                    raise ValueError(f"{where}: has no {key!r}; a {self.design.kind} needs it")
            boxes, labels = target["boxes"], target["labels"]
            if boxes.ndim != 2 or boxes.shape[1] != 4 or len(labels) != len(boxes) or not boxes.is_floating_point():
                raise ValueError(
                    f"{where}: boxes {tuple(boxes.shape)} {boxes.dtype} and labels {tuple(labels.shape)}; give float "
                    "(N, 4) and int64 (N,)"
                )
            bad = torch.where(~(boxes[:, 2:] > boxes[:, :2]).all(dim=1))[0]  # also NaN
            if len(bad):
                raise ValueError(
                    f"{where}: box {boxes[bad[0]].tolist()} has no width or height; boxes are x1, y1, x2, y2"
                )
            if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= self.design.num_classes:
                raise ValueError(
                    f"{where}: labels from {int(labels.min())} to {int(labels.max())}, but the detector has classes 1 "
                    f"to {self.design.num_classes} (0 is the background)"
                )
            if self.design.has_masks and tuple(target["masks"].shape) != (len(boxes), *image.shape[-2:]):
                raise ValueError(
                    f"{where}: masks {tuple(target['masks'].shape)} for {len(boxes)} boxes in an image of "
                    f"{tuple(image.shape[-2:])}; give (N, H, W)"
                )


def create_detector(
    name: str,
    *,
    num_classes: int,
    kind: str = "faster_rcnn",
    window: IntOrPerAxis | None = None,
    cpb_norm: Sequence[Sequence[int]] | None = None,
    drop_path: float = 0.0,
    attention: Backend = "auto",
    checkpoint_blocks: int = 0,
    fpn_channels: int = 256,
    head_channels: int = 1024,
    mask_channels: int = 256,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    proposals: int = 1000,
    sampled_anchors: int = 256,
    sampled_boxes: int = 512,
    short_side: int = 800,
    max_side: int = 1333,
) -> Detector:
    """Create a freshly initialised detector, in training mode, to be called as torchvision's detectors are.

    Args:
        name: one of `list_models()`, the backbone.
        num_classes: without the background, which is label 0; labels are 1 to `num_classes`.
        kind: faster_rcnn (boxes), mask_rcnn (boxes and masks) or cascade_mask_rcnn (both, refined in three stages).
        window, cpb_norm, drop_path, attention, checkpoint_blocks: as in `create_model`.
        fpn_channels, head_channels, mask_channels, anchor_sizes, proposals, sampled_anchors, sampled_boxes, short_side,
            max_side: as in `DetectorDesign`, with torchvision's defaults.

    `load_weights(detector.encoder, path)` starts it from pre-trained weights. Raises ValueError for an unknown name or
    kind, and for sizes that do not fit together.
    """
    design = DetectorDesign(
        num_classes,
        kind,
        fpn_channels,
        head_channels,
        mask_channels,
        tuple(anchor_sizes),
        proposals,
        sampled_anchors,
        sampled_boxes,
        short_side,
        max_side,
    )
    encoder = create_model(
        name,
        image_size=short_side,
        window=window,
        cpb_norm=cpb_norm,
        drop_path=drop_path,
        attention=attention,
        checkpoint_blocks=checkpoint_blocks,
        features_only=True,
    )
    return Detector(encoder, design)
