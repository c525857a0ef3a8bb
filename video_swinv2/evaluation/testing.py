"""The multi-view test: scores every video of a split and writes the results, on any number of processes.

Letters: G videos in a group, V views of each (of all protocols), T frames, H W pixels of the crop, K classes, C feature
channels.

The course of a test: `plan_test` reads the model card and the list of videos. Each process scores its share of the
missing parts (`_score_parts`), reading in worker processes, and saves each part as soon as it is complete. When all are
on disk, rank 0 joins them, writes scores.npz and the reports of each protocol, and deletes the parts
(`_write_all_results`). A test that is killed at any time loses only unfinished parts: started again with the same
arguments, it computes just those.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from video_swinv2.data.sources import refuse_inside_tree
from video_swinv2.distributed.agreement import exclusive_folder, require_agreement
from video_swinv2.distributed.collectives import all_gather_objects, gather_shares
from video_swinv2.distributed.devices import report_missing_bf16, use_bf16
from video_swinv2.distributed.world import World
from video_swinv2.errors import UsageError, UserError
from video_swinv2.escaping import terminal_lines
from video_swinv2.evaluation.forward import forward_views
from video_swinv2.evaluation.overrides import TestOverrides
from video_swinv2.evaluation.parts import PartBuilder, PartFolder
from video_swinv2.evaluation.planning import (
    TestPlan,
    other_test_in,
    plan_test,
    record_protocol,
    record_test,
    scores_identity,
)
from video_swinv2.evaluation.protocols import find_protocol
from video_swinv2.evaluation.reading import Group, default_workers, deliver_groups
from video_swinv2.evaluation.splits import ClassesBy
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.progress import Progress
from video_swinv2.records import read_json
from video_swinv2.report.markdown import accuracy_lines
from video_swinv2.report.metrics import video_probabilities
from video_swinv2.report.mistakes import Strip, surest_mistakes, write_strips
from video_swinv2.report.page import write_report
from video_swinv2.report.scores import Scores, save_scores
from video_swinv2.weights.store import load_model

# The files that are written after scores.npz and belong to it.
_DERIVED_FILES = ("strips.npz", "results.json", "report.html", "report.md")


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
    """`run_tests` with a single protocol; returns the content of its results.json."""
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

    `protocols` are names joined by commas, see `find_protocol`. Several protocols share one decode of each video, and
    each gets its own folder inside `out`. Images are tested like videos of one frame. For `classes_by` see
    `read_labelled_split`.

    Processes launched by torchrun, deepspeed or srun share the work. A test that was killed resumes from its finished
    parts when it is started again, on any number of processes. Neither the interruption nor the number of processes
    affects the scores.

    Returns the content of each protocol's results.json, on every process. Raises UsageError before any work if the test
    cannot succeed (an unknown label, a video without a label) or if it would replace the results of another test, and
    UserError if a video is missing from the scores or no video could be scored.
    """
    settings, out = overrides or TestOverrides(), Path(out)
    advice = f"start the same command again to continue with the parts that are missing in {out}"
    with settings.session(advice) as world:
        refuse_inside_tree(out, [data])
        plan = plan_test(
            Path(model_path),
            Path(data),
            protocols=protocols,
            split=split,
            classes_by=classes_by,
            out=out,
            overrides=settings,
        )
        with exclusive_folder(out, world, f"{out}: another test is writing here; wait for it or choose another --out"):
            return _run(plan, world)


def summarize_tests(results: dict[str, dict[str, Any]], out: Path | str) -> str:
    """The results of each protocol in a few lines to print."""
    # As in `TestPlan.folder`: a single protocol has no folder of its own.
    folders = {name: Path(out) if len(results) == 1 else Path(out) / find_protocol(name).folder for name in results}
    return terminal_lines(line for name, result in results.items() for line in _summary_lines(result, folders[name]))


def _summary_lines(result: dict[str, Any], out: Path) -> list[str]:
    videos = result["videos"]
    lines = accuracy_lines(result)
    lines.append(
        f"{videos['scored']} of {videos['listed']} {result['unit']} scored, {result['views']} view(s) each, "
        f"{result['seconds']:.1f} seconds"
    )
    if videos["failed"]:
        low, high = (100 * bound for bound in result["top1_bounds"])
        lines.append(f"{videos['failed']} failed: top-1 over all listed lies between {low:.2f} and {high:.2f} %")
    if result["frame_order"] != "in-order":
        lines.append(f"frames were {result['frame_order']}: do not quote this accuracy")
    return [*lines, f"report: {out / 'report.html'}"]


def _run(plan: TestPlan, world: World) -> dict[str, dict[str, Any]]:
    """Score the missing parts on all processes together; then rank 0 writes the results, which all return."""
    record = record_test(plan, world)
    identity = scores_identity(plan, record)
    require_agreement(world, identity)
    parts = PartFolder(plan.out, identity, len(plan.groups))
    # Only rank 0 looks at the disk, and the others receive what it found. On a network file system, processes may see
    # different states, but all must work from the same list of missing parts.
    fault = all_gather_objects(world, other_test_in(plan, record) if world.rank == 0 else "")[0]
    if fault:
        raise UsageError(fault)
    missing = all_gather_objects(world, parts.open() if world.rank == 0 else [])[0]
    finished_before = parts.count - len(missing)
    if world.rank == 0 and plan.manifest.notes:
        print(terminal_lines(plan.manifest.notes), file=sys.stderr)
    if world.rank == 0 and finished_before:
        print(f"test: {finished_before} of {parts.count} parts are already done", file=sys.stderr)
    started = time.perf_counter()
    # Rank r takes the missing parts r, r + size, r + 2 * size, ...: the shares are disjoint and cover all of them, so
    # that each part is computed exactly once.
    _score_parts(plan, world, parts, missing[world.rank :: world.size])
    gather_shares(world, None)  # now every part is on disk
    results: dict[str, dict[str, Any]] = {}
    if world.rank == 0:
        seconds = round(time.perf_counter() - started, 3)
        # The first key has kept its old name; *shards* are parts here.
        course = {"shards_finished_before": finished_before, "seconds": seconds}
        date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        _write_all_results(plan, parts, record | course | {"date": date})
        for protocol in plan.protocols:
            results[protocol.name] = read_json(plan.folder(protocol) / "results.json")
    return gather_shares(world, results)[0]


