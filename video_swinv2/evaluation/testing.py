"""One test: a model file, a split and a protocol in; scores, figures and a report out, on any number of processes."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import video_swinv2
from video_swinv2.data.manifest import Manifest, class_list_hash
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.listing import ClassesBy, is_image, read_split, views_of
from video_swinv2.evaluation.metrics import Metrics, compute_metrics
from video_swinv2.evaluation.overrides import TestOverrides, override_preprocessing, parse_overrides, use_bf16
from video_swinv2.evaluation.protocols import Protocol, find_protocol
from video_swinv2.evaluation.reading import Group, VideoGroups, default_workers, deliver_groups
from video_swinv2.evaluation.report import save_strips, write_report
from video_swinv2.evaluation.scores import NO_VIEW, VIEW_FIELDS, Scores, read_arrays, save_scores, write_arrays
from video_swinv2.files import sha256, write_json
from video_swinv2.progress import Progress
from video_swinv2.training.runtime import World, start, stop
from video_swinv2.weights.store import ModelCard, Preprocessing, load_model, model_file, read_card

__all__ = ["TestOverrides", "answer_views", "make_result", "merge_shares", "parse_overrides", "run_test", "summary"]


@dataclass(frozen=True)
class _Plan:
    """Everything settled before the first video is opened."""

    model_path: Path
    card: ModelCard
    preprocessing: Preprocessing
    protocol: Protocol
    manifest: Manifest
    overrides: TestOverrides
    out: Path

    @property
    def unit(self) -> str:
        """What the samples are called."""
        return "images" if is_image(self.manifest.entries[0]) else "videos"

    @property
    def groups(self) -> VideoGroups:
        return VideoGroups(
            self.manifest.entries,
            self.protocol,
            self.preprocessing,
            group_videos=max(1, self.overrides.batch_views // self.protocol.views),
            frame_order=self.overrides.frame_order,
            seed=self.overrides.seed,
            time_limit_seconds=self.overrides.time_limit_seconds,
        )


@dataclass(frozen=True)
class _Share:
    """What one process scored: rows of `videos` (places in the list), and the times it took."""

    videos: NDArray[np.int64]
    logits: NDArray[np.float16]
    views: NDArray[np.int32]
    stand_ins: NDArray[np.int32]
    reasons: NDArray[np.str_]
    seconds: NDArray[np.float64]


def run_test(
    model_path: Path | str,
    data: Path | str,
    *,
    protocol: str,
    split: str,
    out: Path | str,
    classes_by: ClassesBy = "name",
    overrides: TestOverrides | None = None,
) -> dict[str, Any]:
    """Score every video of a split and write scores.npz, strips.npz, result.json and report.html to `out`.

    A tree of images is tested likewise, each image as a video of one frame; classes_by: see `read_split`. Returns what
    result.json holds, on every process. Started by torchrun, deepspeed or srun it shares the work; the scores do not
    depend on how many share it. Raises UsageError before any work for what cannot be right (a label the model does not
    know, an unlabelled video) and UserError where no video, or not every video, could be scored.
    """
    plan = _make_plan(
        Path(model_path), Path(data), protocol, split, classes_by, Path(out), overrides or TestOverrides()
    )
    owns_group = not torch.distributed.is_initialized()
    world = start(plan.overrides.device)
    try:
        if world.rank == 0:
            _make_shares_folder(plan.out)
        _meet(world)
        started = time.perf_counter()
        _save_share(_score_share(plan, world), _shares_folder(plan.out) / f"{world.rank:05d}.npz")
        _meet(world)
        if world.rank == 0:
            _finish(plan, world, time.perf_counter() - started)
        _meet(world)
    finally:
        if owns_group:
            stop()
    result: dict[str, Any] = json.loads((plan.out / "result.json").read_text(encoding="utf-8"))
    return result


def answer_views(model: nn.Module, pixels: Tensor, preprocessing: Preprocessing, *, batch: int, bf16: bool) -> Tensor:
    """uint8 (V, 3, [T,] H, W), moved as bytes and normalised on the device -> logits float32 (V, K), on the CPU."""
    device = next(model.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        parts = [
            model(normalise(part.to(device), preprocessing.mean, preprocessing.std)).float()
            for part in torch.split(pixels, batch)
        ]
        return torch.cat(parts).cpu()


def _make_plan(
    model_path: Path,
    data: Path,
    protocol: str,
    split: str,
    classes_by: ClassesBy,
    out: Path,
    overrides: TestOverrides,
) -> _Plan:
    """Read what is small and refuse what cannot be right."""
    chosen = find_protocol(protocol)
    card = read_card(model_path)
    if not card.classes:
        raise UsageError(f"{model_path}: holds no class names, so no label can be checked; save the model with classes")
    preprocessing = override_preprocessing(card.preprocessing, overrides)
    manifest = read_split(data, split, card.classes, classes_by)
    return _Plan(model_path, card, preprocessing, views_of(manifest, chosen, preprocessing), manifest, overrides, out)


def _load(plan: _Plan, device: torch.device) -> nn.Module:
    overrides = plan.overrides
    model = load_model(
        plan.model_path,
        window=overrides.window,
        frames=overrides.frames,
        image_size=overrides.image_size,
        attention=overrides.attention,
    )
    return model.to(device)


def _score_share(plan: _Plan, world: World) -> _Share:
    """Score every `world.size`-th group, from the rank-th on."""
    model = _load(plan, world.device)
    bf16 = use_bf16(plan.overrides.precision, world.device)
    groups = plan.groups
    mine = range(world.rank, len(groups), world.size)
    workers = default_workers() if plan.overrides.workers is None else plan.overrides.workers
    answers: dict[int, tuple[Group, NDArray[np.float16]]] = {}
    started = time.perf_counter()
    total = sum(len(groups.positions(number)) for number in mine)
    with Progress("test", total, unit=plan.unit, shown=world.rank == 0) as progress:

        def answer(group: Group, waited: float) -> None:
            logits = answer_views(model, group.pixels, plan.preprocessing, batch=plan.overrides.batch_views, bf16=bf16)
            answers[group.number] = (replace(group, pixels=torch.empty(0)), _as_stored(logits, group, plan))
            progress.advance(len(group.videos), waited)

        waited = deliver_groups(groups, mine, workers, answer)
    return _collect([answers[number] for number in mine], plan, time.perf_counter() - started, waited)


def _as_stored(logits: Tensor, group: Group, plan: _Plan) -> NDArray[np.float16]:
    """(G, V, K) float16. Raises UserError naming the video whose scores are not finite or do not fit."""
    rows: NDArray[np.float32] = logits.view(len(group.videos), plan.protocol.views, -1).numpy()
    for row, record in zip(rows, group.videos, strict=True):
        if record.reason:
            row[:] = np.nan
        elif not (np.abs(row) < np.finfo(np.float16).max).all():
            name = plan.manifest.entries[record.position].name
            raise UserError(f"{name}: the model's scores are not finite; check the weights, or set precision=fp32")
    return rows.astype(np.float16)


def _collect(
    answers: Sequence[tuple[Group, NDArray[np.float16]]], plan: _Plan, seconds: float, waited: float
) -> _Share:
    records = [record for group, _ in answers for record in group.videos]
    n_views, n_classes = plan.protocol.views, len(plan.card.classes)
    views = np.full((len(records), n_views, len(VIEW_FIELDS)), NO_VIEW, dtype=np.int32)
    for row, record in zip(views, records, strict=True):
        if not record.reason:
            row[:] = [(view.start, *view.box) for view in record.views]
    return _Share(
        videos=np.array([record.position for record in records], dtype=np.int64),
        logits=np.concatenate([np.empty((0, n_views, n_classes), np.float16), *(logits for _, logits in answers)]),
        views=views,
        stand_ins=np.array([record.stand_ins for record in records], dtype=np.int32),
        reasons=np.array([record.reason for record in records], dtype=np.str_),
        seconds=np.array([seconds, waited]),
    )


def _save_share(share: _Share, path: Path) -> None:
    write_arrays(path, {name: getattr(share, name) for name in _Share.__dataclass_fields__})


def merge_shares(shares: Sequence[_Share], n: int) -> _Share:
    """The rows of all processes in the order of the list of `n` videos; raises UserError unless each is there once."""
    videos = np.concatenate([share.videos for share in shares])
    times = np.bincount(videos, minlength=n)
    if times.size != n or (times != 1).any():
        missing, twice = int((times == 0).sum()), int((times > 1).sum())
        raise UserError(f"of {n} videos {missing} were not scored and {twice} more than once; run the test again")
    order = np.argsort(videos)
    joined = {
        name: np.concatenate([getattr(share, name) for share in shares])[order]
        for name in ("videos", "logits", "views", "stand_ins", "reasons")
    }
    return _Share(**joined, seconds=np.sum([share.seconds for share in shares], axis=0))


def _finish(plan: _Plan, world: World, seconds: float) -> None:
    """On the first process: join the shares, then write scores, strips, figures and report."""
    folder = _shares_folder(plan.out)
    files = [folder / f"{rank:05d}.npz" for rank in range(world.size)]
    merged = merge_shares(
        [_Share(**read_arrays(file, "`out` must be a folder that all processes share")) for file in files],
        len(plan.manifest.entries),
    )
    metadata = _metadata(plan, world) | {
        "seconds": round(seconds, 3),
        "decode_wait_share": round(float(merged.seconds[1] / max(merged.seconds[0], 1e-9)), 4),
        "videos_with_damaged_frames": int((merged.stand_ins > 0).sum()),
    }
    scores = Scores(
        paths=tuple(entry.name for entry in plan.manifest.entries),
        labels=np.array([entry.label for entry in plan.manifest.entries], dtype=np.int64),
        logits=merged.logits,
        views=merged.views,
        reasons=tuple(merged.reasons.tolist()),
        classes=plan.card.classes,
        metadata=metadata,
    )
    save_scores(scores, plan.out / "scores.npz")
    for name in ("strips.npz", "result.json", "report.html"):  # of an earlier test, if the figures cannot be had
        (plan.out / name).unlink(missing_ok=True)
    metrics = compute_metrics(scores, average=plan.protocol.average, seed=plan.overrides.seed)
    save_strips(plan.out, scores, plan.groups)
    result = make_result(metrics, metadata)
    write_json(plan.out / "result.json", result)
    write_report(plan.out)
    shutil.rmtree(folder)


def make_result(metrics: Metrics, metadata: dict[str, Any]) -> dict[str, Any]:
    """What result.json holds: the figures, fractions in 0..1, and the record of the test."""
    return {
        **metrics.figures(),
        "per_class": [asdict(row) for row in metrics.per_class],
        "videos": {"listed": metrics.listed, "scored": metrics.scored, "failed": metrics.failed},
        **metadata,
    }


def _metadata(plan: _Plan, world: World) -> dict[str, Any]:
    """What the scores are of: enough to repeat the test, or to refuse a comparison."""
    preprocessing, overrides = plan.preprocessing, plan.overrides
    return {
        "unit": plan.unit,
        "protocol": plan.protocol.name,
        "protocol_source": plan.protocol.source,
        "average": plan.protocol.average,
        "views": plan.protocol.views,
        "frames": preprocessing.frames,
        "frame_stride": preprocessing.frame_stride,
        "image_size": list(preprocessing.image_size),
        "frame_order": overrides.frame_order,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "model": {
            "path": str(plan.model_path),
            "sha256": sha256(model_file(plan.model_path)),
            "architecture": plan.card.architecture,
            "provenance": plan.card.provenance,
        },
        "overrides": {key: value for key, value in asdict(overrides).items() if value is not None},
        "classes_sha256": class_list_hash(plan.card.classes),
        "data": str(plan.manifest.root),
        "split": plan.manifest.split,
        "data_fingerprint": plan.manifest.fingerprint,
        "lost_in_preparation": plan.manifest.lost,
        "decoder": f"PyAV {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}",
        "versions": {
            "video_swinv2": video_swinv2.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": _device_name(world.device),
        "precision": "bf16" if use_bf16(overrides.precision, world.device) else "fp32",
        "processes": world.size,
        "seed": overrides.seed,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def _meet(world: World) -> None:
    if world.size > 1:
        torch.distributed.barrier()


def _shares_folder(out: Path) -> Path:
    return out / "shares"


def _make_shares_folder(out: Path) -> None:
    """An empty folder for the shares: what an interrupted test left there must not be merged."""
    shutil.rmtree(_shares_folder(out), ignore_errors=True)
    try:
        _shares_folder(out).mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made a folder ({error.strerror}); choose another --out") from error


def summary(result: dict[str, Any], out: Path | str) -> str:
    """The result in a few lines for people."""
    low, high = (100 * bound for bound in result["top1_interval"])
    videos = result["videos"]
    lines = [
        f"top-1 {100 * result['top1']:.2f} % (95 % interval {low:.2f} to {high:.2f}), "
        f"top-5 {100 * result['top5']:.2f} %, mean class accuracy {100 * result['mean_class_accuracy']:.2f} %",
        f"{videos['scored']} of {videos['listed']} {result['unit']} scored, {result['protocol']}, {result['views']} "
        f"view(s) each, data {result['data_fingerprint'][:12]}, {result['seconds']:.1f} seconds",
    ]
    if videos["failed"]:
        low, high = (100 * bound for bound in result["top1_bounds"])
        lines.append(f"{videos['failed']} failed: top-1 of all listed lies between {low:.2f} and {high:.2f} %")
    if result["frame_order"] != "in-order":
        lines.append(f"frames were {result['frame_order']}: no accuracy to quote")
    return "\n".join([*lines, f"report: {Path(out) / 'report.html'}"])
