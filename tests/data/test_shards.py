"""Tar shards: the samples are those that the webdataset library gives, read by address; damage is reported."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from video_swinv2.config import AugmentConfig, DataConfig
from video_swinv2.data import shards
from video_swinv2.data.datasets import SampleDataset
from video_swinv2.data.decode import DecodeError
from video_swinv2.data.images import FORMATS, read_tar_member
from video_swinv2.data.loading import plan_batch, training_loader
from video_swinv2.data.shards import shard_collection
from video_swinv2.data.sources import labelled_manifest, labelled_splits, unlabelled_mixture
from video_swinv2.errors import UsageError, UserError


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, 7, 0)).save(file, "png")
    return file.getvalue()


def write(path, samples):
    """A tar with members in the order given: [(name, bytes)]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, body in samples:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return path


@pytest.fixture
def folder(tmp_path):
    """Three shards of ten samples, two for training and one for validation; every label is number % 3."""
    for shard, name in enumerate(("set-train-000", "set-train-001", "set-validation-000")):
        members = []
        for i in range(10 * shard, 10 * shard + 10):
            members += [(f"dir/{i:04}.png", png(i)), (f"dir/{i:04}.cls", str(i % 3).encode())]
        write(tmp_path / "set" / f"{name}.tar", members)
    return tmp_path / "set"


def data(source, **changes):
    return DataConfig(**({"source": str(source), "image_size": 8, "workers": 0} | changes))


def reds(entries):
    return [int(read_tar_member(entry)[0, 0, 0]) for entry in entries]


def test_samples_are_those_of_the_library(folder):
    urls = sorted(str(path) for path in folder.glob("set-train-*.tar"))
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    train = labelled_manifest(data(folder), "train")
    assert [entry.label for entry in train.entries] == [sample["cls"] for sample in theirs]
    for entry, sample in zip(train.entries, theirs, strict=True):
        assert (read_tar_member(entry).permute(1, 2, 0).numpy() == sample["png"]).all()
    assert train.entries[0].name == "set-train-000.tar/dir/0000.png"
    assert train.classes == ("0", "1", "2")
    assert labelled_splits(data(folder)) == ("train", "val", "all")
    assert reds(labelled_manifest(data(folder), "val").entries) == list(range(20, 30))


def test_a_pattern_names_shards(folder):
    pattern = str(folder / "set-train-{000..001}.tar")
    assert len(labelled_manifest(data(pattern), "all").entries) == 20
    assert labelled_splits(data(pattern)) == ("train", "val", "all")  # val is held out of train
    val = labelled_manifest(data(pattern), "val")
    assert sorted(entry.label for entry in val.entries) == [0, 1, 2]
    both = labelled_manifest(data(str(folder / "set-{train-{000..001},validation-000}.tar")), "val")
    assert reds(both.entries) == list(range(20, 30))
    with pytest.raises(UserError, match=r"set-train-002\.tar: no such shard; 1 of the 3"):
        labelled_manifest(data(folder / "set-train-{000..002}.tar"), "all")
    for source in ("pipe:cat x.tar", "https://host/x-{00..10}.tar"):
        with pytest.raises(UsageError, match="read at random, from a disk"):
            unlabelled_mixture(data(source), validation=False)
    with pytest.raises(UsageError, match="only plain"):
        unlabelled_mixture(data(folder / "a-{0..3}.tar.gz"), validation=False)


def test_splits_by_the_words_of_names(tmp_path):
    """In the tar's own name or, without one, in the nearest folder; whole words, in any case."""
    names = ["Set-Valid-00", "TESTING/00", "train_256/00", "train/val-01", "valley-00", "more/00"]
    for number, name in enumerate(names):
        write(tmp_path / f"{name}.tar", [(f"{number}.png", png(number))])
    found = shard_collection(str(tmp_path))
    assert [sorted(entry.name[0] for entry in found.entries(split)) for split in ("train", "val", "test")] == [
        ["m", "t", "v"],
        ["S", "t"],
        ["T"],
    ]
    write(tmp_path / "eval-00.tar", [("9.png", png(9))])
    with pytest.raises(UsageError, match=r"eval-00\.tar: its name does not say whether it is of train, val or test"):
        shard_collection(str(tmp_path))
    write(tmp_path / "alone" / "eval-00.tar", [("9.png", png(9))])
    assert shard_collection(str(tmp_path / "alone")).split_names == ("train", "val", "all")


def test_labels_by_name_json_or_none(tmp_path):
    bodies = [json.dumps({"label": label, "width": 8}).encode() for label in ("dog", "cat", "dog")]
    write(
        tmp_path / "a.tar",
        [item for i, body in enumerate(bodies) for item in ((f"{i}.JSON", body), (f"{i}.jpg", png(i)))],
    )
    write(tmp_path / "b.tar", [("7.png", png(7)), ("7.cls", b"cow\n"), ("7.txt", b"a caption"), ("__note__", b"")])
    manifest = labelled_manifest(data(tmp_path), "all")
    assert manifest.classes == ("cat", "cow", "dog")
    assert [entry.label for entry in manifest.entries] == [2, 0, 2, 1]
    assert [e.label for e in labelled_manifest(data(tmp_path), "all", ["dog", "cow", "cat"]).entries] == [0, 2, 0, 1]
    with pytest.raises(UsageError, match="label 'cow' is not one of the 2 classes"):
        labelled_manifest(data(tmp_path), "all", ["dog", "cat"])
    write(tmp_path / "c.tar", [("8.png", png(8))])
    assert (
        len(unlabelled_mixture(data(tmp_path), validation=False))
        + len(unlabelled_mixture(data(tmp_path), validation=True))
        == 5
    )
    with pytest.raises(UsageError, match=r"c\.tar/8\.png: has no label"):
        labelled_manifest(data(tmp_path), "all")


