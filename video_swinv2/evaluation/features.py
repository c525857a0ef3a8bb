"""Frozen features: a model without its head, one vector for each video or image, kept so that they are made once.

N samples, C channels of the last stage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from video_swinv2.data.manifest import Manifest
from video_swinv2.distributed.devices import choose_device, use_bf16
from video_swinv2.errors import UserError
from video_swinv2.evaluation.overrides import TestOverrides, override_preprocessing
from video_swinv2.evaluation.protocols import Protocol
from video_swinv2.evaluation.reading import Group, VideoGroups, default_workers, deliver_groups
from video_swinv2.evaluation.testing import forward_views
from video_swinv2.files import sha256
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.progress import Progress
from video_swinv2.report.scores import read_arrays, write_arrays
from video_swinv2.weights.convert import preprocessing_of
from video_swinv2.weights.formats import read_checkpoint
from video_swinv2.weights.pretrained import Sizes, open_model
from video_swinv2.weights.store import Preprocessing


@dataclass(frozen=True)
class Backbone:
    """A model whose head is left away, and all that its features depend on besides the data."""

    model: SwinV2
    preprocessing: Preprocessing
    record: dict[str, Any] = field(default_factory=dict)
    """Plain JSON; equal records give equal features."""


@dataclass(frozen=True)
class Features:
    """names as listed; labels (N,), places in the classes; vectors (N, C); reasons, empty where the file was read."""

    names: tuple[str, ...]
    labels: NDArray[np.int64]
    vectors: NDArray[np.float32]
    reasons: tuple[str, ...]

    @property
    def read(self) -> NDArray[np.bool_]:
        """(N,) true where the file could be read."""
        return np.array([not reason for reason in self.reasons], dtype=bool)


def open_backbone(path: Path, overrides: TestOverrides) -> Backbone:
    """The model of any known checkpoint, SimMIM's among them, at the sizes asked for, without a head.

    UserError for a file that cannot be read or explained, UsageError for sizes that do not fit or that nothing tells.
    """
    checkpoint = read_checkpoint(path)
    image_size = overrides.image_size
    model, _ = open_model(checkpoint, Sizes(overrides.frames, image_size, None, overrides.window))
    model.reset_classifier(0)
    for block in model.blocks():
        block.attn.attention = overrides.attention or block.attn.attention
    told = override_preprocessing(preprocessing_of(model, checkpoint), overrides)
    digests = sorted(sha256(file) for file in checkpoint.source.files)
    record = {
        "path": str(path),
        "sha256": digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        "layout": checkpoint.layout,
        "architecture": model.architecture(),
        "weights": "as in the file",
    }
    return Backbone(model, told, record)


def with_random_weights(backbone: Backbone, seed: int) -> Backbone:
    """The same architecture as it stands before any training.

    The branches of a fresh SwinV2 are zero: what is left are random projections in the patch embedding and merging.
    """
    arguments: dict[str, Any] = backbone.model.architecture()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SwinV2(**arguments).eval()
    return Backbone(
        model, backbone.preprocessing, backbone.record | {"sha256": None, "weights": f"random, seed {seed}"}
    )


def extract_features(
    backbone: Backbone, manifest: Manifest, protocol: Protocol, overrides: TestOverrides, kept_in: Path | None
) -> Features:
    """The features of a split, made now, or as kept in the folder `kept_in` by an earlier call for the same things.

    A sample is seen in the views of `protocol`; its vector is their mean, each the mean over all tokens after the final
    norm. Files that cannot be read have a reason instead.
    """
    device = choose_device(overrides.device)
    record = {
        "backbone": {key: value for key, value in backbone.record.items() if key != "path"},
        "preprocessing": asdict(backbone.preprocessing),
        "protocol": protocol.name,
        "frame_order": [overrides.frame_order, overrides.seed],
        "bf16": use_bf16(overrides.precision, device),
        "data_fingerprint": manifest.fingerprint,
        "split": manifest.split,
        "samples": len(manifest.entries),
    }
    text = json.dumps(record, sort_keys=True)
    kept = kept_in and kept_in / f"features-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    if kept and kept.is_file():
        arrays = read_arrays(kept, "remove it")
        if str(arrays.get("record")) == text:
            return _from_arrays(arrays)
    features = _make(backbone, manifest, protocol, overrides, device)
    if kept:
        write_arrays(kept, _to_arrays(features) | {"record": np.array(text)})
    return features


def _make(
    backbone: Backbone, manifest: Manifest, protocol: Protocol, overrides: TestOverrides, device: torch.device
) -> Features:
    groups = VideoGroups(
        manifest.entries,
        protocol,
        backbone.preprocessing,
        group_videos=max(1, overrides.batch_views // protocol.views),
        frame_order=overrides.frame_order,
        seed=overrides.seed,
        time_limit_seconds=overrides.time_limit_seconds,
    )
    n = len(manifest.entries)
    model, bf16 = backbone.model.to(device), use_bf16(overrides.precision, device)
    vectors, reasons = np.zeros((n, model.num_features), np.float32), [""] * n
    workers = default_workers() if overrides.workers is None else overrides.workers
    with Progress("features", n, unit="samples", shown=True) as progress:

        def keep(group: Group, waited: float) -> None:
            answers = forward_views(model, group.pixels, backbone.preprocessing, batch=overrides.batch_views, bf16=bf16)
            means = answers.view(len(group.videos), protocol.views, -1).mean(dim=1).numpy()
            for record, vector in zip(group.videos, means, strict=True):
                reasons[record.position] = record.reason
                if not record.reason:
                    if not np.isfinite(vector).all():
                        name = manifest.entries[record.position].name
                        raise UserError(f"{name}: its features are not finite; check the weights, or precision=fp32")
                    vectors[record.position] = vector
            progress.advance(len(group.videos), waited)

        deliver_groups(groups, range(len(groups)), workers, keep)
    names = tuple(entry.name for entry in manifest.entries)
    labels = np.array([entry.label for entry in manifest.entries], dtype=np.int64)
    return Features(names, labels, vectors, tuple(reasons))


def _to_arrays(features: Features) -> dict[str, NDArray[Any]]:
    return {
        "names": np.array(features.names, dtype=np.str_),
        "labels": features.labels,
        "vectors": features.vectors,
        "reasons": np.array(features.reasons, dtype=np.str_),
    }


def _from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Features:
    names, reasons = (tuple(arrays[key].tolist()) for key in ("names", "reasons"))
    return Features(names, arrays["labels"], arrays["vectors"], reasons)
