"""torchcodec and decord on prepared data sets: the same pictures as PyAV, in swscale's default colours."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.jobs import TranscodeSettings
from data_prep.prepare import prepare
from video_swinv2.config import AugmentConfig, DataConfig
from video_swinv2.data.datasets import SampleDataset
from video_swinv2.data.decode import DecodeError, VideoReader
from video_swinv2.data.decoders import OTHER_DECODERS, Decoder, PreparedReader, choose_decoder, open_video, why_missing
from video_swinv2.data.loading import validation_loader
from video_swinv2.data.sources import labelled_manifest
from video_swinv2.errors import UsageError

HERE = {name: why_missing(name) for name in OTHER_DECODERS}
OTHERS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=f"{name} does not load ({reason})"))
    for name, reason in HERE.items()
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """A prepared data set of three noisy videos of 40 frames, the last two of other sizes."""
    folder = tmp_path_factory.mktemp("decoders")
    noise = np.random.default_rng(0)
    for name, size in (("x/a", (48, 64)), ("y/b", (66, 50)), ("y/c", (64, 130))):
        # Coarse noise, so that it survives the encoder and shows how chroma is interpolated.
        coarse = noise.integers(0, 256, (40, -(-size[0] // 8), -(-size[1] // 8), 3), np.uint8)
        fine = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, : size[0], : size[1]]
        write_video(folder / "raw" / "train" / f"{name}.mp4", fine)
    prepare(folder / "raw", folder / "out", TranscodeSettings(short_side=64), workers=1, log=lambda text: None)
    return folder / "out"


def default_colours(path: Path, indices: list[int]) -> torch.Tensor:
    """PyAV's frames (len(indices), 3, H, W), converted as swscale does unless it is told otherwise."""
    with VideoReader(path) as reader:
        frames = {index: frame.to_ndarray(format="rgb24") for index, frame in reader.sequence() if index in indices}
    return torch.from_numpy(np.stack([frames[index] for index in indices])).permute(0, 3, 1, 2)


def same_pictures(path: Path, decoder: Decoder, indices: list[int]) -> bool:
    """Whether another decoder reads a prepared video and gives PyAV's pictures, bit for bit before the colours."""
    with open_video(path, decoder) as reader:
        assert isinstance(reader, PreparedReader)
        return torch.equal(reader.frames(indices), default_colours(path, indices))


@pytest.mark.parametrize("decoder", OTHERS)
def test_the_pictures_are_the_same(data: Path, decoder: Decoder) -> None:
    for path in sorted((data / "videos").rglob("*.mp4")):
        assert same_pictures(path, decoder, [39, 0, 17, 17, 3, 16, 31])
        with open_video(path, decoder) as reader, VideoReader(path) as ours:
            assert (len(reader), reader.size) == (len(ours), ours.size)
            # What the default colours cost; decord's and torchcodec's frames have them.
            away = reader.frames(range(40)).int() - ours.frames(range(40)).int()
            assert -3 < float(away.float().mean()) < 0
            whole = reader.frames([5, 20], 32)
            assert min(whole.shape[-2:]) == 32
            crop = reader.frames([20, 5], 32, lambda height, width: (3, 7, height - 5, width - 9))
            assert torch.equal(crop, whole[[1, 0], :, 3:-2, 7:-2])
            for wrong in ([], [-1], [40]):
                with pytest.raises(IndexError, match=r"frames 0\.\.39"):
                    reader.frames(wrong)


