"""JSON that is damaged or hostile is one line that names the file and the key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import Field

from video_swinv2.errors import UserError
from video_swinv2.records import Record, read_bytes, read_json, read_record

BIG = "9" * 5000
FAULTY = {
    "empty": b"",
    "binary": b"\x80\x02}q\x00.",
    "not UTF-8": b'{"a": "\xff"}',
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep, but within the limit of json": b"[" * 500 + b"]" * 500,
    "deep objects": b'{"a":' * 100_000,
    "5,000 digits": BIG.encode(),
    "65 bits": b"18446744073709551616",
    "NaN": b'{"a": NaN}',
    "infinite": b'{"a": -Infinity}',
    "too large for a float": b'{"a": 1e999}',
    "half": b'{"a": [1, 2',
}


class Numbers(Record):
    """A small record."""

    count: int
    shares: list[float] = Field(default_factory=list)


@pytest.mark.parametrize("content", FAULTY.values(), ids=FAULTY.keys())
def test_faulty_json_is_one_line_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    """Whatever Python's json raises, and what it should refuse."""
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}: .*; write, copy or download it again$") as raised:
        read_json(path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_record_names_the_key(tmp_path: Path) -> None:
    """Missing, unknown and wrongly typed keys; nothing is converted."""
    path = tmp_path / "numbers.json"
    faults = {
        "{}": "count: field required",
        "[]": "not a JSON object",
        '{"count": "3"}': "count: input should be a valid integer",
        '{"count": 3.0}': "count: input should be a valid integer",
        '{"count": true}': "count: input should be a valid integer",
        '{"count": null}': "count: input should be a valid integer",
        '{"count": 3, "shares": [0.5, "x"]}': "shares.1: input should be a valid number",
        '{"count": 3, "more": 1}': "more: extra inputs are not permitted",
    }
    for text, fault in faults.items():
        path.write_text(text)
        with pytest.raises(UserError, match=f"^{path}: {fault}; "):
            read_record(path, Numbers)
    path.write_text('{"count": 3, "shares": [1, 0.5]}')
    assert read_record(path, Numbers) == Numbers(count=3, shares=[1, 0.5])


def test_only_files_of_a_stated_size_are_read(tmp_path: Path) -> None:
    """A pipe would block for ever and a device has no end; a sparse file is larger than the memory."""
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    for path, fault in (
        (tmp_path / "pipe", "is a device, a pipe"),
        (Path("/dev/zero"), "is a device, a pipe"),
        (tmp_path, "cannot be read .Is a directory"),
        (tmp_path / "large", "is larger than the 67,108,864 bytes"),
        (tmp_path / "absent", "cannot be read .No such file"),
    ):
        with pytest.raises(UserError, match=f"^{path}: {fault}"):
            read_json(path)
    (tmp_path / "small").write_bytes(b"12345")
    assert read_bytes(tmp_path / "small", 5) == b"12345"
    with pytest.raises(UserError, match="is larger than the 4 bytes"):
        read_bytes(tmp_path / "small", 4)
