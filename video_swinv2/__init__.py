"""Video SwinV2: Swin Transformer V2 for video action recognition.

models          create_model, list_models, SwinV2, SimMIM
weights         load_model, save_model, read_card, load_weights; SwinV2.from_pretrained and .save_pretrained
data            VideoDataset, transforms, AugmentConfig, Preprocessing
detection       create_detector, Detector, DetectionDataset, DetectionAugment
segmentation    create_segmenter, Segmenter, SegmentationDataset, SegmentationAugment
tests           multi_view, accuracy

docs/library.md shows them at work.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from video_swinv2.config import AugmentConfig
    from video_swinv2.data import transforms
    from video_swinv2.data.video_dataset import VideoDataset
    from video_swinv2.dense.detection_dataset import DetectionDataset
    from video_swinv2.dense.detection_transforms import DetectionAugment
    from video_swinv2.dense.detectors import Detector, create_detector
    from video_swinv2.dense.loading import load_model
    from video_swinv2.dense.segmentation_data import SegmentationDataset
    from video_swinv2.dense.segmentation_transforms import SegmentationAugment
    from video_swinv2.dense.segmenters import Segmenter, create_segmenter
    from video_swinv2.evaluation.multi_view import accuracy, multi_view
    from video_swinv2.models.preprocessing import Preprocessing
    from video_swinv2.models.simmim import SimMIM
    from video_swinv2.models.swinv2 import SwinV2
    from video_swinv2.models.variants import create_model, list_models
    from video_swinv2.weights.inflate import load_weights
    from video_swinv2.weights.store import read_card, save_model

__version__ = "0.1.0"

__all__ = [
    "AugmentConfig",
    "DetectionAugment",
    "DetectionDataset",
    "Detector",
    "Preprocessing",
    "SegmentationAugment",
    "SegmentationDataset",
    "Segmenter",
    "SimMIM",
    "SwinV2",
    "VideoDataset",
    "accuracy",
    "create_detector",
    "create_model",
    "create_segmenter",
    "list_models",
    "load_model",
    "load_weights",
    "multi_view",
    "read_card",
    "save_model",
    "transforms",
]

# Where each public name is defined: "module:name", or "module:" for a module itself.
_PLACES = {
    "AugmentConfig": "config:AugmentConfig",
    "DetectionAugment": "dense.detection_transforms:DetectionAugment",
    "DetectionDataset": "dense.detection_dataset:DetectionDataset",
    "Detector": "dense.detectors:Detector",
    "Preprocessing": "models.preprocessing:Preprocessing",
    "SegmentationAugment": "dense.segmentation_transforms:SegmentationAugment",
    "SegmentationDataset": "dense.segmentation_data:SegmentationDataset",
    "Segmenter": "dense.segmenters:Segmenter",
    "SimMIM": "models.simmim:SimMIM",
    "SwinV2": "models.swinv2:SwinV2",
    "VideoDataset": "data.video_dataset:VideoDataset",
    "accuracy": "evaluation.multi_view:accuracy",
    "create_detector": "dense.detectors:create_detector",
    "create_model": "models.variants:create_model",
    "create_segmenter": "dense.segmenters:create_segmenter",
    "list_models": "models.variants:list_models",
    "load_model": "dense.loading:load_model",
    "load_weights": "weights.inflate:load_weights",
    "multi_view": "evaluation.multi_view:multi_view",
    "read_card": "weights.store:read_card",
    "save_model": "weights.store:save_model",
    "transforms": "data.transforms:",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use: preparing data and `--help` must not wait for torch."""
    if name in _PLACES:
        # Gives SwinV2 its from_pretrained and save_pretrained, which models/ cannot import.
        importlib.import_module("video_swinv2.weights.pretrained")
        return pkgutil.resolve_name(f"video_swinv2.{_PLACES[name]}")
    raise AttributeError(f"module 'video_swinv2' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names too, which are no attributes until they are used; nothing is imported for it."""
    return sorted({*globals(), *__all__})