def _score_parts(plan: TestPlan, world: World, parts: PartFolder, mine: Sequence[int]) -> None:
    """Score the parts `mine` in order while workers read ahead, and save each part when all its groups are scored."""
    if not mine:
        return
    model, groups = _load_model(plan, world.device), plan.groups
    bf16 = use_bf16(plan.overrides.precision, world.device)
    if world.rank == 0:
        report_missing_bf16(plan.overrides.precision, world.device)
    workers = default_workers() if plan.overrides.workers is None else plan.overrides.workers
    # One stream of groups across all parts, so that the workers need not pause between parts.
    numbers = [number for part in mine for number in parts.groups_in(part)]
    builder, saved = PartBuilder(plan), set[int]()
    total = sum(len(groups.positions(number)) for number in numbers)
    with Progress("test", total, unit=plan.unit, shown=world.rank == 0) as progress:

        def score(group: Group, waited: float) -> None:
            # The death of a worker can interrupt this function at any line, and it is then called again with the same
            # group (see `deliver_groups`). So every line must be safe to repeat. `saved` covers the group that
            # completes a part: the part cannot be built again once its groups have been forgotten.
            part = parts.part_of(group.number)
            if part in saved:
                return
            scored = forward_views(model, group.pixels, plan.preprocessing, batch=plan.overrides.batch_views, bf16=bf16)
            builder.add(group, _stored_logits(scored.logits, group, plan), scored)
            if builder.has(parts.groups_in(part)):  # not the last one by number: groups may arrive out of order
                # In this order: a part counts as saved only when it is on disk, and is kept in memory until then.
                parts.save(part, builder.build(parts.groups_in(part), waited))
                saved.add(part)
                builder.forget(parts.groups_in(part))
            progress.advance(len(group.videos), waited)

        deliver_groups(groups, numbers, workers, score)


def _load_model(plan: TestPlan, device: torch.device) -> SwinV2:
    """The model of the file at the sizes of the overrides, on `device`."""
    overrides = plan.overrides
    model = load_model(
        plan.model_path,
        window=overrides.window,
        frames=overrides.frames,
        image_size=overrides.image_size,
        attention=overrides.attention,
    )
    return model.to(device)


def _stored_logits(logits: Tensor, group: Group, plan: TestPlan) -> NDArray[np.float16]:
    """(G * V, K) float32 -> (G, V, K) float16, NaN for failed videos.

    float16 halves the size of scores.npz. Raises UserError naming a video whose scores are not finite in float16.
    """
    rows: NDArray[np.float32] = logits.view(len(group.videos), -1, logits.shape[1]).numpy()
    for row, record in zip(rows, group.videos, strict=True):
        if record.reason:
            row[:] = np.nan
        # The largest float16 is 65504. Written with `not`, so that NaN, for which every comparison is false, fails too.
        elif not (np.abs(row) < np.finfo(np.float16).max).all():
            name = plan.manifest.entries[record.position].name
            raise UserError(f"{name}: the model's scores are not finite; check the weights, or set precision=fp32")
    return rows.astype(np.float16)


def _write_all_results(plan: TestPlan, parts: PartFolder, record: dict[str, Any]) -> None:
    """Join the parts and write the scores, strips, figures and report of each protocol; on rank 0 only."""
    entries = plan.manifest.entries
    joined = parts.join(len(entries))
    if not (joined.reasons == "").any():
        # No video could be read, so `write_report` will raise. Without the parts, the next test reads all videos again
        # instead of resuming from their failures.
        parts.remove()
    spent, waited = joined.seconds.tolist()
    record = record | {
        "process_seconds": round(spent, 3),
        "decode_wait_share": round(waited / max(spent, 1e-9), 4),
        "videos_with_damaged_frames": int((joined.stand_ins > 0).sum()),
    }
    strips = joined.strips_by_view()
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
        # Strips are keyed by the number of the view among those of all protocols, but a report counts the views of its
        # own protocol from 0. Strips of other protocols get numbers that no mistake of this one has.
        own_strips = {(video, view - columns.start): strip for (video, view), strip in strips.items()}
        _write_results(plan.folder(protocol), scores, own_strips)
    # Last, when all results are on disk: a kill before this line costs no scores.
    parts.remove()


def _write_results(out: Path, scores: Scores, strips: dict[tuple[int, int], Strip]) -> None:
    """Write the files of one protocol to `out`. strips: by (video, view of this protocol)."""
    out.mkdir(exist_ok=True)
    save_scores(scores, out / "scores.npz")
    for name in _DERIVED_FILES:  # if the report fails, an earlier test's must not remain beside the new scores
        (out / name).unlink(missing_ok=True)
    shown = surest_mistakes(scores, video_probabilities(scores, scores.metadata["average"]))
    places = [(mistake.position, mistake.view) for mistake in shown]
    write_strips(out / "strips.npz", {place[0]: strips[place] for place in places if place in strips})
    write_report(out)
