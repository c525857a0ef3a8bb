"""Frozen features: one vector per video or image from a model without its head, cached on disk.

Letters: N samples, V views of each, G samples in a group, C channels of the last stage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from video_swinv2.data.manifest import Manifest
from video_swinv2.distributed.agreement import require_agreement
from video_swinv2.distributed.collectives import all_gather_objects, gather_shares
from video_swinv2.distributed.devices import report_missing_bf16, use_bf16
from video_swinv2.distributed.world import World, alone
from video_swinv2.errors import UserError
from video_swinv2.evaluation.forward import forward_views
from video_swinv2.evaluation.overrides import TestOverrides, override_preprocessing
from video_swinv2.evaluation.protocols import Protocol
from video_swinv2.evaluation.reading import Group, VideoGroups, default_workers, deliver_groups
from video_swinv2.files import sha256
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.progress import Progress
from video_swinv2.report.scores import read_arrays, require_rows, write_arrays
from video_swinv2.weights.formats import read_checkpoint
from video_swinv2.weights.pretrained import RequestedSizes, open_model, preprocessing_of
from video_swinv2.weights.store import Preprocessing, require_rgb


@dataclass(frozen=True)
class Backbone:
    """A model without its head, and everything its features depend on besides the data."""

    model: SwinV2
    preprocessing: Preprocessing
    record: dict[str, Any] = field(default_factory=dict)
    """Identifies the model, as plain JSON. Backbones with equal records give equal features for the same data."""


@dataclass(frozen=True)
class Features:
    """The features of a split.

    names: N names as listed. labels: (N,) int64, indices into the classes. vectors: (N, C) float32, zero for files that
    could not be read. reasons: N texts that say why a file could not be read, empty for files that could.
    """

    names: tuple[str, ...]
    labels: NDArray[np.int64]
    vectors: NDArray[np.float32]
    reasons: tuple[str, ...]

    @property
    def read(self) -> NDArray[np.bool_]:
        """(N,) bool, whether each file could be read."""
        return np.array([not reason for reason in self.reasons], dtype=bool)


def open_backbone(path: Path, overrides: TestOverrides) -> Backbone:
    """Open any known checkpoint, SimMIM's included, as a model without its head, at the sizes in `overrides`.

    Raises UserError for a file that cannot be read or whose tensors do not fit a SwinV2, and UsageError for sizes that
    do not fit the weights or that neither the file nor `overrides` gives.
    """
    checkpoint = read_checkpoint(path)
    model, _ = open_model(checkpoint, RequestedSizes(overrides.frames, overrides.image_size, None, overrides.window))
    require_rgb(model.architecture(), path)
    if model.features_only:
        raise UserError(f"{path}: a features_only model has no final norm; save the model without features_only")
    # Without a head the model returns the mean over all tokens after the final norm.
    model.reset_classifier(0)
    for block in model.blocks():
        block.attn.attention = overrides.attention or block.attn.attention
    preprocessing = override_preprocessing(preprocessing_of(model, checkpoint), overrides)
    # A checkpoint may consist of several files; sorting makes the digest independent of their order. The digest of a
    # single file is its plain SHA-256, the one that sha256sum prints.
    digests = sorted(sha256(file) for file in checkpoint.source.files)
    record = {
        "path": str(path),
        "sha256": digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        "layout": checkpoint.layout,
        "architecture": model.architecture(),
        "weights": "as in the file",
    }
    return Backbone(model, preprocessing, record)


def with_random_weights(backbone: Backbone, seed: int) -> Backbone:
    """The same architecture with freshly initialised weights: the baseline of a probe.

    In a freshly initialised SwinV2 every residual branch contributes zero (res-post-norm with a zero scale), so these
    features are random projections in the patch embedding and merging layers.
    """
    arguments: dict[str, Any] = backbone.model.architecture()
    # Weights are initialised on the CPU, so only the CPU's generator has to be restored afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SwinV2(**arguments).eval()
    return Backbone(
        model, backbone.preprocessing, backbone.record | {"sha256": None, "weights": f"random, seed {seed}"}
    )


def extract_features(
    backbone: Backbone,
    manifest: Manifest,
    protocol: Protocol,
    overrides: TestOverrides,
    cache: Path | None,
    world: World | None = None,
) -> Features:
    """The features of a split, read from the folder `cache` if an earlier call stored them there, else computed.

    Each view of `protocol` gives the mean over all tokens after the final norm; the vector of a sample is the mean over
    its views. The processes of `world` share the work, and all return the features of all samples. Raises UserError if
    features are not finite.
    """
    world = world or alone(overrides.device)
    # Everything that the vectors depend on. Its hash names the cached file. The file repeats the record in full, since
    # 16 hexadecimal digits of a hash may collide. The model's path is left out: a moved file has the same features.
    record = {
        "backbone": {key: value for key, value in backbone.record.items() if key != "path"},
        "preprocessing": asdict(backbone.preprocessing),
        "protocol": protocol.name,
        "frame_order": [overrides.frame_order, overrides.seed],
        "bf16": use_bf16(overrides.precision, world.device),
        "data_fingerprint": manifest.fingerprint,
        "split": manifest.split,
        "samples": len(manifest.entries),
        "decode_seconds": overrides.time_limit_seconds,
        "max_pixels": overrides.max_pixels,
    }
    require_agreement(world, record)
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    cached = cache and cache / f"features-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    known: Features | None = None
    # Rank 0 looks for the file, because on a network file system the others may not see it yet.
    if world.rank == 0 and cached and cached.is_file():
        arrays = read_arrays(cached, "remove it")
        if str(arrays.get("record")) == text:
            known = _from_arrays(arrays, cached)
    if (known := all_gather_objects(world, known)[0]) is not None:
        return known
    features = _compute_features(backbone, manifest, protocol, overrides, world)
    if cached and world.rank == 0:
        write_arrays(cached, _to_arrays(features) | {"record": np.array(text)})
    return features


def _compute_features(
    backbone: Backbone, manifest: Manifest, protocol: Protocol, overrides: TestOverrides, world: World
) -> Features:
    # A group holds as many whole videos as fit in one forward pass of `batch_views` views, and at least one.
    groups = VideoGroups(
        manifest.entries,
        protocol,
        backbone.preprocessing,
        group_videos=max(1, overrides.batch_views // protocol.views),
        frame_order=overrides.frame_order,
        seed=overrides.seed,
        time_limit_seconds=overrides.time_limit_seconds,
        max_pixels=overrides.max_pixels,
    )
    n = len(manifest.entries)
    model, bf16 = backbone.model.to(world.device), use_bf16(overrides.precision, world.device)
    if world.rank == 0:
        report_missing_bf16(overrides.precision, world.device)
    # Files that cannot be read keep a zero vector and get a reason; `Features.read` tells them apart.
    vectors, reasons = np.zeros((n, model.num_features), np.float32), [""] * n
    mine = range(len(groups))[world.rank :: world.size]
    workers = default_workers() if overrides.workers is None else overrides.workers
    total = sum(len(groups.positions(number)) for number in mine)
    with Progress("features", total, unit="samples", shown=world.rank == 0) as progress:

        def store(group: Group, waited: float) -> None:
            scored = forward_views(model, group.pixels, backbone.preprocessing, batch=overrides.batch_views, bf16=bf16)
            # (G * V, C) -> (G, V, C) -> (G, C): the mean over the views of each sample.
            means = scored.logits.view(len(group.videos), protocol.views, -1).mean(dim=1).numpy()
            for record, vector in zip(group.videos, means, strict=True):
                # By position: groups may arrive out of order, and one may be delivered twice after a worker died.
                reasons[record.position] = record.reason
                if not record.reason:
                    if not np.isfinite(vector).all():
                        name = manifest.entries[record.position].name
                        raise UserError(f"{name}: features are not finite; check the weights, or set precision=fp32")
                    vectors[record.position] = vector
            progress.advance(len(group.videos), waited)

        deliver_groups(groups, mine, workers, store)
    for positions, theirs, their_reasons in gather_shares(world, _share(groups, mine, vectors, reasons)):
        vectors[positions] = theirs
        for position, reason in zip(positions, their_reasons, strict=True):
            reasons[position] = reason
    names = tuple(entry.name for entry in manifest.entries)
    labels = np.array([entry.label for entry in manifest.entries], dtype=np.int64)
    return Features(names, labels, vectors, tuple(reasons))


def _share(
    groups: VideoGroups, mine: Sequence[int], vectors: NDArray[np.float32], reasons: Sequence[str]
) -> tuple[list[int], NDArray[np.float32], list[str]]:
    """What this process has computed: the positions of its samples, and their vectors and reasons."""
    positions = [position for number in mine for position in groups.positions(number)]
    return positions, vectors[positions], [reasons[position] for position in positions]


def _to_arrays(features: Features) -> dict[str, NDArray[Any]]:
    return {
        "names": np.array(features.names, dtype=np.str_),
        "labels": features.labels,
        "vectors": features.vectors,
        "reasons": np.array(features.reasons, dtype=np.str_),
    }


def _from_arrays(arrays: Mapping[str, NDArray[Any]], path: Path) -> Features:
    types = {"names": ("U", 1), "labels": ("i", 1), "vectors": ("f", 2), "reasons": ("U", 1)}
    require_rows(arrays, types, str(path), "remove it")
    names, reasons = (tuple(arrays[key].tolist()) for key in ("names", "reasons"))
    return Features(names, arrays["labels"], arrays["vectors"], reasons)
