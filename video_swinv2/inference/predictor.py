"""Predicts the most likely classes of videos, images and streams. One that cannot be read does not stop the others."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from video_swinv2.data.manifest import Entry
from video_swinv2.data.media import IMAGE, VIDEO
from video_swinv2.distributed.agreement import require_agreement
from video_swinv2.distributed.collectives import gather_shares
from video_swinv2.distributed.world import World, alone
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.forward import ScoredViews
from video_swinv2.evaluation.overrides import Device, Precision
from video_swinv2.evaluation.protocols import protocol_for_images
from video_swinv2.evaluation.reading import Group, VideoGroups, default_workers, deliver_groups
from video_swinv2.files import atomic_write, create_folder, refuse_inside_source
from video_swinv2.inference.classifier import DEFAULT_PROTOCOL, Answer, Classifier, open_classifier
from video_swinv2.inference.media_types import find_media_files
from video_swinv2.inference.over_time import (
    SegmentPrediction,
    classify_over_time,
    request_for,
    segments_per_batch,
    stop_at_interrupt,
)
from video_swinv2.inference.streams import STANDARD_INPUT, is_live, is_stream
from video_swinv2.inference.watching import Watcher, start_forkserver

STREAM = "stream"
OnSegment = Callable[[str, SegmentPrediction], None]


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of a file or stream, most likely first.

    If it cannot be read, `answers` is empty and `error` gives the reason. `views` says what `answers` are averaged
    over: for a file the views of the protocol, whether or not it is classified over time, too, and for a stream all
    `segments`. `skipped` counts the segments of a live stream that were not classified because the model was still
    busy. `explanation` is the path of the image that explains the first answer, if one was asked for.
    """

    path: str
    answers: tuple[Answer, ...]
    error: str = ""
    views: str = ""
    segments: tuple[SegmentPrediction, ...] = ()
    skipped: int = 0
    explanation: str = ""


@dataclass(frozen=True)
class OverTime:
    """Settings for predictions over time.

    every_seconds: the time from the start of one segment to the start of the next, by default without overlap. seconds:
    how much of a stream to watch; files are watched to their end. video: a folder for copies of the videos with the
    answers drawn on them.
    """

    every_seconds: float | None = None
    seconds: float = math.inf
    video: Path | None = None

    @property
    def includes_files(self) -> bool:
        """Whether files, too, are classified over time, in addition to the views of the protocol."""
        return self.every_seconds is not None or self.video is not None


