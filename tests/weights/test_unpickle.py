"""Reading a checkpoint runs nothing from it: objects are inert, calls are refused, damage is one line."""

from __future__ import annotations

import argparse
import builtins
import collections
import enum
import io
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from yacs.config import CfgNode

import video_swinv2 as vs
from tests.closeness import assert_close, assert_same
from tests.weights.released import microsoft_state, ours
from video_swinv2.errors import UserError
from video_swinv2.weights.unpickle import CallRefusedError, Placeholder, read_inert


def test_plain_data_and_tensors_of_every_kind_come_back(tmp_path):
    base = torch.arange(24.0)
    tensors = {
        "view": base[2:14].view(3, 4).t(),  # shares the storage, offset and strides matter
        "whole": base,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.int8, torch.uint8):
        tensors[str(dtype)] = torch.arange(5).to(dtype)
    tensors["bool"] = torch.tensor([True, False])
    state = collections.OrderedDict(tensors)
    state._metadata = {"": {"version": 1}}
    looped: list[object] = [1]
    looped.append(looped)
    content = {"model": state, "lists": [(1, 2.5, "ä", None)], "set": {1}, "loop": looped, "accuracy": np.float64(81.2)}
    torch.save(content, tmp_path / "a.pth")
    read = read_inert(tmp_path / "a.pth")
    assert read["model"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read["model"][name].dtype == tensor.dtype
        assert torch.equal(read["model"][name], tensor.detach())
    assert read["lists"] == content["lists"]
    assert isinstance(read["accuracy"], Placeholder)


class Colour(enum.Enum):
    RED = 1


class Held:
    """An object whose class would run code when it is built again."""

    def __init__(self, mark):
        self.mark = mark

    def __setstate__(self, state):
        Path(state["mark"]).touch()


def test_objects_of_training_checkpoints_are_inert(tmp_path, monkeypatch):
    """A yacs configuration, a Namespace, an Enum and a class with code: their data is there, their code never runs."""
    config = CfgNode({"MODEL": {"SWINV2": {"WINDOW_SIZE": 8}}, "DATA": {"IMG_SIZE": 256}})
    content = {
        "config": config,
        "args": argparse.Namespace(lr=0.1),
        "colour": Colour.RED,
        "held": Held(str(tmp_path / "ran")),
        "path": tmp_path,
        "model": {"a": torch.ones(2)},
    }
    torch.save(content, tmp_path / "a.pth")
    imported = []
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: imported.append(name) or real(name, *rest))
    read = read_inert(tmp_path / "a.pth")
    monkeypatch.undo()
    assert not [name for name in imported if name.startswith(("yacs", "argparse", "tests"))]
    assert read["config"]["MODEL"]["SWINV2"]["WINDOW_SIZE"] == 8
    assert read["args"] == {"lr": 0.1}
    assert read["held"] == {"mark": str(tmp_path / "ran")}
    assert not (tmp_path / "ran").exists()
    assert torch.equal(read["model"]["a"], torch.ones(2))


def test_microsoft_training_checkpoint_brings_its_configuration(tmp_path):
    """Weights without tables, optimizer and scaler state, and a CfgNode that tells the normaliser."""
    reference = ours(cpb_norm=[(12, 12), (12, 12), (12, 12), (6, 6)])
    swin = {"WINDOW_SIZE": 16, "PRETRAINED_WINDOW_SIZES": [12, 12, 12, 6]}
    content = {
        "model": reference.state_dict(),
        "optimizer": torch.optim.AdamW(reference.parameters()).state_dict(),
        "max_accuracy": np.float64(84.1),
        "config": CfgNode({"MODEL": {"SWINV2": swin}, "DATA": {"IMG_SIZE": 256}}),
    }
    torch.save(content, tmp_path / "ckpt_epoch_29.pth")
    model = vs.create_model("swinv2_nano", num_classes=6, image_size=64, window=4).eval()
    account = vs.load_weights(model, tmp_path / "ckpt_epoch_29.pth")
    assert model.cpb_norm == reference.cpb_norm
    assert "the file's configuration" in account.notes[0]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(model(x), reference(x))
    assert_same(model.state_dict(), reference.state_dict())