def test_numbers_count_the_classes(folder):
    assert [e.label for e in labelled_manifest(data(folder), "val", ["zero", "one", "two"]).entries[:3]] == [2, 0, 1]
    (folder / "classes.txt").write_text("zero\none\ntwo\n")
    assert labelled_manifest(data(folder), "val").classes == ("zero", "one", "two")
    assert [e.label for e in labelled_manifest(data(folder), "val", ["two", "one", "zero"]).entries[:3]] == [0, 2, 1]


def test_a_damaged_shard_gives_what_comes_before(folder, capsys):
    """Truncated in a body, a header or before the end mark, or overwritten: reported, earlier samples are used."""
    path = folder / "set-train-001.tar"
    good = path.read_bytes()
    with tarfile.open(path) as tar:
        places = [member.offset for member in tar.getmembers()]
    cuts = {
        "body": (good[: places[8] + 512 + 20], 4),
        "header": (good[: places[8] + 100], 3),
        "between": (good[: places[8]], 3),
        "no end": (good[: places[-1] + 1024], 9),
        "overwritten": (good[: places[8]] + b"\xff" * 600 + good[places[8] + 600 :], 3),
        "empty": (b"", 0),
        "no tar": (b"\xff" * 5000, 0),
    }
    assert len(labelled_manifest(data(folder), "train").entries) == 20
    for name, (body, left) in cuts.items():
        path.write_bytes(body)
        entries = unlabelled_mixture(data(folder), validation=False).sources[0].entries
        assert reds(entries) == list(range(10 + left)), name
        said = capsys.readouterr().err
        assert f"broken: {path}: is truncated or" in said, name
        assert f"the {left} images before are used" in said, name
    path.write_bytes(good)
    assert len(labelled_manifest(data(folder), "train").entries) == 20
    assert not capsys.readouterr().err
    path.write_bytes(good[:5000])
    labelled_manifest(data(folder), "train")
    labelled_manifest(data(folder), "train")
    assert capsys.readouterr().err.count("broken:") == 2  # at every start, not only when it was listed


def test_only_changed_shards_are_listed_again(folder, monkeypatch):
    listed = []
    real = shards._list_tar
    monkeypatch.setattr(shards, "_list_tar", lambda path, name, stamp: listed.append(name) or real(path, name, stamp))
    shard_collection(str(folder))
    assert len(listed) == 3
    shard_collection(str(folder))
    assert len(listed) == 3
    write(folder / "set-train-000.tar", [("1.png", png(1)), ("1.cls", b"9")])
    found = shard_collection(str(folder))
    assert set(listed[3:]) == {"set-train-000.tar"}
    assert (found.label_names, len(found.index)) == (("0", "1", "2", "9"), 21)


def test_faults_of_packing_are_named(tmp_path):
    write(tmp_path / "a.tar", [("1.png", png(1)), ("1.png", png(2))])
    with pytest.raises(UserError, match=r"a\.tar: 1\.png: duplicate file name"):
        unlabelled_mixture(data(tmp_path), validation=False)
    write(tmp_path / "a.tar", [("1.png", png(1)), ("1.json", b"{")])
    with pytest.raises(UserError, match=r"a\.tar: 1\.json holds no label"):
        unlabelled_mixture(data(tmp_path), validation=False)


def test_images_beside_shards_are_refused(folder):
    (folder / "x.png").write_bytes(png(1))
    with pytest.raises(UsageError, match=r"holds images and other data \(set-train-000\.tar\)"):
        unlabelled_mixture(data(folder), validation=False)


def test_workers_read_shards_alike_and_keep_no_files_open(folder):
    """A broken member is named and replaced by the next one."""
    members = [(f"{i}.png", png(i) if i != 3 else b"no image") for i in range(10)]
    write(folder / "set-train-000.tar", members)
    batches = []
    for workers in (0, 2):
        config = data(folder, workers=workers)
        samples = SampleDataset(unlabelled_mixture(config, validation=False), config, AugmentConfig(), 0, None)
        before = len(os.listdir("/proc/self/fd"))
        loader = training_loader(samples, plan_batch(10, 5, 1), seed=0, rank=0, first=0, last=2, pin=False)
        batches.append(list(loader))
        if not workers:
            assert len(os.listdir("/proc/self/fd")) == before
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert a.broken == b.broken
    broken = {line for batch in batches[0] for line in batch.broken}
    assert broken == {f"{folder}/set-train-000.tar: 3.png: is not an image that is read ({', '.join(FORMATS)})"}


def test_a_shard_that_is_gone_is_a_broken_file(folder):
    entry = labelled_manifest(data(folder), "train").entries[0]
    entry.path.unlink()
    with pytest.raises(DecodeError, match=r"set-train-000\.tar: cannot be read \(No such file"):
        read_tar_member(entry)


def test_offsets_after_long_names(tmp_path):
    """A long name takes several headers in a tar; the offset is still that of the content."""
    bodies = {f"{'long' * 40}/{i}.png": png(i) for i in range(5)}
    path = write(tmp_path / "a.tar", list(bodies.items()))
    entries = unlabelled_mixture(data(tmp_path), validation=False).sources[0].entries
    raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    for entry in entries:
        inside = entry.name.removeprefix("a.tar/")
        assert raw[entry.offset : entry.offset + entry.size].tobytes() == bodies[inside]
