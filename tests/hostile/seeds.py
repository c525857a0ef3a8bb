"""Seeds of the fuzzer: small sound files of every kind that is read, and how each kind is damaged.

Nothing here is downloaded or committed as a binary: videos are encoded by PyAV, the other files by the libraries that
users write them with.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from data_prep.jobs import TranscodeSettings
from data_prep.prepare import prepare
from tests.data.mutations import KINDS, MUTATIONS
from tests.hostile.bounded import REPOSITORY
from tests.inference.conftest import save_model
from video_swinv2.dense.outlines import encode_mask
from video_swinv2.report.scores import Scores, save_scores
from video_swinv2.weights.store import load_model

# (height, width), frames, frames per second, whether the times of the frames are irregular
SHAPES = (
    ((48, 64), 12, Fraction(25), False),
    ((18, 34), 5, Fraction(30000, 1001), False),
    ((96, 64), 40, Fraction(50), True),
)
# Beside the combinations of tests.data.mutations: (suffix, codec, pixel format, options).
MORE_KINDS = (
    ("mpg", "mpeg2video", "yuv420p", {"bf": "2"}),
    ("ts", "mpeg2video", "yuv420p", {}),
    ("wmv", "wmv2", "yuv420p", {}),
    ("avi", "msmpeg4", "yuv420p", {}),
    ("avi", "huffyuv", "yuv422p", {}),
    ("mov", "prores_ks", "yuv422p10le", {}),
    ("mov", "qtrle", "rgb24", {}),
    ("mkv", "ffv1", "yuv420p", {}),
    ("mp4", "libsvtav1", "yuv420p", {"preset": "12"}),
)
HOSTILE_TEXTS = (
    *("", "\0", "\x1b]0;x\x07", "\u2028", "\ud7ff", "=1+1", "@x", "-", "../../x", "/etc/passwd", ".", "~", "%s", "{}"),
    *("nan", "inf", "-1", "1e309", "9" * 5000, "1" * 30, "0x10", "1_0", "null", "true", "[" * 3000, "{" * 3000),
    *('{"a":' * 3000, "a: &a [*a]", "&a [x,x]", "!!python/object:os.system x", "<<: *a", "\t", '"', "'", "#", "\r"),
)


class Settings:
    """An object such as people save beside weights."""

    def __init__(self) -> None:
        self.depths, self.name = [2, 2], "tiny"


def write_video(path: Path, kind: int, shape: int) -> Path:
    """Coarse noise in one of the combinations of container and codec, and one of the shapes."""
    _, codec, pixel_format, options = (*KINDS, *MORE_KINDS)[kind]
    (height, width), frames, rate, irregular = SHAPES[shape]
    if codec in ("libx265", "wmv2", "msmpeg4", "libsvtav1"):  # fail or crash with smaller pictures
        height, width = max(64, height), max(64, width)
    noise = np.random.default_rng(kind).integers(0, 256, (frames, height // 2, width // 2, 3), dtype=np.uint8)
    noise = noise.repeat(2, 1).repeat(2, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        # Containers that store a time for each picture can have irregular ones.
        times = np.arange(frames)
        if irregular and path.suffix in (".mp4", ".mkv", ".webm", ".mov") and codec in ("libx264", "mjpeg", "ffv1"):
            times = np.cumsum(np.random.default_rng(kind).integers(1, 9, frames))
        for time, image in zip(times, noise, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixel_format)
            frame.pts, frame.time_base = int(time), 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_seeds(folder: Path, kinds: Iterable[str]) -> dict[str, list[Path]]:
    """Write the seeds of some kinds to `folder` and return their paths by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    clip = write_video(folder / "clip.mp4", 0, 0)
    writers: dict[str, Callable[[Path, Path], list[Path]]] = {
        "video": _videos,
        "image": _images,
        "model": _models,
        "scores": _scores,
        "shard": _shard,
        "archive": _archive,
        "list": _lists,
        "record": _prepared,
        "config": _configs,
        "boxes": _boxes,
    }
    return {kind: writers[kind](folder, clip) for kind in kinds}