def predict(
    model_path: Path | str,
    sources: Sequence[Path | str],
    *,
    top: int = 5,
    protocol: str = DEFAULT_PROTOCOL,
    over_time: OverTime | None = None,
    explain: Path | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_views: int = 12,
    workers: int | None = None,
    time_limit_seconds: float = 60.0,
    on_segment: OnSegment = lambda source, segment: None,
    world: World | None = None,
) -> list[Prediction]:
    """Classify files, the videos (for an image model: images) in folders, and streams. Returns them in this order.

    A file is classified in the views of `protocol` and, if `over_time` asks for it, over time as well. A stream (a URL,
    a camera, or `-` for standard input) is classified over time only, until it ends or is interrupted with Ctrl-C. In
    predictions over time, each segment is classified in the crops of `protocol`. explain: a folder for an image per
    file, not for streams, that shows where the evidence for its first answer lies (`evaluation.explanation`).
    on_segment: called with the prediction of each segment as soon as it is known. workers: number of reading processes,
    by default one per core and at most 8. world: processes that share the files and all return every prediction;
    predictions over time are for a single one. Raises UsageError for a model without class names, an unknown protocol,
    a folder without a suitable file, and copies or images to be written into a folder of sources.
    """
    world = world or alone(device)
    timing = over_time or OverTime()
    for folder in (timing.video, explain):
        if folder is not None:
            refuse_inside_source(folder, sources)
    classifier = open_classifier(
        model_path, top=top, protocol=protocol, device=device, precision=precision, batch_views=batch_views
    )
    wanted = IMAGE if classifier.card.preprocessing.frames is None else VIDEO
    found = find_sources([str(source) for source in sources], wanted)
    # The media types that are classified over time.
    watched = {STREAM, VIDEO} if timing.includes_files else {STREAM}
    require_agreement(world, {"source": {str(number): name for number, (name, _) in enumerate(found)}})
    if watched & {media_type for _, media_type in found}:
        if world.size > 1:
            raise UsageError(f"predictions over time run in one process, and there are {world.size}; start only one")
        # This request is not used. Making it checks the times before anything is read. The server that decoding
        # processes are forked from starts now, because it takes a second or two.
        request_for(classifier, "", ahead=1, every_seconds=timing.every_seconds, seconds=timing.seconds)
        start_forkserver()
    results: dict[int, Prediction] = {}
    readable: dict[str, list[int]] = {VIDEO: [], IMAGE: []}  # the positions of the files to read
    for i, (name, media_type) in enumerate(found):
        if media_type not in watched:
            reason = unreadable_reason(Path(name), media_type, wanted)
            if reason or media_type is None:
                results[i] = Prediction(name, (), reason)
            else:
                readable[media_type].append(i)
    explanations = output_paths(explain, [name for name, _ in found], ".jpg", "--explain")
    # Files that are not watched are read ahead by several processes, so all of them are classified first.
    for media_type, positions in readable.items():
        share = positions[world.rank :: world.size]
        files = [(found[i][0], explanations[i]) for i in share]
        predictions = _predict_files(classifier, files, media_type, workers, time_limit_seconds)
        results |= dict(zip(share, predictions, strict=True))
    # What is watched follows in the given order, one source at a time.
    watched_names = [name for name, media_type in found if media_type in watched]
    copies = output_paths(timing.video, watched_names, ".mp4", "--video")
    for i, (name, media_type) in enumerate(found):
        if media_type in watched:
            results[i] = _predict_over_time(
                classifier, name, timing, copies.pop(0), explanations[i], time_limit_seconds, on_segment
            )
    for theirs in gather_shares(world, results):
        results |= theirs
    return [results[i] for i in range(len(found))]


def find_sources(sources: Sequence[str], wanted: str) -> list[tuple[str, str | None]]:
    """Expand sources to (name, STREAM) for streams and (path, media type) for files and the files in folders.

    Folders and media types are those of `find_media_files`. Raises UsageError for a folder without a file of the type
    `wanted`, for a URL of an unsupported scheme, and for standard input given twice.
    """
    found: list[tuple[str, str | None]] = []
    for source in sources:
        if is_stream(source):
            found.append((source, STREAM))
        elif "://" in source:
            raise UsageError(f"{source}: unsupported kind of URL; use http, https, rtsp, rtmp, rtp, udp or tcp")
        else:
            found += [(str(path), media_type) for path, media_type in find_media_files([Path(source)], wanted)]
    if [name for name, _ in found].count(STANDARD_INPUT) > 1:
        raise UsageError(f"{STANDARD_INPUT}: standard input can be read only once; give it once")
    return found


def _predict_files(
    classifier: Classifier,
    files: Sequence[tuple[str, Path | None]],
    media_type: str,
    workers: int | None,
    time_limit_seconds: float,
) -> list[Prediction]:
    """Classify files of one media type in the views of the protocol, with the crash-tolerant reader that tests use.

    files: pairs (name, where to write the explanation, if anywhere).
    """
    results: dict[int, Prediction] = {}
    protocol = protocol_for_images(classifier.protocol) if media_type == IMAGE else classifier.protocol
    views = classifier.views_of("clip", protocol.clips)
    # Groups of one file, so that each file is delivered, or reported as failed, on its own. The label -1 is unused.
    groups = VideoGroups(
        [Entry(name, str(Path(name).absolute()), -1) for name, _ in files],
        protocol,
        classifier.card.preprocessing,
        group_videos=1,
        frame_order="in-order",
        seed=0,
        time_limit_seconds=time_limit_seconds,
    )

    def deliver(group: Group, waited_seconds: float) -> None:
        (record,) = group.videos
        name, explanation = files[record.position]
        # A file that cannot be read arrives with the reason and no usable pixels.
        if record.reason:
            results[record.position] = Prediction(name, (), record.reason)
        else:
            scored = classifier.score(group.pixels)
            (probabilities,) = classifier.average(scored.logits[None])
            answers = classifier.top_classes(probabilities)
            image = _write_explanation(classifier, group.pixels, scored, probabilities, explanation)
            results[record.position] = Prediction(name, answers, views=views, explanation=image)

    deliver_groups(groups, range(len(groups)), default_workers() if workers is None else workers, deliver)
    return [results[i] for i in range(len(files))]


