"""What a test will do, decided before the first video is opened, and the record of it that goes into the results.

How every video is scored exactly once, on any number of processes: the list of videos is cut into groups of a few full
batches each (`TestPlan.groups`), and consecutive groups form parts (`parts.PartFolder`). Of the parts not yet on disk,
rank r of w takes number r, r + w, r + 2w, ... (`testing.py`). Groups and parts depend only on the plan, so any number
of processes, before and after a kill, works on the same parts. Joining them checks that each video occurs once.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

import video_swinv2
from video_swinv2.data.manifest import Manifest, class_list_hash
from video_swinv2.distributed.devices import use_bf16
from video_swinv2.distributed.world import World
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.overrides import TestOverrides, override_preprocessing, refuse_detector_keys
from video_swinv2.evaluation.protocols import Protocol, find_protocols
from video_swinv2.evaluation.reading import VideoGroups, videos_per_group
from video_swinv2.evaluation.splits import ClassesBy, has_only_images, protocol_for_split, read_labelled_split
from video_swinv2.evaluation.views import clip_frames_and_stride
from video_swinv2.files import sha256
from video_swinv2.report.scores import load_test
from video_swinv2.report.training_run import flatten
from video_swinv2.weights.store import ModelCard, Preprocessing, model_file, read_card, require_rgb

SETTINGS_WITHOUT_EFFECT = frozenset(("workers", "device", "meeting_seconds", "silence_seconds"))
"""Settings that scores do not depend on. The device that "auto" or "cuda" stands for is in the record."""


@dataclass(frozen=True)
class TestPlan:
    """Everything that is decided before a test starts: model, videos, views of them, settings, and where results go.

    `card` and `preprocessing` are those of the model file; the overrides are already applied to `preprocessing`.
    """

    __test__ = False  # pytest would collect a class called Test*

    model_path: Path
    card: ModelCard
    preprocessing: Preprocessing
    protocols: tuple[Protocol, ...]
    manifest: Manifest
    overrides: TestOverrides
    out: Path

    @cached_property  # for a list, every image is looked into
    def unit(self) -> str:
        """What the samples are called in messages and reports."""
        return "images" if has_only_images(self.manifest) else "videos"

    @property
    def groups(self) -> VideoGroups:
        """The videos in groups that are read and scored together, each of about as many videos as fill whole batches.

        A group always holds the same videos, so every video is always in the same batch with the same others. This
        makes scores equal to the bit: the order in which a matrix product is summed may depend on the batch.
        """
        views = sum(protocol.views for protocol in self.protocols)
        return VideoGroups(
            self.manifest.entries,
            self.protocols,
            self.preprocessing,
            group_videos=videos_per_group(views, self.overrides.batch_views),
            frame_order=self.overrides.frame_order,
            seed=self.overrides.seed,
            time_limit_seconds=self.overrides.time_limit_seconds,
            max_pixels=self.overrides.max_pixels,
        )

    def columns(self) -> Iterator[tuple[Protocol, slice]]:
        """Each protocol with the slice that its views occupy on the axis of all views of a video."""
        first = 0
        for protocol in self.protocols:
            yield protocol, slice(first, first + protocol.views)
            first += protocol.views

    def folder(self, protocol: Protocol) -> Path:
        """The folder for the results of a protocol: `out` itself if there is no other protocol."""
        return self.out if len(self.protocols) == 1 else self.out / protocol.folder


def plan_test(
    model_path: Path,
    data: Path,
    *,
    protocols: str,
    split: str,
    classes_by: ClassesBy,
    out: Path,
    overrides: TestOverrides,
) -> TestPlan:
    """Read the model card and the list of videos and check that they fit each other; opens no video.

    `protocols` are names joined by commas. Raises UsageError for a label, split, protocol or setting that does not fit.
    """
    refuse_detector_keys(overrides, "a classifier")
    chosen = find_protocols(protocols)
    card = read_card(model_path)
    require_rgb(card.architecture, model_path)
    if not card.classes:
        raise UsageError(
            f"{model_path}: contains no class names to check labels against; save the model with its classes"
        )
    # Labels are mapped to the model's class order by name, so data sets may list the same classes in another order.
    preprocessing = override_preprocessing(card.preprocessing, overrides)
    manifest = read_labelled_split(data, split, card.classes, classes_by)
    applied = tuple(protocol_for_split(manifest, protocol, preprocessing) for protocol in chosen)
    return TestPlan(model_path, card, preprocessing, applied, manifest, overrides, out)


def record_test(plan: TestPlan, world: World) -> dict[str, Any]:
    """The record that all protocols share: what it takes to repeat the test or to compare it fairly. Plain JSON."""
    preprocessing, overrides = plan.preprocessing, plan.overrides
    origins = read_origins(plan.manifest)
    # Origins are one name per video, so they are left out where none is known.
    return ({"origins": origins} if any(origins) else {}) | {
        "unit": plan.unit,
        "frames": preprocessing.frames,
        "image_size": list(preprocessing.image_size),
        "frame_order": overrides.frame_order,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "model": {
            "path": str(plan.model_path),
            # The weights themselves: a file of the same name may hold others tomorrow.
            "sha256": sha256(model_file(plan.model_path)),
            "architecture": plan.card.architecture,
            "provenance": plan.card.provenance,
        },
        "overrides": {key: value for key, value in asdict(overrides).items() if value is not None},
        "classes_sha256": class_list_hash(plan.card.classes),
        "data": str(plan.manifest.root),
        "split": plan.manifest.split,
        "data_fingerprint": plan.manifest.fingerprint,
        "lost_in_preparation": plan.manifest.failed_in_preparation,
        "decoder": f"PyAV {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}",
        **record_machine(overrides, world),
    }


def record_machine(overrides: TestOverrides, world: World) -> dict[str, Any]:
    """The part of a record that says what a test was computed with, whatever the task. Plain JSON."""
    return {
        "versions": {
            "video_swinv2": video_swinv2.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _processor(),
        "precision": "bf16" if use_bf16(overrides.precision, world.device) else "fp32",
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "seed": overrides.seed,
    }


def record_protocol(plan: TestPlan, protocol: Protocol) -> dict[str, Any]:
    """The part of the record that belongs to one protocol."""
    frames, stride = clip_frames_and_stride(plan.preprocessing)
    # A stride in the protocol takes precedence over the model's.
    stride = protocol.stride or stride
    return {
        "protocol": protocol.name,
        "protocol_source": protocol.source,
        "protocol_numbers": protocol.numbers(frames, stride, plan.preprocessing.image_size),
        "average": protocol.average,
        "views": protocol.views,
        "frame_stride": stride,
        "tested_together": [other.name for other in plan.protocols],
    }


def other_test_in(plan: TestPlan, record: dict[str, Any]) -> str:
    """The fault, in one line, if a folder for results holds those of a different test; "" if none does.

    The same test may have been run by another version or on another device: it is run again.
    """
    for protocol in plan.protocols:
        path = plan.folder(protocol) / "scores.npz"
        if not path.exists():
            continue
        try:
            earlier = load_test(path)
        except UserError as error:
            return f"{path}: is in the way and cannot be read ({error}); choose another --out, or remove the file"
        mine, theirs = _question(record | record_protocol(plan, protocol)), _question(earlier.metadata)
        # Settings that only one of two versions knows cannot be compared. A test that scored nothing is no loss.
        differing = dict.fromkeys(key.split(".")[0] for key in mine.keys() & theirs.keys() if mine[key] != theirs[key])
        if differing and earlier.scored.any():
            return (
                f"{path}: holds the result of another test, of different {', '.join(sorted(differing))}; "
                "choose another --out, or remove the folder if you no longer need that result"
            )
    return ""


def _question(record: dict[str, Any]) -> dict[str, str]:
    """What a test asks, by dotted key: which model, data, split, views and settings. The answer is its scores."""
    asked = {
        "model": record["model"].get("sha256"),
        "data": record["data_fingerprint"],
        "split": record["split"],
        "protocol": record.get("protocol_numbers"),
        "settings": {
            key: value for key, value in record.get("overrides", {}).items() if key not in SETTINGS_WITHOUT_EFFECT
        },
    }
    return dict(flatten(asked))


def scores_identity(plan: TestPlan, record: dict[str, Any]) -> dict[str, Any]:
    """Everything that the scores depend on, to the bit: only a test with an equal identity reuses finished parts.

    The numbers of processes, threads and reading workers are not part of it, nor are the paths of model and data.
    """
    kept = ("precision", "decoder", "versions", "device", "data_fingerprint", "classes_sha256", "split")
    return {key: record[key] for key in kept} | {
        "model": record["model"]["sha256"],
        "overrides": {key: value for key, value in record["overrides"].items() if key not in SETTINGS_WITHOUT_EFFECT},
        "protocols": [record_protocol(plan, protocol)["protocol_numbers"] for protocol in plan.protocols],
    }


def read_origins(manifest: Manifest) -> list[str]:
    """The group of each video of the split, such as the recording it was cut from; '' if unknown.

    Videos of one group are not independent samples, so confidence intervals take groups as units.
    """
    return [entry.group for entry in manifest.entries]


def _processor() -> str:
    """The CPU's architecture, such as "CPU (x86_64)"; its model name is not portably available."""
    return f"CPU ({platform.machine()})"
