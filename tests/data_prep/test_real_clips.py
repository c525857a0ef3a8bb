"""All real videos in one run: each gets the right outcome, and the results decode alike in every decoder."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.jobs import TranscodeSettings
from data_prep.prepare import prepare
from data_prep.state import PreparationState
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.decoders import OTHER_DECODERS, Decoder, PreparedReader, open_video, why_missing
from video_swinv2.data.media import VIDEO_SUFFIXES

TOPS = ("raw_clips", "ut_interaction", "odd_clips")
# Outcomes that differ from what a decoder finds when it simply reads from the start.
EXPECTED = {"cannot open": {"not_video", "empty"}, "no frames": {"no_frames", "not_video"}, "hdr": {"hdr"}}


def link_all(data: Path, source: Path) -> None:
    for top in TOPS:
        for path in (data / top).rglob("*"):
            if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
                link = source / "_".join((top, *path.relative_to(data / top).parts[:-1])) / path.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)


@pytest.fixture(scope="module")
def prepared(outside_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, object]]]:
    folder = tmp_path_factory.mktemp("real")
    link_all(outside_data, folder / "raw")
    prepare(folder / "raw", folder / "out", TranscodeSettings(short_side=128), workers=2, log=lambda text: None)
    with PreparationState(folder / "out") as state:
        return folder, {row["name"]: dict(row) for row in state.rows()}


@pytest.mark.slow
def test_every_file_gets_the_right_outcome(
    prepared: tuple[Path, dict[str, dict[str, object]]], outside_data: Path
) -> None:
    _, rows = prepared
    assert {row["status"] for row in rows.values()} == {"ok", "failed"}
    assert all(row["status"] == "ok" for name, row in rows.items() if not name.startswith("odd_clips"))
    wrong = []
    with (outside_data / "odd_clips" / "expected.csv").open(newline="") as file:
        for known in csv.DictReader(file):
            folder, _, name = known["file"].rpartition("/")
            row = rows.get(f"{'odd_clips_' + folder if folder else 'odd_clips'}/{name}")
            if row is None:
                assert Path(name).suffix not in VIDEO_SUFFIXES
                continue
            ending = "no frames" if known["decoded_frames"] == "0" else known["pyav"]
            ending = "hdr" if any(kind in name for kind in ("_hdr10", "_hlg", "_nclx_and_icc")) else ending
            fits = row["reason"] in EXPECTED.get(ending, {None, ""})
            if ending == "ok":  # nine in ten of the frames, or more where damaged packets are passed over
                fits = fits and int(row["frames"]) >= 0.9 * int(known["decoded_frames"])  # type: ignore[call-overload]
            if not fits:
                wrong.append((known["file"], ending, row["reason"], row["frames"], known["decoded_frames"]))
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("decoder", list(OTHER_DECODERS))
def test_prepared_videos_decode_alike(prepared: tuple[Path, dict[str, dict[str, object]]], decoder: Decoder) -> None:
    if reason := why_missing(decoder):
        pytest.skip(f"{decoder} does not load here ({reason})")
    folder, rows = prepared
    compared = 0
    for name, row in rows.items():
        if row["status"] != "ok" or min(int(row["height"]), int(row["width"])) < 16:  # type: ignore[call-overload]
            continue
        path = folder / "out" / str(row["target"])
        with VideoReader(path) as ours, open_video(path, decoder) as theirs:
            assert isinstance(theirs, PreparedReader), name
            assert len(theirs) == len(ours) == row["frames"], name
            indices = np.random.default_rng(0).integers(0, len(ours), 9).tolist()
            # In the colours of swscale's default arithmetic, which the other decoders use.
            frames = {index: frame.to_ndarray(format="rgb24") for index, frame in ours.sequence() if index in indices}
            wanted = torch.from_numpy(np.stack([frames[index] for index in indices])).permute(0, 3, 1, 2)
            assert torch.equal(theirs.frames(indices), wanted), name
        compared += 1
    assert compared > 200
