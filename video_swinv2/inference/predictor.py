"""The most likely classes of videos, images and streams. What cannot be read is reported and stops nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from torch import Tensor

from video_swinv2.data.images import read_image
from video_swinv2.data.manifest import Entry
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.overrides import Device, Precision
from video_swinv2.evaluation.protocols import Protocol, find_protocol, protocol_for_images
from video_swinv2.evaluation.reading import Group, VideoGroups, default_workers, deliver_groups
from video_swinv2.evaluation.views import cut_image
from video_swinv2.inference.classifier import Answer, Classifier, open_classifier
from video_swinv2.inference.media_types import IMAGE, VIDEO, find_media_files
from video_swinv2.inference.over_time import SegmentPrediction, classify_segments, request_for, stop_at_interrupt
from video_swinv2.inference.streams import STANDARD_INPUT, is_live, is_stream
from video_swinv2.inference.watching import Watcher, start_forkserver
from video_swinv2.weights.store import Preprocessing

STREAM = "stream"
OnSegment = Callable[[str, SegmentPrediction], None]


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of a file or stream, most likely first; empty, with an `error`, if it cannot be read.

    Over time, `answers` come from the mean over all `segments`; `skipped` counts the segments of a live stream that
    came faster than the model.
    """

    path: str
    answers: tuple[Answer, ...]
    error: str = ""
    segments: tuple[SegmentPrediction, ...] = ()
    skipped: int = 0


@dataclass(frozen=True)
class OverTime:
    """How to predict over time: a segment every `every_seconds` (by default without overlap), and when to stop.

    seconds: how much of a stream to watch; files are watched to their end. video: a folder for copies of the videos
    with the answers drawn on them.
    """

    every_seconds: float | None = None
    seconds: float = math.inf
    video: Path | None = None

    @property
    def includes_files(self) -> bool:
        """Whether files are classified over time too, instead of in the views of a protocol."""
        return self.every_seconds is not None or self.video is not None


def predict(
    model_path: Path | str,
    sources: Sequence[Path | str],
    *,
    top: int = 5,
    protocol: str = "videoswin-4x3",
    over_time: OverTime | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_views: int = 12,
    workers: int | None = None,
    time_limit_seconds: float = 60.0,
    on_segment: OnSegment = lambda source, segment: None,
) -> list[Prediction]:
    """Classify files, the videos (for an image model: images) in folders, and streams. Predictions keep their order.

    A file is classified in the views of `protocol`, or over time if `over_time` asks for it. A stream (a URL, a camera,
    `-` for standard input) is always classified over time, until it ends or Ctrl-C. on_segment: called with each
    segment's prediction as soon as it is known. workers: reading processes, by default one per core and at most 8.
    Raises UsageError for a model without class names, an unknown protocol, and a folder without a suitable file.
    """
    timing, chosen_protocol = over_time or OverTime(), find_protocol(protocol)
    classifier = open_classifier(model_path, top=top, device=device, precision=precision, batch_views=batch_views)
    wanted = IMAGE if classifier.card.preprocessing.frames is None else VIDEO
    found = find_sources([str(source) for source in sources], wanted)
    watched = {STREAM, VIDEO} if timing.includes_files else {STREAM}
    if watched & {media_type for _, media_type in found}:
        # Wrong times are refused here, before anything is read; and the server of the decoders starts meanwhile.
        request_for(classifier.card, "", ahead=1, every_seconds=timing.every_seconds, seconds=timing.seconds)
        start_forkserver()
    # Videos that are not watched are read ahead by several processes, so they all go first.
    videos = [i for i, (_, media_type) in enumerate(found) if media_type == VIDEO and media_type not in watched]
    by_protocol = _predict_videos(
        classifier, [found[i][0] for i in videos], chosen_protocol, workers, time_limit_seconds
    )
    results = dict(zip(videos, by_protocol, strict=True))
    outputs = _output_paths(timing.video, [name for name, media_type in found if media_type in watched])
    for i, (name, media_type) in enumerate(found):
        if media_type in watched:
            results[i] = _predict_over_time(classifier, name, timing, outputs.pop(0), time_limit_seconds, on_segment)
        elif media_type != VIDEO:
            results[i] = _predict_image(classifier, Path(name), media_type, chosen_protocol)
    return [results[i] for i in range(len(found))]


def find_sources(sources: Sequence[str], wanted: str) -> list[tuple[str, str | None]]:
    """(name, STREAM) of streams, (path, media type) of files, and of the files in folders as in `find_media_files`.

    Raises UsageError for a folder without a wanted file, for a kind of URL that is not read, and for standard input
    given twice.
    """
    found: list[tuple[str, str | None]] = []
    for source in sources:
        if is_stream(source):
            found.append((source, STREAM))
        elif "://" in source:
            raise UsageError(f"{source}: no such kind of stream; use http, https, rtsp, rtmp, rtp, udp or tcp")
        else:
            found += [(str(path), media_type) for path, media_type in find_media_files([Path(source)], wanted)]
    if [name for name, _ in found].count(STANDARD_INPUT) > 1:
        raise UsageError(f"{STANDARD_INPUT}: standard input can be read only once; give it once")
    return found


