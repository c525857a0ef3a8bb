"""What a model says about video and image files: the likeliest classes of each; a broken file is reported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from video_swinv2.data.datasets import IMAGE_SUFFIXES, read_image
from video_swinv2.data.manifest import VIDEO_SUFFIXES, Entry
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.metrics import average_views, ranking
from video_swinv2.evaluation.overrides import Device, Precision, pick_device, use_bf16
from video_swinv2.evaluation.protocols import Protocol, find_protocol, of_stills
from video_swinv2.evaluation.reading import Group, VideoGroups, default_workers, deliver_groups
from video_swinv2.evaluation.testing import answer_views
from video_swinv2.evaluation.views import cut_image
from video_swinv2.weights.store import ModelCard, Preprocessing, load_model, read_card

VIDEO = "video"
IMAGE = "image"
_HEAD_BYTES = 400
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_STILL_BRANDS = (b"heic", b"heix", b"mif1", b"avif")
_VIDEO_STARTS = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"FLV\x01",
    b"OggS",
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG video
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
)
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8")


@dataclass(frozen=True)
class Answer:
    """A class and its probability, 0..1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a file, likeliest first; none, and the error, where it could not be read."""

    path: str
    answers: tuple[Answer, ...]
    error: str = ""


@dataclass(frozen=True)
class _Judge:
    """A model and all that turns the views of a file into answers."""

    model: nn.Module
    card: ModelCard
    protocol: Protocol
    top: int
    batch_views: int
    bf16: bool

    def answers(self, pixels: Tensor) -> tuple[Answer, ...]:
        """uint8 (V, 3, [T,] H, W) -> the likeliest classes, views averaged as the protocol says."""
        preprocessing = self.card.preprocessing
        logits = answer_views(self.model, pixels, preprocessing, batch=self.batch_views, bf16=self.bf16)
        probabilities = average_views(logits.double().numpy()[None], self.protocol.average)
        best = ranking(probabilities, self.top)[0]
        return tuple(Answer(self.card.classes[i], float(probabilities[0, i])) for i in best)


def predict(
    model_path: Path | str,
    paths: Sequence[Path | str],
    *,
    top: int = 5,
    protocol: str = "videoswin-4x3",
    device: Device = "auto",
    precision: Precision = "auto",
    batch_views: int = 12,
    workers: int | None = None,
    time_limit_seconds: float = 60.0,
) -> list[Prediction]:
    """Predictions for files and for all videos (for an image model: images) in folders, in the order found.

    workers: reading processes, by default one per core and at most 8. Raises UsageError for a model without class
    names, an unknown protocol, and a folder that holds no such file.
    """
    if top < 1 or batch_views < 1:
        raise UsageError("top and batch_views must be 1 or more")
    card, place = read_card(model_path), pick_device(device)
    if not card.classes:
        raise UsageError(f"{model_path}: holds no class names; save the model with classes")
    chosen, bf16 = find_protocol(protocol), use_bf16(precision, place)
    found = find_files([Path(path) for path in paths], IMAGE if card.preprocessing.frames is None else VIDEO)
    judge = _Judge(load_model(model_path).to(place), card, chosen, top, batch_views, bf16)
    results = {i: _predict_other(path, kind, judge) for i, (path, kind) in enumerate(found) if kind != VIDEO}
    videos = [i for i, (_, kind) in enumerate(found) if kind == VIDEO]
    groups = VideoGroups(
        [Entry(str(found[i][0]), found[i][0].absolute(), -1) for i in videos],
        chosen,
        card.preprocessing,
        group_videos=1,
        frame_order="in-order",
        seed=0,
        time_limit_seconds=time_limit_seconds,
    )

    def deliver(group: Group, waited_seconds: float) -> None:
        (record,) = group.videos
        answers = () if record.reason else judge.answers(group.pixels)
        place_in_list = videos[record.position]
        results[place_in_list] = Prediction(str(found[place_in_list][0]), answers, record.reason)

    deliver_groups(groups, range(len(groups)), default_workers() if workers is None else workers, deliver)
    return [results[i] for i in range(len(found))]


def show(predictions: Sequence[Prediction], *, as_json: bool) -> str:
    """Predictions for people, or as a JSON list of {path, answers: [{name, probability}], error}."""
    if as_json:
        return json.dumps([asdict(prediction) for prediction in predictions], indent=1)
    lines = []
    for prediction in predictions:
        lines.append(f"{prediction.path}: {prediction.error}" if prediction.error else prediction.path)
        lines += [f"  {100 * answer.probability:5.1f} %  {answer.name}" for answer in prediction.answers]
    return "\n".join(lines)


def find_files(paths: Sequence[Path], wanted: str) -> list[tuple[Path, str | None]]:
    """(file, its kind): files given by name whatever they are, and those of the kind `wanted` in folders, sorted.

    Raises UsageError for a folder that holds none.
    """
    found: list[tuple[Path, str | None]] = []
    for path in paths:
        if not path.is_dir():
            found.append((path, kind_of(path)))
            continue
        inside = [file for file in sorted(path.rglob("*")) if file.is_file() and kind_of(file) == wanted]
        if not inside:
            raise UsageError(f"{path}: no {wanted} in this folder, and this model takes {wanted}s")
        found += [(file, wanted) for file in inside]
    return found


def kind_of(path: Path) -> str | None:
    """VIDEO or IMAGE by the first bytes, else by the suffix, so that a broken video is still one; None for neither."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError:
        head = b""
    suffix = path.suffix.lower()
    by_suffix = VIDEO if suffix in VIDEO_SUFFIXES else IMAGE if suffix in IMAGE_SUFFIXES else None
    return kind_of_bytes(head) or by_suffix


def kind_of_bytes(head: bytes) -> str | None:
    """VIDEO or IMAGE by the marks that containers begin with; None for none of them."""
    riff = head[8:12] if head.startswith(b"RIFF") else b""
    mpeg_ts = len(head) > 376 and head[0] == head[188] == head[376] == 0x47
    still = head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS
    if head.startswith(_IMAGE_STARTS) or riff == b"WEBP" or still:
        return IMAGE
    if head.startswith(_VIDEO_STARTS) or head[4:8] in _MP4_BOXES or riff == b"AVI " or mpeg_ts:
        return VIDEO
    return None


def _predict_other(path: Path, kind: str | None, judge: _Judge) -> Prediction:
    """An image for an image model; the error for anything that is not read."""
    if not path.exists():
        return Prediction(str(path), (), "no such file")
    if kind != IMAGE:
        return Prediction(str(path), (), "neither a video nor an image")
    if judge.card.preprocessing.frames is not None:
        return Prediction(str(path), (), "an image, and this model takes videos")
    try:
        pixels = read_image_views(path, judge.protocol, judge.card.preprocessing)
    except UserError as error:
        return Prediction(str(path), (), str(error).removeprefix(f"{path}: "))
    return Prediction(str(path), judge.answers(pixels))


def read_image_views(path: Path, protocol: Protocol, preprocessing: Preprocessing) -> Tensor:
    """The different views of a still -> uint8 (V, 3, H, W), turned as its EXIF says. UserError where it is none."""
    return cut_image(read_image(path), of_stills(protocol), preprocessing)[0]
