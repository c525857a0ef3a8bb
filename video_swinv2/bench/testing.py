"""Where the time of a test goes: one decode for all views of a video, against two ways with one for each view."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from video_swinv2.bench.measuring import clock_of
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.display import size_for
from video_swinv2.errors import UserError
from video_swinv2.evaluation.placement import resized_short_side
from video_swinv2.evaluation.protocols import find_protocols, plan_views
from video_swinv2.evaluation.reading import VideoGroups, videos_of_a_group
from video_swinv2.evaluation.splits import read_labelled_split
from video_swinv2.evaluation.testing import forward_views
from video_swinv2.evaluation.views import clip_frames_and_stride
from video_swinv2.weights.store import load_model, read_card

SAME_WITHIN = 1e-4
"""Logits of all ways may differ by so much; they are of the same pixels in the same batches."""

_ONE, _LEAPING, _WHOLE = "one decode", "a leap a view", "a decode a view"
_RIVALS = (_LEAPING, _WHOLE)


_Fetch = Callable[[VideoReader, Sequence[int], int], Tensor]
"""Reads frames by index, resized to a short side -> (T, 3, H, W)."""


@dataclass
class _Way:
    """One way to read, and the seconds of each round it spent on reading and on the model."""

    read: Callable[[int], Tensor]
    decode: list[float]
    compute: list[float]


def bench_test(
    model_path: Path, data: Path, *, protocols: str, split: str, videos: int, batch_views: int, rounds: int, device: str
) -> dict[str, Any]:
    """The first `videos` of a split scored all three ways, taking turns in one process that also reads.

    Seconds are of this process on a CPU, of the wall on a GPU. Raises UserError for a video that cannot be read, and
    where the ways do not give the same scores.
    """
    card, where = read_card(model_path), torch.device(device)
    model = load_model(model_path).to(where)
    clock, looks = clock_of(where), find_protocols(protocols)
    entries = read_labelled_split(data, split, card.classes or None).entries[:videos]
    views = sum(protocol.views for protocol in looks)
    groups = VideoGroups(
        entries,
        looks,
        card.preprocessing,
        group_videos=videos_of_a_group(views, batch_views),
        frame_order="in-order",
        seed=0,
        time_limit_seconds=60.0,
    )
    ways = {
        _ONE: _Way(lambda position: _at_once(groups, position), [], []),
        _LEAPING: _Way(lambda position: _view_by_view(groups, position, _leap), [], []),
        _WHOLE: _Way(lambda position: _view_by_view(groups, position, _decode_all), [], []),
    }
    logits: dict[str, Tensor] = {}
    for number in range(rounds + 1):  # the first warms up the page cache and the model
        for name, way in ways.items():
            logits[name] = _round(way, groups, model, batch_views, clock)
            if not number:
                way.decode.clear()
                way.compute.clear()
    difference = max(float((logits[_ONE] - logits[rival]).abs().max()) for rival in _RIVALS)
    if difference > SAME_WITHIN:
        raise UserError(f"{data}: the ways differ by {difference:.1e} in a logit; this is a fault of the toolkit")
    return _result(ways, n=len(entries), views=views) | {
        "model": str(model_path),
        "data": str(data),
        "protocols": [protocol.name for protocol in looks],
        "difference": difference,
        "rounds": rounds,
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _round(way: _Way, groups: VideoGroups, model: nn.Module, batch_views: int, clock: Callable[[], float]) -> Tensor:
    decode = compute = 0.0
    parts = []
    for number in range(len(groups)):
        started = clock()
        pixels = torch.cat([way.read(position) for position in groups.positions(number)])
        read = clock()
        parts.append(forward_views(model, pixels, groups.preprocessing, batch=batch_views, bf16=False))
        decode, compute = decode + read - started, compute + clock() - read
    way.decode.append(decode)
    way.compute.append(compute)
    return torch.cat(parts)


def _at_once(groups: VideoGroups, position: int) -> Tensor:
    record, pixels = groups.read(position)
    if pixels is None:
        raise UserError(f"{groups.entries[position].name}: {record.reason}; take it out of the list for a benchmark")
    return pixels


def _view_by_view(groups: VideoGroups, position: int, fetch: _Fetch) -> Tensor:
    """The same pixels, each view from a file opened for it."""
    path = Path(groups.entries[position].path)
    frames, stride = clip_frames_and_stride(groups.preprocessing)
    size = groups.preprocessing.image_size
    clips = []
    for protocol in groups.protocols:
        for number in range(protocol.views):
            with VideoReader(path) as reader:
                side = resized_short_side(*reader.size, size, protocol.resize)
                shown = size_for(reader.size, side)
                view = plan_views(protocol, len(reader), *shown, frames, stride, size, reader.fps)[number]
                pictures = fetch(reader, view.indices, side)
            top, left, height, width = view.box
            clips.append(pictures[:, :, top : top + height, left : left + width].transpose(0, 1))
    pixels = torch.stack(clips)
    return pixels if groups.preprocessing.frames is not None else pixels[:, :, 0]


def _leap(reader: VideoReader, indices: Sequence[int], side: int) -> Tensor:
    """Only what the view needs is decoded, from the key frame before it."""
    return reader.frames(indices, short_side=side)


def _decode_all(reader: VideoReader, indices: Sequence[int], side: int) -> Tensor:
    """The whole video is decoded, and what the view needs is made a picture."""
    wanted = set(indices)
    images = {index: reader.picture(frame, side) for index, frame in reader.sequence() if index in wanted}
    if len(images) < len(wanted):
        raise UserError(f"{reader.path}: has frames that cannot be decoded; take it out of the list for a benchmark")
    return torch.from_numpy(np.stack([images[index] for index in indices])).permute(0, 3, 1, 2)


def _result(ways: dict[str, _Way], *, n: int, views: int) -> dict[str, Any]:
    whole = {name: np.add(way.decode, way.compute) for name, way in ways.items()}
    rows = {
        name: {
            "decode_seconds": statistics.median(way.decode),
            "compute_seconds": statistics.median(way.compute),
            "videos_per_second": n / float(np.median(whole[name])),
        }
        for name, way in ways.items()
    }
    decode = {name: np.array(way.decode) for name, way in ways.items()}
    return {
        "videos": n,
        "views": views,
        "ways": rows,
        "times_as_fast": {rival: float(np.median(whole[rival] / whole[_ONE])) for rival in _RIVALS},
        "decode_times_as_fast": {rival: float(np.median(decode[rival] / decode[_ONE])) for rival in _RIVALS},
    }


def show_test(result: dict[str, Any]) -> str:
    """The result of `bench_test` for people."""
    lines = [
        f"{result['videos']} videos, {result['views']} views each ({', '.join(result['protocols'])}), "
        f"{result['device']}, {result['threads']} thread(s), median of {result['rounds']} rounds in turns"
    ]
    for name, row in result["ways"].items():
        lines.append(
            f"  {name:16s} {row['videos_per_second']:8.2f} videos/s: decoding {row['decode_seconds']:.2f} s, "
            f"model {row['compute_seconds']:.2f} s"
        )
    for rival, ratio in result["times_as_fast"].items():
        lines.append(
            f"  one decode is {ratio:.2f} times as fast as {rival}, "
            f"{result['decode_times_as_fast'][rival]:.2f} times in decoding"
        )
    ours = result["ways"][_ONE]
    readers = max(1, -(-ours["decode_seconds"] // max(ours["compute_seconds"], 1e-9)))
    lines.append(f"  scores within {result['difference']:.0e}")
    lines.append(f"  {readers:.0f} reading process(es) keep up with the model on this device")
    return "\n".join(lines)
