"""What a model says about videos, images and streams: the likeliest classes; what cannot be read is reported."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from torch import Tensor

from video_swinv2.data.datasets import read_image
from video_swinv2.data.manifest import Entry
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.overrides import Device, Precision
from video_swinv2.evaluation.protocols import Protocol, find_protocol, protocol_for_images
from video_swinv2.evaluation.reading import Group, VideoGroups, default_workers, deliver_groups
from video_swinv2.evaluation.views import cut_image
from video_swinv2.inference.classifier import Answer, Classifier, open_classifier
from video_swinv2.inference.media_types import IMAGE, VIDEO, find_media_files
from video_swinv2.inference.over_time import SegmentPrediction, classify_segments, interrupt_ends, task_for
from video_swinv2.inference.streams import STANDARD_INPUT, is_live, is_stream
from video_swinv2.inference.watching import Watcher, start_forkserver
from video_swinv2.weights.store import Preprocessing

STREAM = "stream"
OnSegment = Callable[[str, SegmentPrediction], None]


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a file or stream, likeliest first; none, and the error, where it could not be read.

    Where it was watched over time they are of the mean of all `windows`; `skipped` ones of a live stream came too fast.
    """

    path: str
    answers: tuple[Answer, ...]
    error: str = ""
    windows: tuple[SegmentPrediction, ...] = ()
    skipped: int = 0


@dataclass(frozen=True)
class OverTime:
    """How videos are watched: a window every so many seconds (by default without overlap), streams for `seconds` only.

    video: a folder for copies of the videos with the answers written on them.
    """

    every_seconds: float | None = None
    seconds: float = math.inf
    video: Path | None = None

    @property
    def asked_for(self) -> bool:
        """Whether files are watched too, and not tested by a protocol."""
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
    """Predictions for files, for all videos (for an image model: images) in folders, and for streams, in their order.

    A file is seen in the views of `protocol`, or window after window if `over_time` asks for it; a stream (a URL, a
    camera, `-` for standard input) always is, until it ends or Ctrl-C. tell: is given each window's answers when they
    are known. workers: reading processes, by default one per core and at most 8. Raises UsageError for a model without
    class names, an unknown protocol, and a folder that holds no such file.
    """
    how, chosen = over_time or OverTime(), find_protocol(protocol)
    classifier = open_classifier(model_path, top=top, device=device, precision=precision, batch_views=batch_views)
    taken = IMAGE if classifier.card.preprocessing.frames is None else VIDEO
    found = find_sources([str(source) for source in sources], taken)
    watched = {STREAM, VIDEO} if how.asked_for else {STREAM}
    if watched & {kind for _, kind in found}:
        task_for(classifier.card, "", ahead=1, every_seconds=how.every_seconds, seconds=how.seconds)
        start_forkserver()
    videos = [i for i, (_, kind) in enumerate(found) if kind == VIDEO and kind not in watched]
    results = dict(
        zip(
            videos,
            _by_protocol(classifier, [found[i][0] for i in videos], chosen, workers, time_limit_seconds),
            strict=True,
        )
    )
    targets = _targets(how.video, [name for name, kind in found if kind in watched])
    for i, (name, kind) in enumerate(found):
        if kind in watched:
            results[i] = _over_time(classifier, name, how, targets.pop(0), time_limit_seconds, on_segment)
        elif kind != VIDEO:
            results[i] = _other(classifier, Path(name), kind, chosen)
    return [results[i] for i in range(len(found))]


def find_sources(sources: Sequence[str], wanted: str) -> list[tuple[str, str | None]]:
    """(name, kind) of every file, of those of the kind `wanted` in folders, and of streams; see `find_media_files`."""
    found: list[tuple[str, str | None]] = []
    for source in sources:
        if is_stream(source):
            found.append((source, STREAM))
        elif "://" in source:
            raise UsageError(f"{source}: no stream of this kind is read; give http, https, rtsp, rtmp, rtp, udp or tcp")
        else:
            found += [(str(path), kind) for path, kind in find_media_files([Path(source)], wanted)]
    if [name for name, _ in found].count(STANDARD_INPUT) > 1:
        raise UsageError(f"{STANDARD_INPUT}: there is one standard input; name it once")
    return found