def _videos(folder: Path, clip: Path) -> list[Path]:
    """Every combination of container and codec in every shape."""
    return [
        write_video(folder / f"{kind:02d}-{codec}-{shape}.{suffix}", kind, shape)
        for kind, (suffix, codec, *_) in enumerate((*KINDS, *MORE_KINDS))
        for shape in range(len(SHAPES))
    ]


def _models(folder: Path, clip: Path) -> list[Path]:
    """One model in our format, and in torch's two, with an object beside its tensors in one of them."""
    ours = save_model(folder / "ours.safetensors", 4)
    state = load_model(ours).state_dict()
    torch.save({"model": state, "epoch": 3}, folder / "zip.pth")
    torch.save({"model": state, "config": Settings()}, folder / "object.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return [ours, *(folder / f"{name}.pth" for name in ("zip", "object", "legacy"))]


def _scores(folder: Path, clip: Path) -> list[Path]:
    rng, path = np.random.default_rng(0), folder / "scores.npz"
    save_scores(
        Scores(
            paths=("a.mp4", "b.mp4", "c.mp4"),
            labels=np.array([0, 1, 1]),
            logits=rng.normal(size=(3, 2, 2)).astype(np.float16),
            views=np.zeros((3, 2, 5), dtype=np.int32),
            reasons=("", "", ""),
            classes=("run", "walk"),
            metadata={"protocol": {"name": "center"}, "origins": ["a", "b", "c"]},
        ),
        path,
    )
    return [path]


def _images(folder: Path, clip: Path) -> list[Path]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))
    paths = [folder / f"image.{suffix}" for suffix in ("jpg", "png", "gif", "webp", "bmp", "tif")]
    for path in paths:
        image.save(path)
    return paths


def _shard(folder: Path, clip: Path) -> list[Path]:
    """A WebDataset shard of images with labels."""
    path = folder / "train-00.tar"
    content = io.BytesIO()
    Image.new("RGB", (20, 20)).save(content, "jpeg")
    with tarfile.open(path, "w") as tar:
        for number in range(4):
            for suffix, data in (("jpg", content.getvalue()), ("cls", b"%d" % (number % 2)), ("json", b'{"label": 1}')):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return [path]


def _archive(folder: Path, clip: Path) -> list[Path]:
    """An archive of videos as Kinetics is distributed, with names too long for a plain header."""
    path = folder / "videos.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(3):
            tar.add(clip, f"{'long ' * 30}/{number}.mp4")
    return [path]


def _lists(folder: Path, clip: Path) -> list[Path]:
    """Each form of list, with the videos that it names."""
    names = [f"{number}.mp4" for number in range(4)]
    texts = {
        "plain.txt": "".join(f"{name} {i % 2}\n" for i, name in enumerate(names)),
        "header.csv": "path,label,split\n" + "".join(f"{name},c {i % 2},train\n" for i, name in enumerate(names)),
        "kinetics.csv": "label,youtube_id,time_start,time_end,split\n"
        + "".join(f"class {i % 2},abcdefghij{i},{i},{i + 10},train\n" for i in range(4)),
    }
    paths = []
    for name, text in texts.items():
        root = folder / Path(name).stem
        root.mkdir()
        for video in (*names, "abcdefghij0.mp4"):
            shutil.copy(clip, root / video)
        paths.append(root / name)
        paths[-1].write_text(text)
    return paths


def _prepared(folder: Path, clip: Path) -> list[Path]:
    """The dataset.json of a prepared data set."""
    root = folder / "prepared"
    for number in range(2):
        (root / f"raw/class {number}").mkdir(parents=True)
        shutil.copy(clip, root / f"raw/class {number}/{number}.mp4")
    prepare(root / "raw", root / "out", TranscodeSettings(short_side=32), workers=1)
    return [root / "out" / "dataset.json"]


def _configs(folder: Path, clip: Path) -> list[Path]:
    recipes = sorted((REPOSITORY / "configs").rglob("*.yaml"))
    return [Path(shutil.copy(path, folder / f"{number}-{path.name}")) for number, path in enumerate(recipes[:6])]


