"""Untrusted archives: the videos come out, and nothing else does."""

from __future__ import annotations

import gzip
import io
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep import unpack as module
from data_prep.fetch import StopError
from data_prep.unpack import archive_fault, unpack
from video_swinv2.errors import UserError

NAME = "-aU_xCCzkT0_000061_000071.mp4"
Member = tuple[str, bytes | None, dict[str, object]]
noise = np.random.default_rng(0).bytes


def packed(path: Path, *members: Member, zipped: bool = True) -> Path:
    """A tar of members (name, content, changes to its header); content None writes only the header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            for key, value in changes.items():
                setattr(info, key, value)
            if content is None:
                buffer.write(info.tobuf(tarfile.GNU_FORMAT))
                tar.offset += tarfile.BLOCKSIZE
            else:
                tar.addfile(info, io.BytesIO(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(buffer.getvalue(), 1) if zipped else buffer.getvalue())
    return path


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("zipped", [True, False])
def test_videos_come_out_under_their_bare_names(tmp_path, zipped):
    content = noise(300_000)
    archive = packed(
        tmp_path / "a.tar.gz",
        ("./push up", b"", {"type": tarfile.DIRTYPE}),
        (f"./push up/{NAME}", content, {}),
        ("empty_000001_000011.mp4", b"", {}),
        ("push up/" + "long" * 40 + "_000001_000011.MP4", b"abc", {}),
        ("._x.mp4", b"apple", {}),
        ("notes.txt", b"text", {}),
        (f"again/{NAME}", content, {}),
        zipped=zipped,
    )
    held = unpack(archive, tmp_path / "out")
    assert (held.empty, held.other) == (1, 2)
    assert files_below(tmp_path / "out") == set(held.names)
    assert len(held.names) == 3
    assert (tmp_path / "out" / NAME).read_bytes() == content
    assert archive_fault(archive) == ""


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (("../evil.mp4", b"x", {}), "leads outside"),
        (("a/../../evil.mp4", b"x", {}), "leads outside"),
        (("/evil.mp4", b"x", {}), "leads outside"),
        (("../evil.txt", b"x", {}), "leads outside"),
        (("evil.mp4", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), "is a link"),
        (("evil.mp4", b"", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}), "is a link"),
        (("d", b"", {"type": tarfile.SYMTYPE, "linkname": ".."}), "is a link"),
        (("evil.mp4", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}), "is a device"),
        (("evil.mp4", b"", {"type": tarfile.FIFOTYPE}), "a pipe"),
        (("evil.mp4", None, {"size": 1 << 40}), "claims to have 1099.5 GB"),
        (("evil.mp4", None, {"size": -512}), "claims to have -512"),
        (("evil\n.mp4", b"x", {}), "impossible file name"),
        (("evil" * 60 + ".mp4", b"x", {}), "impossible file name"),
        (("x", None, {"type": tarfile.XHDTYPE, "size": 1 << 33}), "claims to have 8589934592 bytes"),
        (("x", None, {"type": tarfile.GNUTYPE_LONGNAME, "size": 1 << 33}), "claims to have 8589934592 bytes"),
        (("other/" + NAME, b"different", {}), "two different videos"),
    ],
)
def test_hostile_members_are_refused(tmp_path, member, words):
    inside = tmp_path / "inside"
    archive = packed(inside / "part_0.tar.gz", (NAME, b"good", {}), member)
    with pytest.raises(UserError, match=r"part_0\.tar\.gz: ") as caught:
        unpack(archive, inside / "out")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_below(tmp_path) <= {"inside/part_0.tar.gz", f"inside/out/{NAME}", f"inside/out/.{NAME}.part"}


def test_an_extended_header_cannot_smuggle_a_path_a_size_or_holes(tmp_path):
    for place, headers in enumerate(
        [{"path": "../../evil.mp4"}, {"size": str(1 << 41)}, {"path": "nul\0l.mp4"}, {"GNU.sparse.size": str(1 << 30)}]
    ):
        archive = tmp_path / "in" / f"{place}.tar"
        archive.parent.mkdir(exist_ok=True)
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
            info = tarfile.TarInfo(NAME)
            info.size, info.pax_headers = 3, headers
            tar.addfile(info, io.BytesIO(b"abc"))
        with pytest.raises(UserError):
            unpack(archive, tmp_path / "in" / f"out{place}")
    assert all(name.startswith("in/") for name in files_below(tmp_path))


def _cut(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-40_000])


def _flip(archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 0xFF
    archive.write_bytes(bytes(content))


def _spoil_second_header(archive: Path) -> None:
    content = bytearray(gzip.decompress(archive.read_bytes()))
    second = tarfile.BLOCKSIZE + 100_352
    assert content[second : second + 2] == b"b_"
    content[second] ^= 1
    archive.write_bytes(gzip.compress(bytes(content), 1))


def _cut_between_members(archive: Path) -> None:
    archive.write_bytes(gzip.decompress(archive.read_bytes())[: tarfile.BLOCKSIZE + 100_352])


def _append(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes() + gzip.compress(b"more"))


@pytest.mark.parametrize("damage", [_cut, _flip, _spoil_second_header, _cut_between_members, _append])
def test_damage_is_not_mistaken_for_the_end(tmp_path, damage: Callable[[Path], None]):
    archive = packed(
        tmp_path / "part_0.tar.gz",
        ("a_000001_000011.mp4", noise(100_000), {}),
        ("b_000001_000011.mp4", noise(100_000), {}),
    )
    damage(archive)
    with pytest.raises(UserError, match=r"part_0\.tar\.gz: (damaged or not|has other data after)"):
        unpack(archive, tmp_path / "out")


def test_files_without_a_video_are_refused(tmp_path):
    with pytest.raises(UserError, match="contains no video"):
        unpack(packed(tmp_path / "a.tar", ("a.txt", b"x", {})), tmp_path / "out")
    page = tmp_path / "b.tar.gz"
    page.write_bytes(b"<!DOCTYPE html><title>404</title>")
    assert archive_fault(page) == "a web page or an error message, not a tar archive"
    with pytest.raises(UserError, match="not a tar archive"):
        unpack(page, tmp_path / "out2")


def test_the_sum_of_sizes_and_the_number_of_members_have_limits(tmp_path, monkeypatch):
    archive = packed(tmp_path / "a.tar", *((f"{n}.mp4", b"12345", {}) for n in range(5)))
    for limit, value in (("MAX_TOTAL_BYTES", 20), ("MAX_MEMBERS", 4)):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, value)
            with pytest.raises(UserError, match="5 members with"):
                unpack(archive, tmp_path / limit)


def test_it_stops_on_request(tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(StopError):
        unpack(packed(tmp_path / "a.tar", ("a.mp4", b"12345", {})), tmp_path / "out", stop)