def read_image_views(path: Path, protocol: Protocol, preprocessing: Preprocessing) -> Tensor:
    """The different views of a still -> uint8 (V, 3, H, W), turned as its EXIF says. UserError where it is none."""
    return cut_image(read_image(path), protocol_for_images(protocol), preprocessing)[0]


def _by_protocol(
    classifier: Classifier, names: Sequence[str], protocol: Protocol, workers: int | None, time_limit_seconds: float
) -> list[Prediction]:
    """Videos in the views of a test, read ahead by several processes."""
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
        answers = () if record.reason else classifier.best(classifier.views_averaged(group.pixels, protocol.average))
        results[record.position] = Prediction(names[record.position], answers, record.reason)

    deliver_groups(groups, range(len(groups)), default_workers() if workers is None else workers, deliver)
    return [results[i] for i in range(len(names))]


def _over_time(
    classifier: Classifier, name: str, how: OverTime, target: Path | None, time_limit_seconds: float, on_segment: OnSegment
) -> Prediction:
    """Windows of one source; whatever goes wrong with it is its error."""
    live, stream = is_live(name), is_stream(name)
    batch = 1 if stream or target is not None else classifier.batch_views  # answers that something waits for come at once
    seconds = how.seconds if stream else math.inf
    task = task_for(classifier.card, name, ahead=1 if live else 2 * batch, every_seconds=how.every_seconds, seconds=seconds)
    task = replace(task, live=live, video=target, wait_seconds=time_limit_seconds)
    moments: list[SegmentPrediction] = []

    def note(_window: object, _row: object, moment: SegmentPrediction) -> None:
        moments.append(moment)
        on_segment(name, moment)

    try:
        with Watcher(task, descriptor=0 if name == STANDARD_INPUT else None) as watcher, interrupt_ends(watcher):
            mean, seen = classify_segments(classifier, watcher, batch, note)
    except UserError as error:
        return Prediction(name, (), str(error).removeprefix(f"{name}: "), tuple(moments))
    return Prediction(name, classifier.best(mean), "", tuple(moments), seen.skipped)


def _other(classifier: Classifier, path: Path, kind: str | None, protocol: Protocol) -> Prediction:
    """An image for an image model; the error for anything that is not read."""
    if not path.exists():
        return Prediction(str(path), (), "no such file")
    if kind != IMAGE:
        return Prediction(str(path), (), "neither a video nor an image")
    if classifier.card.preprocessing.frames is not None:
        return Prediction(str(path), (), "an image, and this model takes videos")
    try:
        pixels = read_image_views(path, protocol, classifier.card.preprocessing)
    except UserError as error:
        return Prediction(str(path), (), str(error).removeprefix(f"{path}: "))
    return Prediction(str(path), classifier.best(classifier.views_averaged(pixels, protocol.average)))


def _targets(folder: Path | None, names: Sequence[str]) -> list[Path | None]:
    """A file in `folder` for each source, no two the same; None for each without a folder."""
    if folder is None:
        return [None] * len(names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror}); choose another --video") from error
    taken: list[Path | None] = []
    for name in names:
        url = urlsplit(name) if "://" in name else None
        words = "input" if name == STANDARD_INPUT else Path(url.path).stem or url.netloc if url else Path(name).stem
        stem = re.sub(r"[^\w. -]", "_", words)
        path, count = folder / f"{stem}.mp4", 2
        while path in taken or path.absolute() == Path(name).absolute():
            path, count = folder / f"{stem}-{count}.mp4", count + 1
        taken.append(path)
    return taken
