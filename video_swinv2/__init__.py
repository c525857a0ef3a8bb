"""Video SwinV2: Swin Transformer V2 for video action recognition."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from video_swinv2.models.simmim import SimMIM
    from video_swinv2.models.swinv2 import SwinV2
    from video_swinv2.models.variants import create_model, list_models
    from video_swinv2.weights.inflate import load_weights
    from video_swinv2.weights.store import Preprocessing, load_model, read_card, save_model

__version__ = "0.1.0"

__all__ = [
    "Preprocessing",
    "SimMIM",
    "SwinV2",
    "create_model",
    "list_models",
    "load_model",
    "load_weights",
    "read_card",
    "save_model",
]

# Where each public name is defined.
_MODULE_OF = {
    "SimMIM": "models.simmim",
    "SwinV2": "models.swinv2",
    "create_model": "models.variants",
    "list_models": "models.variants",
    "load_weights": "weights.inflate",
    "Preprocessing": "weights.store",
    "load_model": "weights.store",
    "read_card": "weights.store",
    "save_model": "weights.store",
}


def __getattr__(name: str) -> object:
    """Import public names on first use: preparing data and `--help` must not wait for torch."""
    if name in _MODULE_OF:
        # Gives SwinV2 its from_pretrained and save_pretrained, which models/ cannot import.
        importlib.import_module("video_swinv2.weights.pretrained")
        return getattr(importlib.import_module(f"video_swinv2.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'video_swinv2' has no attribute {name!r}")