def _boxes(folder: Path, clip: Path) -> list[Path]:
    """Annotations in COCO's and VOC's layouts, each beside its images."""
    root = folder / "boxes"
    for layout in ("coco", "voc"):
        (root / layout).mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("RGB", (30, 20)).save(root / layout / f"{name}.png")
    text = """{"images": [
{"id": 1, "file_name": "a.png", "height": 20, "width": 30},
{"id": 2, "file_name": "b.png", "height": 20, "width": 30}],
"categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
"annotations": [
{"id": 1, "image_id": 1, "category_id": 3, "bbox": [2, 3, 10, 8], "area": 80, "segmentation": [[2, 3, 12, 3, 12, 11]]},
{"id": 2, "image_id": 1, "category_id": 7, "bbox": [0, 0, 4, 5], "iscrowd": 1, "segmentation":
{"size": [20, 30], "counts": [0, 5, 15, 5, 15, 5, 15, 5, 535]}},
{"id": 3, "image_id": 2, "category_id": 3, "bbox": [1, 2, 3, 4], "segmentation": {"size": [20, 30], "counts": "TEXT"}}]}
"""
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[2:6, 1:4] = 1
    coco = root / "coco" / "_annotations.coco.json"
    coco.write_text(text.replace("TEXT", str(encode_mask(mask)["counts"])))
    voc = root / "voc" / "a.xml"
    voc.write_text(
        "<annotation><size>\n<width>30</width>\n<height>20</height></size>\n<object><name>cat</name>\n"
        "<difficult>0</difficult><bndbox>\n<xmin>3</xmin><ymin>4</ymin>\n<xmax>12</xmax><ymax>11</ymax>\n</bndbox>"
        "</object></annotation>\n"
    )
    return [coco, voc]


def mutate(data: bytes, kind: str, number: int) -> tuple[bytes, str]:
    """Mutation `number` of the content of a file of some kind -> (content, what was done); a function of all three."""
    rng = np.random.default_rng(number)
    changes = TEXT_MUTATIONS if kind in ("list", "record", "config", "boxes") else BINARY_MUTATIONS
    done = []
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        change = changes[int(rng.integers(len(changes)))]
        data = change(bytearray(data or b"\0"), rng)
        done.append(change.__name__)
    return data, "+".join(done)


def insert_text(data: bytearray, rng: np.random.Generator) -> bytes:
    """Put a hostile text anywhere, or in place of a word, a number or the rest of a line."""
    text = HOSTILE_TEXTS[int(rng.integers(len(HOSTILE_TEXTS)))].encode()
    start = int(rng.integers(len(data)))
    stop = start + int(rng.choice([0, 1, 3, 8, 30]))
    if rng.random() < 0.6:  # a whole token
        while start and chr(data[start - 1]) not in ' ,:\t\n"':
            start -= 1
        stop = start
        while stop < len(data) and chr(data[stop]) not in ' ,:\t\n"':
            stop += 1
    return bytes(data[:start] + text + data[stop:])


def move_line(data: bytearray, rng: np.random.Generator) -> bytes:
    lines = bytes(data).split(b"\n")
    line = lines.pop(int(rng.integers(len(lines))))
    lines.insert(int(rng.integers(len(lines) + 1)), line)
    return b"\n".join(lines)


def indent_line(data: bytearray, rng: np.random.Generator) -> bytes:
    lines = bytes(data).split(b"\n")
    place = int(rng.integers(len(lines)))
    lines[place] = b" " * int(rng.choice([1, 2, 4])) + lines[place]
    return b"\n".join(lines)


def set_number(data: bytearray, rng: np.random.Generator) -> bytes:
    """Overwrite two to eight bytes of the first 4 KiB with an extreme number: sizes, offsets, counts."""
    width = int(rng.choice([2, 4, 8]))
    value = int(rng.choice([0, 1, 2**8, 2**16, 2**31 - 1, 2**31, 2**32 - 1])) % 256**width
    start = int(rng.integers(max(1, min(len(data), 4096))))
    data[start : start + width] = value.to_bytes(width, str(rng.choice(["little", "big"])))
    return bytes(data)


Mutation = Callable[[bytearray, np.random.Generator], bytes]
BINARY_MUTATIONS: tuple[Mutation, ...] = (*MUTATIONS, set_number)
TEXT_MUTATIONS: tuple[Mutation, ...] = (
    *(insert_text, insert_text, insert_text, move_line, indent_line),
    *MUTATIONS[:6],
)
