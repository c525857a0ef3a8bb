"""Checkpoints that would take memory or time without end are refused in one line, within bounds that are measured."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import video_swinv2 as vs
from tests.hostile.bounded import GIB, reading, run_bounded
from tests.hostile.tampering import assert_no_faults
from video_swinv2.engine.foreign_checkpoints import newest_checkpoint
from video_swinv2.errors import UserError
from video_swinv2.models.swinv2 import Block
from video_swinv2.weights.store import CARD_KEY, read_tensors

# Importing torch takes most of both.
SECONDS, BYTES = 60, 1.0 * GIB
READ = reading("from video_swinv2.weights.pretrained import from_pretrained as read")


def assert_refused(files: dict[Path, str]) -> None:
    """Read the files in one child process: each is refused for the reason given, within the bounds."""
    ended = run_bounded("-c", READ, *files, cpu_seconds=SECONDS)
    lines = ended.out.splitlines()
    assert ended.code == 0, ended.err[-2000:]
    assert len(lines) == len(files)
    for line, (path, reason) in zip(lines, files.items(), strict=True):
        assert line.startswith(f"{path}: ")
        assert reason in line
    assert ended.peak_bytes < BYTES
    assert ended.cpu_seconds < SECONDS


def zipped(path: Path, instructions: bytes) -> Path:
    """A file in torch's zip format with this pickle, and in it an object that torch's own safe reader refuses."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", instructions[:2] + b"cyacs\nNode\n)R0" + instructions[2:])
        archive.writestr("a/version", "3\n")
    return path


def old(path: Path, content: bytes, keys: list[str], storages: bytes = b"") -> Path:
    """A file in the format of torch before 1.6 with this pickle as its content."""
    start = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join([*start, content, pickle.dumps(keys, 2), storages]))
    return path


DOUBLED = b"N" + b"2\x86" * 60  # a tuple that holds a tuple twice, and so on: 2^60 values
PICKLES = {
    "memo": (b"\x80\x02}r" + struct.pack("<I", 2**29) + b".", "value 536,870,912 of a pickle after 2 instructions"),
    "text_memo": (b"\x80\x02}p99999999999\n.", "value 99,999,999,999"),
    "bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**33) + b"x.", "but only . remain"),
    "bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"x.", "but only . remain"),
    "text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**33) + b"x.", "but only . remain"),
    "integer": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", "not enough data"),
    "frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**33) + b"N.", "frame"),
    "deep": (b"\x80\x02)" + b"\x85" * 200_000 + b".", "recursion"),
    "doubled_key": (b"\x80\x02}" + DOUBLED + b"Ns.", "a key that contains more than 64 values"),
    "doubled_key_by_memo": (b"\x80\x02" + DOUBLED + b"q\x00}h\x00Ns.", "a key that contains more than 64 values"),
    "doubled_member": (b"\x80\x04\x8f(" + DOUBLED + b"\x90.", "a key that contains more than 64 values"),
    "doubled_frozen": (b"\x80\x04(" + DOUBLED + b"\x91.", "a key that contains more than 64 values"),
    "below_a_mark": (b"\x80\x02}" + DOUBLED + b"(q\x000h\x00Ns.", "takes more from its stack"),
    "objects": (b"\x80\x02(" + b"}" * 1_200_000 + b"t.", "more than 1,048,576 instructions"),
    "names": (b"\x80\x02" + b"".join(b"ca\nb%d\n0" % n for n in range(100_000)) + b"N.", "implausible number"),
    "endless": (b"\x80\x02" + b"N0" * 10, "exhausted before"),
}


def test_pickles(tmp_path: Path) -> None:
    """Instructions that allocate what they declare, nest without end, or compute without end."""
    assert_refused({zipped(tmp_path / f"{name}.pth", code): "" for name, (code, _) in PICKLES.items()})


@pytest.mark.parametrize("name", PICKLES)
def test_reasons(tmp_path: Path, name: str) -> None:
    """The same in the other format of torch, with the reasons."""
    code, reason = PICKLES[name]
    with pytest.raises(UserError, match=reason) as raised:
        vs.SwinV2.from_pretrained(old(tmp_path / f"{name}.pth", code, []))
    assert len(str(raised.value).splitlines()) == 1