def _predict_over_time(
    classifier: Classifier,
    name: str,
    timing: OverTime,
    output: Path | None,
    explanation: Path | None,
    time_limit_seconds: float,
    on_segment: OnSegment,
) -> Prediction:
    """Classify one source segment by segment. A UserError becomes the error of its prediction."""
    live, stream = is_live(name), is_stream(name)
    # Streams and annotated videos are not batched: a person waits for the answers about a stream, and the frames of an
    # annotated video wait in memory for their captions. A live stream may have one unanswered segment at a time, so
    # that the next one is cut from the latest frames. Other sources are read further ahead.
    batch = 1 if stream or output is not None else segments_per_batch(classifier)
    request = request_for(
        classifier,
        name,
        ahead=1 if live else 2 * batch,
        every_seconds=timing.every_seconds,
        seconds=timing.seconds if stream else math.inf,
    )
    request = replace(request, whole_file=not stream, live=live, video=output, wait_seconds=time_limit_seconds)
    predictions: list[SegmentPrediction] = []

    # Only the answers are kept; segments with their pixels would fill the memory on an endless stream.
    def note(_segment: object, _row: object, prediction: SegmentPrediction) -> None:
        predictions.append(prediction)
        on_segment(name, prediction)

    try:
        with (
            Watcher(request, descriptor=0 if name == STANDARD_INPUT else None) as watcher,
            stop_at_interrupt(watcher),
        ):
            whole = classify_over_time(classifier, watcher, batch, note)
    except UserError as error:
        # The segments until then are kept. The message begins with the name, which the prediction has anyway.
        return Prediction(name, (), str(error).removeprefix(f"{name}: "), segments=tuple(predictions))
    answers = classifier.top_classes(whole.probabilities)
    image = ""
    if whole.file_views is not None:
        image = _write_explanation(classifier, *whole.file_views, whole.probabilities, explanation)
    return Prediction(name, answers, "", whole.views, tuple(predictions), whole.summary.skipped, image)


def _write_explanation(
    classifier: Classifier, views: Tensor, scored: ScoredViews, probabilities: NDArray[np.float64], path: Path | None
) -> str:
    """Write the image that explains the answer for one file. Returns its path, or "" if there is none to be written."""
    if path is None:
        return ""
    with atomic_write(path) as part:
        part.write_bytes(classifier.explain(views, scored, probabilities))
    return str(path)


def unreadable_reason(path: Path, media_type: str | None, wanted: str) -> str:
    """Why a model that takes `wanted` files cannot read this one; empty if it can.

    An image model reads videos as well, with one frame per view.
    """
    if not path.exists():
        return "no such file"
    if media_type is None:
        return "neither a video nor an image"
    return "an image, but this model takes videos" if (media_type, wanted) == (IMAGE, VIDEO) else ""


def output_paths(folder: Path | None, names: Sequence[str], suffix: str, option: str) -> list[Path | None]:
    """The path in `folder` for what is written about each source, or None for each if there is no folder.

    It is named after the file, the last part of a URL's path, or its host. All paths differ from each other and
    from all sources: nothing may replace a file that is still to be read. Raises UserError if the folder, which
    `option` names, cannot be created.
    """
    if folder is None:
        return [None] * len(names)
    create_folder(folder, option)
    paths: list[Path | None] = []
    taken: set[Path] = set()
    sources = {Path(name).absolute() for name in names}
    for name in names:
        # `stem` is reduced to characters that are safe in file names everywhere.
        url = urlsplit(name) if "://" in name else None
        title = "input" if name == STANDARD_INPUT else Path(url.path).stem or url.netloc if url else Path(name).stem
        stem = re.sub(r"[^\w. -]", "_", title)
        # name.mp4, name-2.mp4, name-3.mp4, ...
        path, count = folder / f"{stem}{suffix}", 2
        while path in taken or path.absolute() in sources:
            path, count = folder / f"{stem}-{count}{suffix}", count + 1
        taken.add(path)
        paths.append(path)
    return paths