class Calls:
    """Pickles as a call of `function`; unpickling it the ordinary way would run it."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


PLANTED = [
    (os.system, "touch {}"),
    (eval, "open({!r}, 'w')"),
    (exec, "open({!r}, 'w')"),
    (subprocess.Popen, ["touch", "{}"]),
    (Path.touch, Path("{}")),
    (builtins.open, "{}", "w"),
    (torch.save, 1, "{}"),
    (torch.load, "{}"),
    (torch.hub.load, "{}", "model"),
    (torch.serialization.add_safe_globals, ["{}"]),
    (getattr, "text", "upper"),
    (__import__, "antigravity"),
]


@pytest.mark.parametrize(("function", "arguments"), [(row[0], row[1:]) for row in PLANTED])
@pytest.mark.parametrize("where", ["beside", "key", "tensor"])
def test_planted_code_does_not_run(tmp_path, function, arguments, where):
    mark = tmp_path / "ran"

    def fill(argument):
        if isinstance(argument, list):
            return [fill(part) for part in argument]
        return type(argument)(str(argument).format(str(mark))) if isinstance(argument, str | Path) else argument

    planted = Calls(function, *map(fill, arguments))
    state = microsoft_state(ours(), window=4)
    content = {
        "beside": {"model": state, "config": planted},
        "key": {"model": state, planted: 1},
        "tensor": {"model": state | {"norm.weight": planted}},
    }[where]
    torch.save(content, tmp_path / "planted.pth")
    model = vs.create_model("swinv2_nano", num_classes=6, image_size=64, window=4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modules = set(sys.modules)
    with pytest.raises(UserError, match=r"it would call .*ever executed") as caught:
        vs.load_weights(model, tmp_path / "planted.pth")
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    assert "antigravity" not in set(sys.modules) - modules
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def archive(path, instructions, **entries):
    """A torch zip file with these pickle instructions."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", instructions)
        for name, data in entries.items():
            file.writestr(f"a/{name.replace('__', '/')}", data)
    return path


BUILT_BY_HAND = {
    # INST, OBJ, NEWOBJ, NEWOBJ_EX and a name of the extension registry, each after the fashion of os.system("...")
    "inst": b"(S'touch {}'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch {}'\no.",
    "newobj": b"\x80\x02cos\nsystem\nS'touch {}'\n\x85\x81.",
    "newobj_ex": b"\x80\x04cos\nsystem\nS'touch {}'\n\x85}\x92.",
    "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93S'touch {}'\n\x85R.",
    "extension": b"\x80\x02\x82\x01S'touch {}'\n\x85R.",
    # BUILD on a class and on a function of torch, to change what later calls do
    "build_class": b"\x80\x02ccollections\nOrderedDict\n}S'__setitem__'\nI1\nsb.",
    "build_function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}S'__defaults__'\n(I1\ntds\x86b.",
    "call_of_a_result": b"\x80\x02cfoo\nbar\n)R)R.",
    "append_to_a_class": b"\x80\x02cfoo\nbar\nI1\na.",
    "item_of_a_class": b"\x80\x02cfoo\nbar\nI1\nI1\ns.",
}


@pytest.mark.parametrize("name", BUILT_BY_HAND)
def test_every_instruction_of_pickle_meets_nothing_but_placeholders(tmp_path, name):
    mark = tmp_path / "ran"
    instructions = BUILT_BY_HAND[name].replace(b"{}", str(mark).encode())
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    try:
        read = read_inert(archive(tmp_path / "a.pth", instructions))
    except Exception as error:  # which one is the file's choice; nothing but a placeholder may come back instead
        read = error
    assert isinstance(read, Exception | Placeholder)
    assert not mark.exists()
    assert torch._utils._rebuild_tensor_v2.__defaults__ is defaults