def referring(keys: list[tuple[str, int]]) -> bytes:
    """A pickle of a dict of flat float tensors: key and number of elements of the storage of each."""

    class Stored:
        def __init__(self, key: str, numel: int) -> None:
            self.id = ("storage", torch.FloatStorage, key, "cpu", numel, None)

    class Row:
        def __init__(self, key: str, numel: int) -> None:
            self.key, self.numel = key, numel

        def __reduce__(self) -> Any:
            arguments = (Stored(self.key, self.numel), 0, (self.numel,), (1,), False, {})
            return torch._utils._rebuild_tensor_v2, arguments

    class Writer(pickle.Pickler):
        def persistent_id(self, value: object) -> Any:
            return value.id if isinstance(value, Stored) else None

    out = io.BytesIO()
    Writer(out, protocol=2).dump({f"w{i}": Row(*key) for i, key in enumerate(keys)})
    return out.getvalue()


def repeated(path: Path, names: int, declared: int | None = None) -> Path:
    """A zip file whose table of contents lists one entry of 4 MB under many names, or with another size."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/version", "3\n")
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/data/0", bytes(4 * 2**20))
        entry = archive.filelist[-1]
        for number in range(1, names):
            again = copy.copy(entry)
            again.filename = f"a/data/{number}"
            archive.filelist.append(again)
        if declared is not None:
            entry.file_size = entry.compress_size = declared
    return path


def deflated(path: Path) -> Path:
    """A checkpoint of 2 GB in a file of 9 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a/version", "3\n")
        archive.writestr("a/data.pkl", referring([("0", 2**29)]))
        with archive.open("a/data/0", "w", force_zip64=True) as entry:
            for _ in range(2**7):
                entry.write(bytes(2**24))
    return path


def long_table(path: Path) -> Path:
    """A zip file that consists of its table of contents."""
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"a"
    count = 500_000
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, count * len(entry), 4, 0)
    path.write_bytes(b"PK\x03\x04" + entry * count + end)
    return path


def test_zip_files(tmp_path: Path) -> None:
    """Compressed entries, entries that overlap or end beyond the file, and a table of contents without end."""
    assert_refused(
        {
            deflated(tmp_path / "deflated.pth"): "'a/version' in it is compressed, which could hide any size",
            repeated(tmp_path / "overlapping.pth", 1000): "its entries declare 4,194,304,008 bytes, but the file has",
            repeated(tmp_path / "beyond.pth", 1, 2**33): "its entries declare 8,589,934,600 bytes",
            long_table(tmp_path / "table.pth"): "a table of contents of 23,500,000 bytes",
        }
    )


def test_old_files(tmp_path: Path) -> None:
    """Storages that are not in the file, or only in part."""
    content, large = referring([("0", 4)]), referring([("0", 2**32)])
    assert_refused(
        {
            old(tmp_path / "long.pth", large, ["0"], struct.pack("<q", 2**32)): "a storage that is cut off",
            old(tmp_path / "other.pth", content, ["0"], struct.pack("<q", 2**32) + bytes(16)): "of another length",
            old(tmp_path / "absent.pth", large, []): "'0'",
            old(tmp_path / "cut.pth", content, ["0"], struct.pack("<q", 4) + bytes(15)): "a storage that is cut off",
        }
    )


def test_tensors_that_share_their_bytes(tmp_path: Path) -> None:
    """A model of 400 blocks, 5 GB, whose blocks are all the same bytes in the file."""
    block = Block(512, 16, 2, 0.0, "auto").state_dict()
    state = vs.create_model("swinv2_nano", num_classes=0, image_size=32, window=2).state_dict()
    state |= {f"layers.0.blocks.{number}.{name}": value for number in range(400) for name, value in block.items()}
    torch.save(state, tmp_path / "shared.pth")
    assert_refused({tmp_path / "shared.pth": "several share the same bytes"})


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip model of this project."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model = vs.create_model("swinv2_nano", num_classes=2, frames=4, image_size=32, window=(2, 4, 4))
    vs.save_model(model, path, classes=["a", "b"], preprocessing=vs.Preprocessing(4, 1, (32, 32)))
    return path


