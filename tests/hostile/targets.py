"""What the fuzzer tries on every damaged file: each function reads it as a verb would.

A function returns normally if the file could be read, and otherwise raises UserError. Anything else is a fault. Where
the program reports a failure as a value instead of raising, it is raised here.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from data_prep.jobs import TranscodeJob, TranscodeSettings
from data_prep.sources import plan_preparation
from data_prep.transcode import transcode_video
from data_prep.unpack import unpack
from tests.hostile.seeds import write_video
from tests.inference.conftest import save_model
from video_swinv2.config import AugmentConfig, DataConfig, load_config
from video_swinv2.data.datasets import SampleDataset
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.images import read_image
from video_swinv2.data.manifest import Entry, find_splits, read_manifest
from video_swinv2.data.shards import shard_collection
from video_swinv2.dense.detection_dataset import DetectionDataset
from video_swinv2.errors import UserError
from video_swinv2.evaluation.protocols import find_protocol
from video_swinv2.evaluation.reading import VideoGroups
from video_swinv2.inference.predictor import predict
from video_swinv2.inference.segments import Frame, SegmentCutter
from video_swinv2.inference.streams import FrameStream
from video_swinv2.report.scores import load_scores
from video_swinv2.weights.formats import read_checkpoint
from video_swinv2.weights.store import Preprocessing, load_model

LIMIT_SECONDS = 30.0


def reader(path: Path) -> None:
    """Open, and decode frames in the ways that training, testing and annotation do."""
    with VideoReader(path, time_limit_seconds=LIMIT_SECONDS) as video:
        count = len(video)
        video.frames(sorted({0, count // 2, count - 1}), short_side=32)
        video.frames([count - 1])
        for _, frame in video.sequence():
            video.picture(frame, short_side=16)


def samples(path: Path) -> None:
    """A training sample and a validation sample."""
    data = DataConfig(
        source=str(path.parent), image_size=32, frames=4, short_side=36, workers=0, decode_seconds=LIMIT_SECONDS
    )
    entries = [Entry(path.name, str(path), 0), Entry("sound.mp4", str(_sound_clip()), 0)]
    for augment in (AugmentConfig(rand_augment=2, erasing=0.25), None):
        broken = SampleDataset(entries, data, augment, 0, None)[0, 0].broken
        if broken:
            raise UserError(broken[0])


def views(path: Path) -> None:
    """The views of a test."""
    groups = VideoGroups(
        [Entry(path.name, str(path), 0)],
        find_protocol("videoswin-4x3"),
        Preprocessing(frames=4, frame_stride=2, image_size=(32, 32)),
        group_videos=1,
        frame_order="in-order",
        seed=0,
        time_limit_seconds=LIMIT_SECONDS,
    )
    record, _ = groups.read(0)
    if record.reason:
        raise UserError(f"{path}: {record.reason}")


def prepare(path: Path) -> None:
    """The job of a preparation."""
    target = path.parent / "prepared" / f"{path.stem}.mp4"
    outcome = transcode_video(
        TranscodeJob(0, path, target, TranscodeSettings(short_side=32, fps=25.0)), lambda seconds: None
    )
    target.unlink(missing_ok=True)
    if outcome.reason:
        raise UserError(f"{path}: {outcome.reason}: {outcome.detail}")


def predict_file(path: Path) -> None:
    """`predict FILE`."""
    (found,) = predict(_model(), [path], device="cpu", workers=0, time_limit_seconds=LIMIT_SECONDS)
    if found.error:
        raise UserError(f"{path}: {found.error}")


def stream(path: Path) -> None:
    """What `predict FILE --every 0.2` and the page do in the process that they start for each file."""
    cutter = SegmentCutter(frames=4, stride=2, every_seconds=0.2)
    with FrameStream(str(path), wait_seconds=LIMIT_SECONDS) as frames:
        for index, (seconds, frame) in enumerate(frames):
            cutter.add(Frame(index, seconds, frames.image(frame, 32)[None]))
    cutter.finish()


def checkpoint(path: Path) -> None:
    """A checkpoint of any layout, and a model of ours."""
    read_checkpoint(path)
    if path.suffix == ".safetensors":
        load_model(path)


def video_list(path: Path) -> None:
    """A list as `train` and `test` read it, and as `prepare` does."""
    _read_splits(path)
    plan_preparation(path)


def record(path: Path) -> None:
    """The dataset.json of a prepared data set, as `train` and `test` read it."""
    _read_splits(path.parent)


def _read_splits(source: Path) -> None:
    for split in find_splits(source):
        read_manifest(source, split)


def boxes(path: Path) -> None:
    """The annotations of a detection data set, whose images are beside them, and every item."""
    # Inside the folder of the annotations, so that an error that names an image names that folder, too.
    with tempfile.TemporaryDirectory(dir=path.parent) as root:
        links = ("train",) if path.suffix == ".json" else ("Annotations", "JPEGImages")
        for name in links:
            Path(root, name).symlink_to(path.parent)
        for drop_faulty in (False, True):
            dataset = DetectionDataset(root, "train", drop_faulty=drop_faulty, ignored=True)
            dataset.check()
            for place in range(len(dataset)):
                dataset[place]


def shard(path: Path) -> None:
    """The index of a shard of images."""
    shard_collection(str(path))


def archive(path: Path) -> None:
    """The extraction of an archive of videos."""
    folder = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        unpack(path, folder / "unpacked")
    finally:
        shutil.rmtree(folder)


TARGETS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "video": (reader, samples, views, prepare, predict_file, stream),
    "image": (read_image,),
    "model": (checkpoint,),
    "scores": (load_scores,),
    "shard": (shard,),
    "archive": (archive,),
    "list": (video_list,),
    "record": (record,),
    "config": (load_config,),
    "boxes": (boxes,),
}


@cache
def _model() -> Path:
    return save_model(Path(tempfile.mkdtemp()) / "model.safetensors", 4)


@cache
def _sound_clip() -> Path:
    """A clip that can be read, which stands in for those that cannot."""
    return write_video(Path(tempfile.mkdtemp()) / "sound.mp4", 0, 0)


torch.set_num_threads(1)