def read_image_views(path: Path, protocol: Protocol, preprocessing: Preprocessing) -> Tensor:
    """The distinct views of an image -> uint8 (V, 3, H, W), oriented by its EXIF tag. UserError if it is unreadable."""
    return cut_image(read_image(path), protocol_for_images(protocol), preprocessing)[0]


def _predict_videos(
    classifier: Classifier, names: Sequence[str], protocol: Protocol, workers: int | None, time_limit_seconds: float
) -> list[Prediction]:
    """Classify videos in the views of a test, with the crash-tolerant reader of the test."""
    results: dict[int, Prediction] = {}
    groups = VideoGroups(
        [Entry(name, Path(name).absolute(), -1) for name in names],
        protocol,
        classifier.card.preprocessing,
        group_videos=1,
        frame_order="in-order",
        seed=0,
        time_limit_seconds=time_limit_seconds,
    )

    def deliver(group: Group, waited_seconds: float) -> None:
        (record,) = group.videos
        answers: tuple[Answer, ...] = ()
        if not record.reason:
            answers = classifier.top_classes(classifier.average_probabilities(group.pixels, protocol.average))
        results[record.position] = Prediction(names[record.position], answers, record.reason)

    deliver_groups(groups, range(len(groups)), default_workers() if workers is None else workers, deliver)
    return [results[i] for i in range(len(names))]


def _predict_over_time(
    classifier: Classifier,
    name: str,
    timing: OverTime,
    output: Path | None,
    time_limit_seconds: float,
    on_segment: OnSegment,
) -> Prediction:
    """Classify one source segment by segment; whatever goes wrong with it becomes its error."""
    live, stream = is_live(name), is_stream(name)
    # Somebody waits for the answers about a stream, and frames in memory for their caption: no batches there. A live
    # stream may have one unanswered segment, so that each is cut from the latest frames; a file is read further ahead.
    batch = 1 if stream or output is not None else classifier.batch_views
    request = request_for(
        classifier.card,
        name,
        ahead=1 if live else 2 * batch,
        every_seconds=timing.every_seconds,
        seconds=timing.seconds if stream else math.inf,
    )
    request = replace(request, live=live, video=output, wait_seconds=time_limit_seconds)
    predictions: list[SegmentPrediction] = []

    def note(_segment: object, _row: object, prediction: SegmentPrediction) -> None:
        predictions.append(prediction)
        on_segment(name, prediction)

    try:
        with (
            Watcher(request, descriptor=0 if name == STANDARD_INPUT else None) as watcher,
            stop_at_interrupt(watcher),
        ):
            mean, summary = classify_segments(classifier, watcher, batch, note)
    except UserError as error:
        return Prediction(name, (), str(error).removeprefix(f"{name}: "), tuple(predictions))
    return Prediction(name, classifier.top_classes(mean), "", tuple(predictions), summary.skipped)


def _predict_image(classifier: Classifier, path: Path, media_type: str | None, protocol: Protocol) -> Prediction:
    """Classify an image with an image model; for anything else, the error."""
    preprocessing = classifier.card.preprocessing
    error = unreadable_reason(path, media_type, VIDEO if preprocessing.frames is not None else IMAGE)
    if error:
        return Prediction(str(path), (), error)
    try:
        views = read_image_views(path, protocol, preprocessing)
    except UserError as fault:
        return Prediction(str(path), (), str(fault).removeprefix(f"{path}: "))
    return Prediction(str(path), classifier.top_classes(classifier.average_probabilities(views, protocol.average)))


def unreadable_reason(path: Path, media_type: str | None, wanted: str) -> str:
    """Why a model that takes `wanted` files cannot read this one; empty if it can. An image model reads videos too."""
    if not path.exists():
        return "no such file"
    if media_type is None:
        return "neither a video nor an image"
    return "an image, but this model takes videos" if (media_type, wanted) == (IMAGE, VIDEO) else ""


def _output_paths(folder: Path | None, names: Sequence[str]) -> list[Path | None]:
    """Where in `folder` the annotated copy of each source goes: all different, and none of them a source itself.

    Named after the file, the last part of a URL's path or else its host. Without a folder, None for each.
    """
    if folder is None:
        return [None] * len(names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot create the folder ({error.strerror}); choose another --video") from error
    taken: list[Path | None] = []
    for name in names:
        url = urlsplit(name) if "://" in name else None
        title = "input" if name == STANDARD_INPUT else Path(url.path).stem or url.netloc if url else Path(name).stem
        stem = re.sub(r"[^\w. -]", "_", title)
        path, count = folder / f"{stem}.mp4", 2
        while path in taken or path.absolute() == Path(name).absolute():
            path, count = folder / f"{stem}-{count}.mp4", count + 1
        taken.append(path)
    return taken
