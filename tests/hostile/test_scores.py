"""Files of arrays: scores, film strips, galleries, features and the parts of a test, too large or tampered with."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hostile.bounded import GIB, reading, run_bounded
from tests.hostile.tampering import assert_no_faults
from tests.report.report_pages import RECORD, build_scores, make_run
from video_swinv2.errors import UserError
from video_swinv2.evaluation.features import Features, _from_arrays, _to_arrays
from video_swinv2.evaluation.parts import PartFolder, ScoredVideos
from video_swinv2.inference.retrieval import Gallery, load_gallery, save_gallery, search
from video_swinv2.report.compare import compare
from video_swinv2.report.diagnosis import views_curve
from video_swinv2.report.mistakes import Strip, write_strips
from video_swinv2.report.page import write_report
from video_swinv2.report.scores import Scores, read_arrays, save_scores, write_arrays

SECONDS, BYTES = 60, 1.0 * GIB
REPORT = reading("from video_swinv2.report.page import write_report as read")


@pytest.fixture(scope="module")
def scores() -> Scores:
    """Scores of six videos, one of which failed, with the whole record of a test."""
    rng = np.random.default_rng(0)
    record = RECORD | {
        "seconds": 1.5,
        "average": "prob",
        "unit": "videos",
        "lost_in_preparation": 1,
        "protocol_numbers": {"clips": 2, "crops": 1},
        "origins": ["a"] * 6,
        "processes": 2,
        "device": "CPU",
        "decode_wait_share": 0.5,
        "videos_with_damaged_frames": 1,
    }
    return build_scores(rng.integers(0, 3, 6), rng.normal(size=(6, 2, 3)), failed=[4], **record)


def npy(array: np.ndarray, shape: str | None = None) -> bytes:
    """An .npy file, with another shape in its header if one is given."""
    out = io.BytesIO()
    np.save(out, array)
    content = out.getvalue()
    if shape is None:
        return content
    at = content.index(b"'shape': ") + 9
    end = content.index(b", }", at)
    # The header is padded with spaces before its line break, so that its length can stay.
    header = content[10 : content.index(b"\n") + 1]
    changed = header[: at - 10] + shape.encode() + header[end - 10 :].rstrip()
    return content[:10] + changed.ljust(len(header) - 1) + b"\n" + content[10 + len(header) :]


def with_array(folder: Path, scores: Scores, content: bytes, zeros_mib: int = 0) -> Path:
    """A folder of scores with another file of logits, to which so many compressed zeros are added."""
    folder.mkdir()
    save_scores(scores, folder / "whole.npz")
    with zipfile.ZipFile(folder / "whole.npz") as whole, zipfile.ZipFile(folder / "scores.npz", "w") as archive:
        for name in whole.namelist():
            entry = zipfile.ZipInfo(name)
            if name == "logits.npy" and zeros_mib:
                entry.compress_type, entry._compresslevel = zipfile.ZIP_DEFLATED, 1  # type: ignore[attr-defined]
            with archive.open(entry, "w", force_zip64=True) as stream:
                stream.write(content if name == "logits.npy" else whole.read(name))
                for _ in range(zeros_mib if name == "logits.npy" else 0):
                    stream.write(bytes(2**20))
    return folder


def test_files_that_would_be_larger_once_they_are_read(scores: Scores, tmp_path: Path) -> None:
    """A compressed array, shapes beyond the bytes of the file, and elements without bytes."""
    large = npy(scores.logits[:0], "(8, 33554432, 4)")  # 2 GB in a file of 9 MB
    folders = {
        with_array(tmp_path / "deflated", scores, large, 2048): "is compressed",
        with_array(tmp_path / "shape", scores, npy(scores.logits, "(6, 9999999999, 3)")): "declares (6, 9999999999, 3)",
        with_array(tmp_path / "empty", scores, npy(np.zeros(6, "V0"), "(9999999999,)")): "declares (9999999999,)",
        with_array(tmp_path / "deep", scores, npy(scores.logits, "(" * 40)): "EOF",
    }
    ended = run_bounded("-c", REPORT, *folders, cpu_seconds=SECONDS)
    assert ended.code == 0, ended.err[-2000:]
    for line, (folder, reason) in zip(ended.out.splitlines(), folders.items(), strict=True):
        assert line.startswith(f"{folder / 'scores.npz'}: damaged or not an .npz file")
        assert reason in line
    assert ended.peak_bytes < BYTES
    assert ended.cpu_seconds < SECONDS


def test_too_many_views_and_classes_for_a_report(tmp_path: Path) -> None:
    """A curve over 2,000 numbers of views and a confusion matrix of a billion cells, in small files."""
    for views, classes in ((2000, 2), (1, 30_000)):
        save_scores(build_scores(np.array([0, 1]), np.zeros((2, views, classes)), **RECORD), tmp_path / "scores.npz")
        with pytest.raises(UserError, match=f"{views} views and {classes} classes of 2 videos are too many"):
            write_report(tmp_path)


def test_subsets_of_many_views_are_drawn() -> None:
    """15 of 30 clips can be chosen in 155 million ways, which are not listed."""
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 0, 1])
    logits = (rng.normal(size=(4, 30, 2)) + 2 * np.eye(2)[labels][:, None]).astype(np.float16)
    points = views_curve(logits, labels, np.arange(4), (30, 1), average="prob", seed=0)
    assert [(point.clips, point.subsets) for point in points] == [
        (clips, 1 if clips == 30 else 3) for clips in range(1, 31)
    ]
    assert points[-1].top1 == 1


def test_records_of_tests_that_were_tampered_with(scores: Scores, tmp_path: Path) -> None:
    """The metadata of scores, through the report."""
    save_scores(scores, tmp_path / "scores.npz")
    arrays = read_arrays(tmp_path / "scores.npz", "")

    def read(metadata: Any) -> None:
        write_arrays(tmp_path / "scores.npz", arrays | {"metadata": np.array(json.dumps(metadata))})
        write_report(tmp_path)

    read(scores.metadata)
    assert_no_faults(scores.metadata, read, str(tmp_path / "scores.npz"), 201)
    write_arrays(tmp_path / "scores.npz", arrays | {"metadata": np.array("[" * 100_000)})
    other = tmp_path / "other"
    other.mkdir()
    save_scores(scores, other / "scores.npz")
    for read_all in (write_report, lambda folder: compare([other, folder], tmp_path / "out")):
        with pytest.raises(UserError, match=r"scores\.npz: metadata: JSON that is nested too deeply"):
            read_all(tmp_path)


def test_training_runs_that_were_tampered_with(scores: Scores, tmp_path: Path) -> None:
    """run.json and metrics.jsonl, through the report of a test and the run that the user names."""
    save_scores(scores, tmp_path / "scores.npz")
    run = tmp_path / "run"
    make_run(run, data={"data_fingerprint": "ab"}, steps=9)
    record = json.loads((run / "run.json").read_text())
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n')

    def read_run(value: Any) -> None:
        (run / "run.json").write_text(json.dumps(value))
        write_report(tmp_path, run)

    def read_line(value: Any) -> None:
        (run / "metrics.jsonl").write_text(json.dumps(value) + "\n")
        write_report(tmp_path, run)

    assert_no_faults(record, read_run, str(run), 21)
    read_run(record)
    assert_no_faults({"step": 1, "train/loss": 0.5}, read_line, str(run))


OTHER_ARRAYS = {
    "text": np.array(["x"]),
    "one number": np.array(7),
    "no rows": np.zeros((0, 2, 3), np.float16),
    "negative": np.full(6, -1),
    "huge": np.full(6, 2**62),
    "floats": np.full((6, 2), np.nan, np.float32),
    "more axes": np.zeros((6, 2, 3, 4), np.uint8),
    "truths": np.ones(6, bool),
    "no texts": np.array([], np.str_),
}


def assert_only_lines(path: Path, read: Callable[[], object]) -> None:
    """Remove each array of a file, and replace it by each of OTHER_ARRAYS: a line that names the file, or no error."""
    arrays = read_arrays(path, "")
    faults, refused = [], 0
    for name in arrays:
        without = {other: array for other, array in arrays.items() if other != name}
        changes = {"removed": without} | {kind: without | {name: array} for kind, array in OTHER_ARRAYS.items()}
        for kind, changed in changes.items():
            write_arrays(path, changed)
            try:
                read()
            except UserError as error:
                refused += 1
                if str(path) not in str(error) or len(str(error).splitlines()) != 1:
                    faults.append(f"{name}: {kind}: {error!r}")
            except Exception as error:
                faults.append(f"{name}: {kind}: {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults[:20])
    assert refused > 5 * len(arrays)


def test_arrays_of_scores_that_were_tampered_with(scores: Scores, tmp_path: Path) -> None:
    """scores.npz and strips.npz, through the report."""
    path = tmp_path / "scores.npz"
    save_scores(scores, path)
    assert_only_lines(path, lambda: write_report(tmp_path))
    save_scores(scores, path)
    write_strips(tmp_path / "strips.npz", {0: Strip(bytes(9), bytes(9))})
    assert_only_lines(tmp_path / "strips.npz", lambda: write_report(tmp_path))


def test_galleries_that_were_tampered_with(tmp_path: Path) -> None:
    """A gallery, through the search in it."""
    vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    gallery = Gallery(tuple("abcdef"), ("x",) * 6, vectors, ("",) * 6, "{}")
    path = tmp_path / "gallery.npz"
    save_gallery(gallery, path)

    def read() -> None:
        found = load_gallery(path)
        if found.record == gallery.record and found.vectors.shape[1] == 4:
            search(found, gallery, 3)

    assert_only_lines(path, read)


def test_features_that_were_tampered_with(tmp_path: Path) -> None:
    """Cached features."""
    path = tmp_path / "features.npz"
    features = Features(tuple("abcdef"), np.arange(6), np.zeros((6, 4), np.float32), ("",) * 6)
    write_arrays(path, _to_arrays(features))
    assert_only_lines(path, lambda: _from_arrays(read_arrays(path, ""), path).read.sum())


def test_parts_that_were_tampered_with(scores: Scores, tmp_path: Path) -> None:
    """The only part of a test, through the joining of all parts."""
    parts = PartFolder(tmp_path, {}, 1)
    assert parts.open() == [0]
    part = ScoredVideos(
        videos=np.arange(6),
        logits=scores.logits,
        views=scores.views,
        stand_ins=np.zeros(6, np.int32),
        reasons=np.array(scores.reasons, np.str_),
        seconds=np.ones(2),
        strip_places=np.zeros((1, 2), np.int64),
        strip_bytes=np.array([[2, 1]]),
        strips=np.zeros(3, np.uint8),
    )
    parts.save(0, part)
    (path,) = tmp_path.glob("*/*/*.npz")
    assert parts.join(6).strips_by_view() == {(0, 0): Strip(bytes(2), bytes(1))}

    def read() -> None:
        joined = parts.join(6)
        joined.strips_by_view()
        save_scores(dataclasses.replace(scores, logits=joined.logits, views=joined.views), tmp_path / "scores.npz")

    arrays = read_arrays(path, "")
    assert_only_lines(path, read)
    for positions in ([0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 2**40]):
        write_arrays(path, arrays | {"videos": np.array(positions)})
        with pytest.raises(UserError, match=r"were scored more than once|do not fit together"):
            read()
