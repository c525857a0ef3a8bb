"""Benchmark of a test: decoding a video once for all of its views, against decoding it again for each view.

Three ways to read are compared: `test` itself, which decodes a video once; a seek to the key frame before each view;
and a full decode of the video for each view. The model sees the same pixels in the same batches each time.

Letters: V views of a video, T frames, H W pixels.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from video_swinv2.bench.measuring import clock_for, median_ratio, table_text, take_turns
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.display import size_for
from video_swinv2.errors import UserError
from video_swinv2.evaluation.forward import forward_views
from video_swinv2.evaluation.placement import resized_short_side
from video_swinv2.evaluation.protocols import find_protocols, plan_views
from video_swinv2.evaluation.reading import VideoGroups, videos_per_group
from video_swinv2.evaluation.splits import read_labelled_split
from video_swinv2.evaluation.views import clip_frames_and_stride
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.weights.store import load_model, read_card

MAX_LOGIT_DIFFERENCE = 1e-4
"""The largest difference of logits that rounding may explain; the model sees the same pixels in the same batches."""

ONE_DECODE, SEEK_PER_VIEW, DECODE_PER_VIEW = "one decode", "seek per view", "full decode per view"
RIVALS = (SEEK_PER_VIEW, DECODE_PER_VIEW)

ReadFrames = Callable[[VideoReader, Sequence[int], int], Tensor]
"""(reader, frame indices, short side in pixels) -> (T, 3, H, W)."""


@dataclass(frozen=True)
class Round:
    """The result of one round of one way to read."""

    decode: float
    """Seconds spent on reading: opening, decoding, resizing and cropping."""
    compute: float
    """Seconds spent in the model."""
    logits: Tensor

    @property
    def total(self) -> float:
        """Seconds of the whole round."""
        return self.decode + self.compute


def bench_test(
    model_path: Path,
    data: Path,
    *,
    protocols: str,
    split: str,
    videos: int,
    batch_views: int,
    rounds: int,
    threads: int,
    device: str,
) -> dict[str, Any]:
    """Score the first `videos` videos of a split in all three ways, which take turns in this process.

    There are no worker processes, so that reading and computing can be timed separately. Seconds are CPU time of this
    process on a CPU and wall time on a GPU. Raises UserError for a video that cannot be read, and if the logits of the
    three ways differ by more than rounding.
    """
    torch.set_num_threads(threads)
    card, where = read_card(model_path), torch.device(device)
    model = load_model(model_path).to(where)
    chosen = find_protocols(protocols)
    entries = read_labelled_split(data, split, card.classes or None).entries[:videos]
    views = sum(protocol.views for protocol in chosen)
    # The groups of videos that `test` makes for this number of views and this batch.
    groups = VideoGroups(
        entries,
        chosen,
        card.preprocessing,
        group_videos=videos_per_group(views, batch_views),
        frame_order="in-order",
        seed=0,
        time_limit_seconds=60.0,
    )
    readers: dict[str, Callable[[int], Tensor]] = {
        ONE_DECODE: partial(_read_all_views_at_once, groups),
        SEEK_PER_VIEW: partial(_read_view_by_view, groups, _seek),
        DECODE_PER_VIEW: partial(_read_view_by_view, groups, _decode_whole_video),
    }
    clock = clock_for(where)
    # The first round, a warm-up, fills the page cache and the tables that the model keeps.
    results = take_turns(
        {name: partial(_run_round, read, groups, model, batch_views, clock) for name, read in readers.items()}, rounds
    )
    # One round is enough to compare: the logits of a way are the same in every round.
    logits = {name: of_rounds[-1].logits for name, of_rounds in results.items()}
    difference = max(float((logits[ONE_DECODE] - logits[rival]).abs().max()) for rival in RIVALS)
    if difference > MAX_LOGIT_DIFFERENCE:
        raise UserError(f"{data}: logits of the ways differ by {difference:.1e}; this is a bug, please report it")
    return _figures(results, n=len(entries), views=views) | {
        "model": str(model_path),
        "data": str(data),
        "protocols": [protocol.name for protocol in chosen],
        "difference": difference,
        "rounds": rounds,
        "device": device,
        "threads": threads,
    }


def _run_round(
    read: Callable[[int], Tensor], groups: VideoGroups, model: SwinV2, batch_views: int, clock: Callable[[], float]
) -> Round:
    """Score all videos once, reading with `read`; `clock` measures reading and computing separately."""
    decode = compute = 0.0
    logits = []
    # Groups as in a test, so that the model gets the same batches whatever the way. Reading and computing alternate and
    # do not overlap, so that each can be timed.
    for number in range(len(groups)):
        started = clock()
        # (V, 3, [T,] H, W) of each video, one after the other, as in a batch of `test`.
        pixels = torch.cat([read(position) for position in groups.positions(number)])
        have_pixels = clock()
        logits.append(forward_views(model, pixels, groups.preprocessing, batch=batch_views, bf16=False).logits)
        decode, compute = decode + have_pixels - started, compute + clock() - have_pixels
    return Round(decode, compute, torch.cat(logits))


def _read_all_views_at_once(groups: VideoGroups, position: int) -> Tensor:
    """All views of one video from a single decode, as a test reads them: uint8 (V, 3, [T,] H, W)."""
    record, pixels = groups.read(position)
    if pixels is None:
        raise UserError(f"{groups.entries[position].name}: {record.reason}; remove it from the list to benchmark")
    return pixels


def _read_view_by_view(groups: VideoGroups, read_frames: ReadFrames, position: int) -> Tensor:
    """The same pixels as `_read_all_views_at_once`, but the file is opened and read again for each view."""
    path = Path(groups.entries[position].path)
    frames, stride = clip_frames_and_stride(groups.preprocessing)
    size = groups.preprocessing.image_size
    clips = []
    for protocol in groups.protocols:
        for number in range(protocol.views):
            with VideoReader(path) as reader:
                # Plan the views of the resized video, whose size in pixels is `shown`, and keep the one that is wanted.
                side = resized_short_side(*reader.size, size, protocol.resize)
                shown = size_for(reader.size, side)
                view = plan_views(protocol, len(reader), *shown, frames, stride, size, reader.fps)[number]
                pictures = read_frames(reader, view.indices, side)
            top, left, height, width = view.box
            # (T, 3, H, W) -> (3, T, H, W)
            clips.append(pictures[:, :, top : top + height, left : left + width].transpose(0, 1))
    pixels = torch.stack(clips)
    # (V, 3, T, H, W); image models take (V, 3, H, W), and their views have a single frame.
    return pixels if groups.preprocessing.frames is not None else pixels[:, :, 0]


def _seek(reader: VideoReader, indices: Sequence[int], side: int) -> Tensor:
    """Decode only what the view needs, from the key frame before its first frame: uint8 (T, 3, H, W)."""
    return reader.frames(indices, short_side=side)


def _decode_whole_video(reader: VideoReader, indices: Sequence[int], side: int) -> Tensor:
    """Decode the whole video, but convert only the frames that the view shows: uint8 (T, 3, H, W)."""
    wanted = set(indices)
    images = {index: reader.picture(frame, side) for index, frame in reader.sequence() if index in wanted}
    if len(images) < len(wanted):
        raise UserError(f"{reader.path}: some frames cannot be decoded; remove it from the list to benchmark")
    # The indices of a short video repeat, hence the dict. (T, H, W, 3) -> (T, 3, H, W)
    return torch.from_numpy(np.stack([images[index] for index in indices])).permute(0, 3, 1, 2)


def _figures(results: dict[str, list[Round]], *, n: int, views: int) -> dict[str, Any]:
    """Medians of each way, and how much faster one decode is than each rival: the median of the ratios by round."""
    totals = {name: [one.total for one in rounds] for name, rounds in results.items()}
    decodes = {name: [one.decode for one in rounds] for name, rounds in results.items()}
    rows = {
        name: {
            "decode_seconds": statistics.median(decodes[name]),
            "compute_seconds": statistics.median(one.compute for one in rounds),
            "videos_per_second": n / statistics.median(totals[name]),
        }
        for name, rounds in results.items()
    }
    return {
        "videos": n,
        "views": views,
        "ways": rows,
        "times_as_fast": {rival: median_ratio(totals[rival], totals[ONE_DECODE]) for rival in RIVALS},
        "decode_times_as_fast": {rival: median_ratio(decodes[rival], decodes[ONE_DECODE]) for rival in RIVALS},
    }


def bench_test_table(result: dict[str, Any]) -> str:
    """The result of `bench_test` as text."""
    heading = (
        f"{result['videos']} videos, {result['views']} views each ({', '.join(result['protocols'])}), "
        f"{result['device']}, {result['threads']} thread(s), medians of {result['rounds']} rounds taking turns"
    )
    rows = []
    for name, row in result["ways"].items():
        ratios = ["", ""]  # our own way has nothing to be compared with
        if name in RIVALS:
            ratios = [f"{result[key][name]:.2f}" for key in ("times_as_fast", "decode_times_as_fast")]
        seconds = [f"{row['decode_seconds']:.2f}", f"{row['compute_seconds']:.2f}"]
        rows.append([name, f"{row['videos_per_second']:.2f}", *seconds, *ratios])
    columns = ["", "videos/s", "decoding, s", "model, s", "one decode is faster by", "in decoding by"]
    ours = result["ways"][ONE_DECODE]
    # ceil(decoding / model): so many processes decode as fast as the model computes.
    readers = max(1, -(-ours["decode_seconds"] // max(ours["compute_seconds"], 1e-9)))
    notes = [
        f"logits agree within {result['difference']:.0e}",
        f"{readers:.0f} reading process(es) keep up with the model on this device",
    ]
    return "\n".join([heading, "", table_text(columns, rows), "", *notes])
