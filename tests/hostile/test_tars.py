"""Tars whose headers are made to exhaust memory, time or the stack: in archives of videos and in shards of images."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from data_prep.unpack import unpack
from tests.hostile.bounded import GIB, run_bounded
from video_swinv2.data.shards import shard_collection
from video_swinv2.data.tars import MAX_EXTENSION_BYTES, BoundedTarInfo
from video_swinv2.errors import UserError

# Each reads several files and prints one line for each: what a user would see, or the type of another error.
UNPACK = """
import sys
from pathlib import Path
from data_prep.unpack import unpack
from video_swinv2.errors import UserError
for place, path in enumerate(sys.argv[2:]):
    try:
        unpack(Path(path), Path(sys.argv[1], str(place)))
        print("was unpacked", flush=True)
    except UserError as error:
        print(error, flush=True)
    except Exception as error:
        print(type(error), flush=True)
"""
INDEX = """
import contextlib
import io
import sys
from video_swinv2.data.shards import shard_collection
for path in sys.argv[1:]:
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            print(len(shard_collection(path).index), "image", file=told)
        except Exception as error:
            print(type(error), error, file=told)
    print(told.getvalue().replace("\\n", "; "), flush=True)
"""


def header(name: str = "x", size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def records(**values: str) -> bytes:
    """The records of an extended header; no length has more than two digits."""
    lines = (f" {key.replace('__', '.')}={value}\n".encode() for key, value in values.items())
    return b"".join(f"{len(line) + 2:02}".encode() + line for line in lines)


def sparse(blocks: int) -> bytes:
    """An old GNU sparse file whose list of holes goes on for so many blocks."""
    first = bytearray(header("a.mp4", 0, tarfile.GNUTYPE_SPARSE))
    first[482] = 1  # the list continues in the next block
    first[148:156] = b" " * 8
    first[148:156] = b"%06o\0 " % sum(first)
    return bytes(first) + (b"00000000001\0" * 42 + b"\1" + bytes(7)) * blocks


PAX = tarfile.XHDTYPE
HOSTILE = {
    "3,000 long names": member("x", b"name", tarfile.GNUTYPE_LONGNAME) * 3000,
    "3,000 long names without a byte": header("x", 0, tarfile.GNUTYPE_LONGNAME) * 3000,
    "3,000 extended headers": member("x", records(mtime="1"), PAX) * 3000,
    "an extended header of digits": member("x", b"1" * 1_000_000, PAX),
    "fewer digits": member("x", b"1" * (MAX_EXTENSION_BYTES - 10_000), PAX),
    "a size below 0": header("a.mp4", -512),
    "a size of 88 bits": header("a.mp4", 1 << 87),
    "a size in an extended header": member("x", records(size="9" * 40), PAX),
    "a size that is no number": member("x", records(size="-512"), PAX),
    "a NUL in a name": member("x", records(path="a\0b.mp4"), PAX),
    "half of an extended header": member("x", b"99 path=b", PAX),
    "an endless list of holes": sparse(100_000),
    "a sparse file without its list": member("x", records(GNU__sparse__major="1", GNU__sparse__minor="0"), PAX),
    "a broken list of holes": member("x", records(GNU__sparse__map="1,x"), PAX),
}


def test_hostile_archives_are_refused_within_time_and_memory(tmp_path: Path) -> None:
    """Each in one line that names it. A good video in front of the headers does not help, nor one behind."""
    paths = [tmp_path / f"{name}.tar.gz" for name in HOSTILE]
    for path, content in zip(paths, HOSTILE.values(), strict=True):
        whole = member("good.mp4", b"video") + content + member("b.mp4", b"1\n") + bytes(1024)
        path.write_bytes(gzip.compress(whole, 1))
    (tmp_path / "out").mkdir()
    ended = run_bounded("-c", UNPACK, tmp_path / "out", *paths, cpu_seconds=20, memory_gib=8)
    for path, line in zip(paths, ended.out.splitlines(), strict=True):
        assert line.startswith(f"{path}: "), line
    assert ended.code == 0
    assert ended.peak_bytes < GIB / 4
    assert {file.name for file in (tmp_path / "out").rglob("*") if file.is_file()} == {"good.mp4"}


def test_of_hostile_shards_the_images_in_front_are_used(tmp_path: Path) -> None:
    """As of any other damaged shard. Each is listed within time and memory, and named in one line."""
    paths = [tmp_path / f"{place}-train-0.tar" for place in range(len(HOSTILE))]
    for path, content in zip(paths, HOSTILE.values(), strict=True):
        good = member("0.png", b"image") + member("0.cls", b"0") + member("1.png", b"last")
        path.write_bytes(good + content + member("2.png", b"1\n") + bytes(1024))
    ended = run_bounded("-c", INDEX, *paths, cpu_seconds=30)
    for path, line in zip(paths, ended.out.splitlines(), strict=True):
        # The last sample in front of the damage may be incomplete, so it is not used.
        assert line.startswith(f"broken: {path}: is truncated or"), line
        assert line.endswith("; 1 image; "), line
        assert line.count(path.name) == 1
    assert ended.code == 0
    assert ended.peak_bytes < GIB


@pytest.mark.parametrize("name", ["0.cls", "0.json"])
def test_a_label_that_cannot_be_one_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    """Deep, binary, of the wrong type or huge."""
    deep, path = b"[" * 100_000, tmp_path / "train-0.tar"
    faults = [deep, b'{"label": ' + deep, b'{"label": [1]}', b'{"label": 1e999}', b'{"label": ' + b"9" * 5000 + b"}"]
    if name == "0.cls":
        faults = [b"\xff\xfe", b"1" * (2 << 20)]
    for content in faults:
        path.write_bytes(member("0.png", b"image") + member(name, content) + bytes(1024))
        with pytest.raises(UserError, match=rf"^{path}: {name} holds no label.*$"):
            shard_collection(str(path))


def test_zeros_without_end_are_refused(tmp_path: Path) -> None:
    """A gzip expands them a thousandfold."""
    path = tmp_path / "part_0.tar.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(member("a.mp4", b"video"))
        for _ in range(80):
            file.write(bytes(1 << 20))
    with pytest.raises(UserError, match="zeros after the end"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_as_tarfile_reads_them(form: int) -> None:
    """Names of any length and alphabet, folders, links, and what another program adds to headers."""
    names = ["a.mp4", "./b/c.mp4", "d" * 90 + "/" + "e" * 90 + ".mp4"]
    names += ["f" * 300 + ".mp4", "ü" * 120, "folder" * 40 + "/"] if form != tarfile.USTAR_FORMAT else []
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers={"comment": "global"}) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.mtime, info.pax_headers = 1.5, {"SCHILY.xattr.user.a": "b=c\n"}
            info.size = 700 * number if info.isreg() else 0
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "g" * 200 if form != tarfile.USTAR_FORMAT else "g"
        tar.addfile(link)

    def read(kind: type[tarfile.TarInfo]) -> list[tuple[object, ...]]:
        buffer.seek(0)
        with tarfile.open(fileobj=buffer, tarinfo=kind) as tar:
            return [(one.name, one.size, one.type, one.offset_data) for one in tar]

    assert read(BoundedTarInfo) == read(tarfile.TarInfo)
    assert len(read(BoundedTarInfo)) == len(names) + 1


def test_the_size_in_an_extended_header_is_that_of_the_file() -> None:
    """Files of more than 8 GiB have 0 or nothing in the field of the plain header."""
    content = member("x", records(size="700", path="y"), PAX) + header("x", 0) + b"a" * 700 + bytes(324)
    with tarfile.open(fileobj=io.BytesIO(content + member("z", b"z") + bytes(1024)), tarinfo=BoundedTarInfo) as tar:
        assert [(one.name, one.size) for one in tar] == [("y", 700), ("z", 1)]