def tampered(source: Path, path: Path, change: Callable[[Any], None]) -> Path:
    """A copy of a model file with another card."""
    tensors, metadata = read_tensors(source)
    card = json.loads(metadata[CARD_KEY])
    change(card)
    save_file(tensors, path, metadata={CARD_KEY: json.dumps(card)})
    return path


LARGE: dict[str, tuple[Callable[[Any], None], str]] = {
    "depth": (lambda card: card["architecture"].update(depths=[10**9, 2, 2, 2]), "architecture.depths.0: input"),
    "blocks": (lambda card: card["architecture"].update(depths=[1000] * 4), "4,000 blocks for"),
    "width": (lambda card: card["architecture"].update(embed_dim=65536), "parameters"),
    "heads": (lambda card: card["architecture"].update(num_heads=[10**9] * 4), "architecture.num_heads.0"),
    "classes": (lambda card: card["architecture"].update(num_classes=10**9), "architecture.num_classes"),
    "rows": (lambda card: card.update(classes=[]) or card["architecture"].update(num_classes=10**6), "parameters"),
    "frames": (lambda card: card["architecture"].update(frames=10**9), "architecture.frames"),
    "clip": (lambda card: card["preprocessing"].update(frames=10**9), "preprocessing.frames"),
    "input": (
        lambda card: card["preprocessing"].update(frames=4000, image_size=[8000, 8000]),
        "256,000,000,000 pixels",
    ),
    "window": (lambda card: card["architecture"].update(window=[10**6] * 3), "architecture.window.0"),
    "image": (lambda card: card["architecture"].update(image_size=[10**6] * 2), "architecture.image_size.0"),
    "stages": (lambda card: card["architecture"].update(depths=[1] * 99, num_heads=[1] * 99), "architecture.depths"),
    "deep": (lambda card: card.update(provenance=json.loads('{"a":' * 99 + "1" + "}" * 99)), "nested too deeply"),
}


def test_cards(model_file: Path, tmp_path: Path) -> None:
    """Numbers in the card of a model file: each is bounded, and so is the model that they describe."""
    assert_refused(
        {
            tampered(model_file, tmp_path / f"{name}.safetensors", change): reason
            for name, (change, reason) in LARGE.items()
        }
    )


@pytest.mark.parametrize("name", [name for name in LARGE if name not in ("blocks", "width", "rows")])
def test_cards_without_weights(model_file: Path, tmp_path: Path, name: str) -> None:
    """`read_card` and `load_model` refuse them too."""
    change, reason = LARGE[name]
    path = tampered(model_file, tmp_path / "model.safetensors", change)
    for read in (vs.read_card, vs.load_model):
        with pytest.raises(UserError, match=reason):
            read(path)


def test_universal_checkpoints_that_were_tampered_with(tmp_path: Path) -> None:
    """The model states of DeepSpeed, a file of a parameter, and the file that names the newest folder."""
    folder = tmp_path / "global_step3_universal"
    (folder / "zero" / "w").mkdir(parents=True)
    (tmp_path / "latest_universal").write_text(folder.name)
    for kind in ("fp32", "exp_avg", "exp_avg_sq"):
        torch.save({"param": torch.ones(2)}, folder / "zero" / "w" / f"{kind}.pt")
    states = {
        "param_shapes": [{"w": torch.Size([2])}],
        "buffer_names": ["b"],
        "module": {"b": torch.zeros(1), "w": torch.ones(2)},
        "global_steps": 3,
        "skipped_steps": 1,
    }

    def read_states(value: Any) -> None:
        torch.save(value, folder / "mp_rank_00_model_states.pt")
        newest_checkpoint(tmp_path)

    def read_parameter(value: Any) -> None:
        torch.save(value, folder / "zero" / "w" / "fp32.pt")
        newest_checkpoint(tmp_path)

    read_states(states)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found[0], found[1].optimizer_step, sorted(found[1].weights)) == (3, 2, ["b", "w"])
    assert_no_faults(states, read_states, str(folder), 21)
    read_states(states)
    assert_no_faults({"param": torch.ones(2)}, read_parameter, str(folder))
    for content in (bytes(range(256)), b"a" * 10_000):
        (tmp_path / "latest_universal").write_bytes(content)
        with pytest.raises(UserError, match=rf"^{tmp_path / 'latest_universal'}: "):
            newest_checkpoint(tmp_path)