@pytest.mark.parametrize("decoder", OTHERS)
def test_real_clips_whose_header_is_as_prepared_give_the_same_pictures(outside_data: Path, decoder: Decoder) -> None:
    compared = 0
    for path in sorted((outside_data / "odd_clips").glob("*.m*")):
        # What only the record of `prepare` keeps out: a damaged frame, and a rotation that the header does not show.
        if path.name in ("decord__corrupted.mp4", "mp4p__video_rotation_90.mp4"):
            continue
        try:
            with open_video(path, decoder) as reader, VideoReader(path) as ours:
                if isinstance(reader, PreparedReader):
                    assert len(reader) == len(ours), path.name
                    indices = [len(ours) - 1, 0, len(ours) // 2]
                    assert torch.equal(reader.frames(indices), default_colours(path, indices)), path.name
                    compared += 1
        except DecodeError:
            continue  # refused, if not by PyAV then by decord, whose FFmpeg is old
    assert compared >= 7


@pytest.mark.parametrize("decoder", OTHERS)
def test_real_clips_give_the_same_pictures_once_they_are_prepared(
    outside_data: Path, tmp_path: Path, decoder: Decoder
) -> None:
    """The slow test of tests/data_prep/test_real_clips.py does it with all of them."""
    names = ["decord__video_90.mov", "tc__var_fps_video.mp4", "ft__fixture2.mpg", "mp4p__video_rotation_90.mp4"]
    (tmp_path / "raw" / "odd").mkdir(parents=True)
    for name in names:
        (tmp_path / "raw" / "odd" / name).symlink_to(outside_data / "odd_clips" / name)
    prepare(tmp_path / "raw", tmp_path / "out", TranscodeSettings(short_side=96), workers=1, log=lambda text: None)
    paths = list((tmp_path / "out" / "videos").rglob("*.mp4"))
    assert len(paths) == len(names)
    for path in paths:
        with VideoReader(path) as ours:
            indices = np.random.default_rng(0).integers(0, len(ours), 9).tolist()
        assert same_pictures(path, decoder, indices), path.name


@pytest.mark.parametrize("decoder", list(OTHER_DECODERS))
def test_pyav_reads_or_refuses_every_other_file(
    tmp_path: Path, write_video: Callable[..., Path], decoder: Decoder
) -> None:
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    for path in (
        write_video(tmp_path / "a.mkv", frames),
        write_video(tmp_path / "b.mp4", frames, codec="mpeg4"),
        write_video(tmp_path / "c.mp4", frames, lossless=True),
    ):
        with open_video(path, decoder) as reader:
            assert isinstance(reader, VideoReader)
            assert len(reader) == 4
    for path, what in ((tmp_path / "none.mp4", "no such file"), (tmp_path, "is not a file")):
        with pytest.raises(DecodeError, match=what):
            open_video(path, decoder)
    with pytest.raises(DecodeError, match="exceeds max_pixels = 1000"):
        open_video(write_video(tmp_path / "d.mp4", frames), decoder, max_pixels=1000)


def config(source: Path, decoder: str, **changes: object) -> DataConfig:
    values = {"image_size": 32, "frames": 4, "workers": 0, "val_split": "train"} | changes
    return DataConfig(source=(str(source),), decoder=decoder, **values)  # type: ignore[arg-type]  # pydantic checks


@pytest.mark.parametrize("decoder", OTHERS)
def test_another_decoder_reads_unchanged_prepared_data_only(data: Path, tmp_path: Path, decoder: str) -> None:
    assert choose_decoder(config(data, decoder)) == decoder
    assert choose_decoder(config(data, "auto")) == choose_decoder(config(data, "pyav")) == "pyav"
    raw = data.parent / "raw"
    assert choose_decoder(config(raw, decoder)) == "pyav"
    mixed = DataConfig(source=(str(data), str(raw)), image_size=32, decoder=decoder)  # type: ignore[arg-type]
    assert choose_decoder(mixed) == "pyav"
    shutil.copytree(data, tmp_path / "edited")
    with (tmp_path / "edited" / "train.csv").open("a") as file:
        file.write("other.mp4,x\n")
    assert choose_decoder(config(tmp_path / "edited", decoder)) == "pyav"


def test_a_decoder_that_does_not_load_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(
        UsageError, match=r"data\.decoder: decord does not load \(.*\); install decord, or set it to auto"
    ):
        choose_decoder(config(data, "decord"))
    assert choose_decoder(config(data, "auto")) == "pyav"


@pytest.mark.parametrize("decoder", OTHERS)
def test_training_reads_through_it(data: Path, tmp_path: Path, decoder: str) -> None:
    """In workers too; a clip that was damaged later is replaced and named."""
    entries = labelled_manifest(config(data, decoder), "train").entries
    ours, theirs = (
        SampleDataset(entries, config(data, name, workers=2), AugmentConfig(crop_area=(0.5, 1.0)), 0, None)
        for name in ("pyav", decoder)
    )
    assert (ours.decoder, theirs.decoder) == ("pyav", decoder)
    here = [theirs[0, number] for number in range(3)]
    for sample, number in zip(here, range(3), strict=True):
        other = ours[0, number]
        assert not torch.equal(sample.pixels, other.pixels)
        assert float((sample.pixels.int() - other.pixels.int()).float().abs().mean()) < 8
    apart = [batch.pixels[0] for batch in validation_loader(theirs, 1, rank=0, world=1, pin=False)]
    assert all(torch.equal(a, b.pixels) for a, b in zip(apart, here, strict=True))
    shutil.copytree(data, tmp_path / "damaged")
    clip = tmp_path / "damaged" / "videos" / "train" / "x" / "a.mp4"
    content = clip.read_bytes()
    clip.write_bytes(content[: content.index(b"mdat")] + bytes(len(content) - content.index(b"mdat")))
    entries = labelled_manifest(config(tmp_path / "damaged", decoder), "train").entries
    damaged = SampleDataset(entries, config(tmp_path / "damaged", decoder), AugmentConfig(), 0, None)
    assert damaged.decoder == decoder
    assert [str(clip) in line for line in damaged[0, 0].broken] == [True]
