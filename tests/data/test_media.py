"""Whether a file is a video or an image is decided by its content; training and preparation agree on it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.jobs import TranscodeJob, TranscodeSettings
from data_prep.transcode import transcode_video
from video_swinv2.config import AugmentConfig, DataConfig
from video_swinv2.data.datasets import UNREADABLE_LABEL, SampleDataset, collate
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.manifest import Entry
from video_swinv2.data.media import IMAGE, VIDEO, media_type_of, media_type_of_content

PICTURES = [np.full((48, 64, 3), 20 * n, dtype=np.uint8) for n in range(12)]


def gif(pictures: int, **options: object) -> bytes:
    first, *others = map(Image.fromarray, PICTURES[:pictures])
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=40, **options)
    return file.getvalue()


def write_disguised(folder: Path, write_video: Callable[..., Path]) -> dict[str, str]:
    """Write files whose names hide what they are, and GIFs. Returns what each of them is."""
    folder.mkdir(exist_ok=True)
    write_video(folder / "video.mp4", np.stack(PICTURES)).rename(folder / "video.jpg")
    Image.fromarray(PICTURES[6]).save(folder / "image.mp4", format="JPEG")
    (folder / "animated.gif").write_bytes(gif(12))
    (folder / "animated.mp4").write_bytes(gif(12, loop=0))
    (folder / "still.gif").write_bytes(gif(1))
    return {"video.jpg": VIDEO, "image.mp4": IMAGE, "animated.gif": VIDEO, "animated.mp4": VIDEO, "still.gif": IMAGE}


def test_content_decides_and_the_name_where_it_does_not(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    kinds = write_disguised(tmp_path, write_video)
    assert {name: media_type_of(tmp_path / name) for name in kinds} == kinds
    (tmp_path / "damaged.webm").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for a writer
    names = {"damaged.webm": VIDEO, "pipe.png": IMAGE, "gone.png": IMAGE, "gone.txt": None}
    assert {name: media_type_of(tmp_path / name) for name in names} == names


@pytest.mark.parametrize("colours", [2, 256])
@pytest.mark.parametrize("count", [1, 2, 12])
def test_pictures_of_a_gif_are_counted_as_pillow_counts_them(count: int, colours: int) -> None:
    """Wherever it is cut: from some length on, what is left has a second picture."""
    noise = np.random.default_rng(0).integers(0, colours, (count, 16, 16, 1), dtype=np.uint8)
    first, *others = [Image.fromarray(picture[..., 0]).convert("P") for picture in noise]
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, comment=b"a comment")
    whole = file.getvalue()
    with Image.open(file) as image:
        assert getattr(image, "n_frames", 1) == count
    assert media_type_of_content(file) == (VIDEO if count > 1 else IMAGE)
    kinds = [media_type_of_content(io.BytesIO(whole[:end])) for end in range(6, len(whole), 7)]
    assert kinds == [IMAGE] * kinds.count(IMAGE) + [VIDEO] * kinds.count(VIDEO)


@pytest.mark.parametrize("frames", [4, None])
def test_training_reads_files_as_what_they_are(
    tmp_path: Path, write_video: Callable[..., Path], frames: int | None
) -> None:
    """A clip model takes clips of videos and animated GIFs only; an image among them costs one sample."""
    kinds = write_disguised(tmp_path, write_video)
    entries = [Entry(name, f"{tmp_path}/{name}", 1) for name in kinds]
    data = DataConfig(source=str(tmp_path), image_size=32, frames=frames, frame_stride=2, short_side=32)
    samples = [SampleDataset(entries, data, None, 0, None)[(0, n)] for n in range(len(entries))]
    failed = {name for name, sample in zip(kinds, samples, strict=True) if sample.label == UNREADABLE_LABEL}
    assert failed == (set() if frames is None else {name for name, kind in kinds.items() if kind == IMAGE})
    for name, sample in zip(kinds, samples, strict=True):
        if name in failed:
            assert sample.broken == (f"{tmp_path / name}: is an image, but data.frames asks for clips",)
        elif frames is not None:
            # (3, T, H, W): frames 2, 4, 6 and 8 of the twelve, whose greys differ by 20.
            assert sample.pixels.float().mean((0, 2, 3)).tolist() == pytest.approx([40, 80, 120, 160], abs=4), name
    # In training, other files are read in their place, and a batch is whole.
    random = SampleDataset(entries, data, AugmentConfig(crop_area=(1.0, 1.0), rand_augment=0), 0, None)
    assert collate([random[(0, n)] for n in range(len(entries))]).pixels.shape[0] == len(entries)


def test_preparation_makes_videos_of_animated_gifs_and_refuses_images(
    tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    for name, kind in write_disguised(tmp_path, write_video).items():
        target = tmp_path / "out" / f"{name}.mp4"
        job = TranscodeJob(1, tmp_path / name, target, TranscodeSettings(short_side=32))
        outcome = transcode_video(job, lambda seconds: None)
        if kind == IMAGE:
            assert (outcome.reason, outcome.detail) == ("not_video", "is an image, not a video")
            continue
        assert outcome.reason == ""
        with VideoReader(target) as video:
            greys = video.frames(range(12)).float().mean((1, 2, 3))
        torch.testing.assert_close(greys, torch.arange(12.0) * 20, atol=4, rtol=0)