def test_no_name_is_ever_looked_up():
    """All names that torch.save writes for a real checkpoint, and all of Python's builtins, give our own class."""
    from video_swinv2.weights.unpickle import _Unpickler

    for name in vars(builtins):
        found = _Unpickler(io.BytesIO()).find_class("builtins", name)
        assert issubclass(found, Placeholder)
        assert found is not Placeholder


@pytest.mark.parametrize(
    ("size", "stride", "offset", "numel"),
    [
        ((9,), (1,), 0, 4),
        ((4,), (1,), 1, 4),
        ((2,), (4,), 0, 4),
        ((2,), (-1,), 1, 4),
        ((4,), (0,), 0, 1),
        ((4,), (1,), 0, 9),
    ],
)
def test_tensors_never_reach_outside_of_their_bytes(tmp_path, size, stride, offset, numel):
    class Row:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Stored(), offset, size, stride, False, {})

    class Stored:
        pass

    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Stored) else None

    out = io.BytesIO()
    Writer(out, protocol=2).dump({"norm.weight": Row()})
    path = archive(tmp_path / "a.pth", out.getvalue(), data__0=bytes(16))
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        read_inert(path)


def test_calls_are_named(tmp_path):
    torch.save({"x": Calls(os.system, "true")}, tmp_path / "a.pth")
    with pytest.raises(CallRefusedError, match=r"posix\.system"):
        read_inert(tmp_path / "a.pth")


def test_damaged_files_are_refused_in_one_line(tmp_path):
    """Cut anywhere, or with any byte changed: a line, or weights that are whole; never another kind of error."""
    config = {"config": CfgNode({"A": 1})}
    torch.save({"model": microsoft_state(ours(), window=4)} | config, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    draw = random.Random(3)
    variants = [whole[: len(whole) * i // 7] for i in range(7)]
    start = whole.index(b"data.pkl")
    for _ in range(25):
        at = draw.randrange(start, start + 20_000)
        variants.append(whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :])
    lines = []
    model = vs.create_model("swinv2_nano", num_classes=6, image_size=64, window=4)
    for variant in variants:
        (tmp_path / "b.pth").write_bytes(variant)
        try:
            vs.load_weights(model, tmp_path / "b.pth")
        except UserError as error:
            lines.append(str(error))
    assert len(lines) > 7
    assert not [line for line in lines if "\n" in line or "b.pth" not in line]


def test_formats_that_cannot_be_read_safely_are_refused(tmp_path):
    torch.save(ours(), tmp_path / "module.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"model": Calls(os.system, "true")}))
    for name, words in (("module.pth", "a whole model"), ("plain.pkl", "plain.pkl")):
        with pytest.raises(UserError, match=words) as caught:
            vs.load_weights(ours(), tmp_path / name)
        assert "\n" not in str(caught.value)


def test_files_older_than_torch_1_6_are_read_alike(tmp_path):
    """The format without a zip file, with objects beside the tensors, tensors that share a storage, and code."""
    base = torch.arange(6.0)
    state = {"model": microsoft_state(ours(), window=4)}
    content = state | {"config": CfgNode({"A": 1}), "views": [base, base[2:4]], "half": torch.ones(3).half()}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    read = read_inert(tmp_path / "old.pth")
    assert read["config"] == {"A": 1}
    assert_same(read["model"], state["model"])
    assert torch.equal(read["views"][1], base[2:4])
    assert read["views"][0].untyped_storage().data_ptr() == read["views"][1].untyped_storage().data_ptr()
    assert torch.equal(read["half"], content["half"])
    vs.load_weights(ours(), tmp_path / "old.pth")
    torch.save(state | {"x": Calls(os.system, "true")}, tmp_path / "code.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"it would call posix\.system"):
        vs.load_weights(ours(), tmp_path / "code.pth")
