"""One test: a model file, a split and protocols in; scores, figures and reports out, on any number of processes.

G videos of a group, V views of each by all protocols, K classes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from video_swinv2.data.transforms import normalise
from video_swinv2.distributed.collectives import all_gather_objects
from video_swinv2.distributed.devices import use_bf16
from video_swinv2.distributed.world import World, join_world, leave_world
from video_swinv2.errors import UserError
from video_swinv2.evaluation.overrides import TestOverrides, parse_overrides
from video_swinv2.evaluation.parts import PartFolder, ScoredVideos
from video_swinv2.evaluation.planning import TestPlan, plan_test, record_protocol, record_test, scores_identity
from video_swinv2.evaluation.protocols import find_protocol
from video_swinv2.evaluation.reading import Group, VideoRecord, default_workers, deliver_groups
from video_swinv2.evaluation.splits import ClassesBy
from video_swinv2.files import lock_file
from video_swinv2.progress import Progress
from video_swinv2.report.markdown import accuracy_line
from video_swinv2.report.metrics import video_probabilities
from video_swinv2.report.mistakes import MOST_MISTAKES, film_strip, surest_mistakes
from video_swinv2.report.page import write_report
from video_swinv2.report.scores import NO_VIEW, VIEW_FIELDS, Scores, save_scores, write_arrays
from video_swinv2.weights.store import Preprocessing, load_model

__all__ = ["TestOverrides", "forward_views", "parse_overrides", "run_test", "run_tests", "summary"]
_REPORTED = ("strips.npz", "results.json", "report.html", "report.md")


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
    """`run_tests` with one protocol; returns what its results.json holds."""
    results = run_tests(
        model_path, data, protocols=protocol, split=split, out=out, classes_by=classes_by, overrides=overrides
    )
    return next(iter(results.values()))


def run_tests(
    model_path: Path | str,
    data: Path | str,
    *,
    protocols: str,
    split: str,
    out: Path | str,
    classes_by: ClassesBy = "name",
    overrides: TestOverrides | None = None,
) -> dict[str, dict[str, Any]]:
    """Score every video of a split and write scores.npz, strips.npz, results.json, report.md and report.html to `out`.

    protocols: names joined by commas, see `find_protocol`; several share one decode of each video, and each gets a
    folder in `out`. A tree of images is tested likewise, each image as a video of one frame; classes_by: see
    `read_labelled_split`. Returns what each protocol's results.json holds, on every process. Started by torchrun, deepspeed or
    srun it shares the work. Killed at any time and started again it goes on from the shards that were finished, on as
    many processes as there are then; the scores depend on neither. Raises UsageError before any work for what cannot be
    right (a label the model does not know, an unlabelled video) and UserError where no video, or not every video, could
    be scored.
    """
    chosen = overrides or TestOverrides()
    plan = plan_test(
        Path(model_path),
        Path(data),
        protocols=protocols,
        split=split,
        classes_by=classes_by,
        out=Path(out),
        overrides=chosen,
    )
    owns_group = not torch.distributed.is_initialized()
    world = join_world(chosen.device)
    try:
        with _alone(plan.out, world):
            record = all_gather_objects(world, record_test(plan, world) if world.rank == 0 else {})[0]
            shards = PartFolder(plan.out, scores_identity(plan, record), len(plan.groups))
            pending = all_gather_objects(world, shards.open() if world.rank == 0 else [])[0]
            record["shards_finished_before"] = shards.number - len(pending)
            if world.rank == 0 and len(pending) < shards.number:
                print(f"test: {shards.number - len(pending)} of {shards.number} parts are done", file=sys.stderr)
            started = time.perf_counter()
            _score(plan, world, shards, pending[world.rank :: world.size])
            _meet(world)
            if world.rank == 0:
                _finish(plan, shards, record | {"seconds": round(time.perf_counter() - started, 3)})
            _meet(world)
    finally:
        if owns_group:
            leave_world()
    return {
        protocol.name: json.loads((plan.folder(protocol) / "results.json").read_text(encoding="utf-8"))
        for protocol in plan.protocols
    }


def forward_views(model: nn.Module, pixels: Tensor, preprocessing: Preprocessing, *, batch: int, bf16: bool) -> Tensor:
    """uint8 (V, 3, [T,] H, W), moved as bytes and normalised on the device -> logits float32 (V, K), on the CPU."""
    device = next(model.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        parts = [
            model(normalise(part.to(device), preprocessing.mean, preprocessing.std)).float()
            for part in torch.split(pixels, batch)
        ]
        return torch.cat(parts).cpu()


@contextmanager
def _alone(out: Path, world: World) -> Iterator[None]:
    """No other test writes to `out` meanwhile; UserError if one does, or if `out` cannot be made."""
    if world.rank:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made a folder ({error.strerror}); choose another --out") from error
    with lock_file(out / ".lock", f"{out}: another test is writing here; wait for it or choose another --out"):
        yield


def _load(plan: TestPlan, device: torch.device) -> nn.Module:
    overrides = plan.overrides
    model = load_model(
        plan.model_path,
        window=overrides.window,
        frames=overrides.frames,
        image_size=overrides.image_size,
        attention=overrides.attention,
    )
    return model.to(device)


def _score(plan: TestPlan, world: World, shards: PartFolder, mine: Sequence[int]) -> None:
    """Score the shards `mine`, one after the other, while the next videos are read, and keep each when it is whole."""
    if not mine:
        return
    model, groups = _load(plan, world.device), plan.groups
    bf16 = use_bf16(plan.overrides.precision, world.device)
    workers = default_workers() if plan.overrides.workers is None else plan.overrides.workers
    numbers = [number for shard in mine for number in shards.groups(shard)]
    unfinished, kept = _Unfinished(plan), set[int]()
    total = sum(len(groups.positions(number)) for number in numbers)
    with Progress("test", total, unit=plan.unit, shown=world.rank == 0) as progress:

        def answer(group: Group, waited: float) -> None:
            # It may be broken off anywhere by the death of a reading process, and is then called again.
            shard = shards.shard_of(group.number)
            if shard in kept:
                return
            logits = forward_views(model, group.pixels, plan.preprocessing, batch=plan.overrides.batch_views, bf16=bf16)
            unfinished.add(group, _as_stored(logits, group, plan))
            if group.number == shards.groups(shard)[-1]:  # groups come in the order asked for
                shards.save(shard, unfinished.share(shards.groups(shard), waited))
                kept.add(shard)
                unfinished.forget(shards.groups(shard))
            progress.advance(len(group.videos), waited)

        deliver_groups(groups, numbers, workers, answer)


def _as_stored(logits: Tensor, group: Group, plan: TestPlan) -> NDArray[np.float16]:
    """(G, V, K) float16. Raises UserError naming the video whose scores are not finite or do not fit."""
    rows: NDArray[np.float32] = logits.view(len(group.videos), -1, logits.shape[1]).numpy()
    for row, record in zip(rows, group.videos, strict=True):
        if record.reason:
            row[:] = np.nan
        elif not (np.abs(row) < np.finfo(np.float16).max).all():
            name = plan.manifest.entries[record.position].name
            raise UserError(f"{name}: the model's scores are not finite; check the weights, or set precision=fp32")
    return rows.astype(np.float16)


class _Unfinished:
    """The groups of the shard in work, and the film strips of its surest mistakes, made while the pixels are there."""

    def __init__(self, plan: TestPlan) -> None:
        self._plan = plan
        self._groups: dict[int, tuple[tuple[VideoRecord, ...], NDArray[np.float16], dict[tuple[int, int], bytes]]] = {}
        # Probabilities of this process's surest mistakes by protocol and place: what is less sure is never shown.
        self._surest: list[dict[tuple[int, int], float]] = [{} for _ in plan.protocols]
        self._started, self._waited = time.perf_counter(), 0.0

    def add(self, group: Group, logits: NDArray[np.float16]) -> None:
        """Take a group whose (G, V, K) logits are known; taking it twice is taking it once."""
        views = logits.shape[1]
        strips: dict[tuple[int, int], bytes] = {}
        for (protocol, columns), surest in zip(self._plan.columns(), self._surest, strict=True):
            scores = self._scores_of(group, logits[:, columns])
            for mistake in surest_mistakes(scores, video_probabilities(scores, protocol.average)):
                view = columns.start + mistake.view
                place = (group.videos[mistake.position].position, view)
                surest[place] = mistake.answer_probability
                if len(surest) > MOST_MISTAKES:
                    del surest[min(surest, key=lambda other: (surest[other], -other[0]))]  # of equals the later one
                if place in surest:
                    strips[place] = film_strip(group.pixels[mistake.position * views + view])
        self._groups[group.number] = group.videos, logits, strips

    def share(self, numbers: Sequence[int], waited: float) -> ScoredVideos:
        """The groups `numbers`; `waited` are the seconds spent waiting for the reading so far, in all."""
        groups = [self._groups[number] for number in numbers]
        records = [record for videos, _, _ in groups for record in videos]
        strips = {place: strip for _, _, strips in groups for place, strip in strips.items()}
        logits, now = np.concatenate([logits for _, logits, _ in groups]), time.perf_counter()
        share = ScoredVideos(
            videos=np.array([record.position for record in records], dtype=np.int64),
            logits=logits,
            views=_places(records, logits.shape[1]),
            stand_ins=np.array([record.stand_ins for record in records], dtype=np.int32),
            reasons=np.array([record.reason for record in records], dtype=np.str_),
            seconds=np.array([now - self._started, waited - self._waited]),
            strip_places=np.array(list(strips), dtype=np.int64).reshape(-1, 2),
            strip_bytes=np.array([len(strip) for strip in strips.values()], dtype=np.int64),
            strips=np.frombuffer(b"".join(strips.values()), dtype=np.uint8),
        )
        self._started, self._waited = now, waited
        return share

    def forget(self, numbers: Sequence[int]) -> None:
        """Groups that are kept elsewhere."""
        for number in numbers:
            self._groups.pop(number, None)

    def _scores_of(self, group: Group, logits: NDArray[np.float16]) -> Scores:
        entries = [self._plan.manifest.entries[record.position] for record in group.videos]
        return Scores(
            paths=tuple(entry.name for entry in entries),
            labels=np.array([entry.label for entry in entries], dtype=np.int64),
            logits=logits,
            views=np.zeros((*logits.shape[:2], len(VIEW_FIELDS)), dtype=np.int32),
            reasons=tuple(record.reason for record in group.videos),
            classes=self._plan.card.classes,
            metadata={},
        )


def _places(records: Sequence[VideoRecord], n_views: int) -> NDArray[np.int32]:
    """(N, V, 5) where each view was, columns as VIEW_FIELDS."""
    views = np.full((len(records), n_views, len(VIEW_FIELDS)), NO_VIEW, dtype=np.int32)
    for row, record in zip(views, records, strict=True):
        if not record.reason:
            row[:] = [(view.start, *view.box) for view in record.views]
    return views


def _finish(plan: TestPlan, shards: PartFolder, record: dict[str, Any]) -> None:
    """On the first process: join the shards, then write scores, strips, figures and report of each protocol."""
    entries = plan.manifest.entries
    joined = shards.join(len(entries))
    if not (joined.reasons == "").any():
        shards.remove()  # whatever is mended, all of it has to be read again
    spent, waited = joined.seconds.tolist()
    record = record | {
        "process_seconds": round(spent, 3),
        "decode_wait_share": round(waited / max(spent, 1e-9), 4),
        "videos_with_damaged_frames": int((joined.stand_ins > 0).sum()),
    }
    for protocol, columns in plan.columns():
        scores = Scores(
            paths=tuple(entry.name for entry in entries),
            labels=np.array([entry.label for entry in entries], dtype=np.int64),
            logits=joined.logits[:, columns],
            views=joined.views[:, columns],
            reasons=tuple(joined.reasons.tolist()),
            classes=plan.card.classes,
            metadata=record | record_protocol(plan, protocol),
        )
        pictures = {(video, view - columns.start): jpeg for (video, view), jpeg in joined.pictures().items()}
        _write_results(plan.folder(protocol), scores, pictures)
    shards.remove()


def _write_results(out: Path, scores: Scores, pictures: dict[tuple[int, int], NDArray[np.uint8]]) -> None:
    out.mkdir(exist_ok=True)
    save_scores(scores, out / "scores.npz")
    for name in _REPORTED:  # of an earlier test, if the figures cannot be had
        (out / name).unlink(missing_ok=True)
    shown = surest_mistakes(scores, video_probabilities(scores, scores.metadata["average"]))
    places = [(mistake.position, mistake.view) for mistake in shown]
    strips = [(place[0], pictures[place]) for place in places if place in pictures]
    positions = {"positions": np.array([position for position, _ in strips], dtype=np.int64)}
    write_arrays(out / "strips.npz", positions | {f"jpeg_{i:03d}": jpeg for i, (_, jpeg) in enumerate(strips)})
    write_report(out)


def summary(results: dict[str, dict[str, Any]], out: Path | str) -> str:
    """The results by protocol in a few lines for people."""
    folders = {name: Path(out) if len(results) == 1 else Path(out) / find_protocol(name).folder for name in results}
    return "\n".join(line for name, result in results.items() for line in _lines(result, folders[name]))


def _lines(result: dict[str, Any], out: Path) -> list[str]:
    videos = result["videos"]
    keys = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class accuracy"}
    lines = [accuracy_line(result, key, words) for key, words in keys.items()]
    lines.append(
        f"{videos['scored']} of {videos['listed']} {result['unit']} scored, {result['views']} view(s) each, "
        f"{result['seconds']:.1f} seconds"
    )
    if videos["failed"]:
        low, high = (100 * bound for bound in result["top1_bounds"])
        lines.append(f"{videos['failed']} failed: top-1 of all listed lies between {low:.2f} and {high:.2f} %")
    if result["frame_order"] != "in-order":
        lines.append(f"frames were {result['frame_order']}: no accuracy to quote")
    return [*lines, f"report: {out / 'report.html'}"]


def _meet(world: World) -> None:
    if world.size > 1:
        torch.distributed.barrier()
