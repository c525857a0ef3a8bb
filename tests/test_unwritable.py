"""Places that cannot be written or read are named in one line by every verb, and no verb writes among its samples."""

import importlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import video_swinv2 as vs
from data_prep.cli import main as data_prep
from tests.training.runs import write_recipe
from video_swinv2.cli import main as video_swinv2
from video_swinv2.data.sources import refuse_inside_tree
from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import lock_file
from video_swinv2.weights.formats import read_checkpoint
from video_swinv2.weights.store import load_model, read_card, read_tensors

# What each verb is called with; DATA, CLIPS, MODEL, RECIPE, TESTED and PREPARED are made by `paths`.
FOLDER_VERBS = {
    "synth": "synth OUT --train 1 --val 1 --test 1 --size 32 --frames 2 --workers 1",
    "download": "download kinetics400 --split val --to OUT --source CLIPS",
    "prepare": "prepare CLIPS OUT --workers 1",
    "prepare --shard": "prepare CLIPS OUT --workers 1 --shard 0/2",
    "prepare --preflight": "prepare CLIPS OUT --workers 1 --preflight",
    "merge": "merge OUT",
    "verify": "verify OUT --workers 1",
    "split": "split OUT --val 0.5",
    "status": "status OUT",
    "train": "train RECIPE out=OUT",
    "pretrain": "pretrain RECIPE out=OUT mask.unit=8 augment.mixup=0",
    "test": "test MODEL DATA --split all --protocol center-1x1 --out OUT data.workers=0",
    "probe": "probe MODEL DATA --seeds 1 --k 1 --method knn --out OUT data.workers=0",
    "report": "report TESTED TESTED2 --out OUT",
    "predict --video": "predict CLIP_MODEL CLIPS --video OUT",
    "convert to a folder": "convert MODEL OUT",
    "demo": "demo --out OUT",
}
FILE_VERBS = {
    "status --html": "status PREPARED --html OUT.html",
    "predict --features": "predict MODEL DATA --features OUT.npz",
    "convert": "convert MODEL OUT.safetensors",
    "export": "export MODEL OUT.pt2",
}


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def paths(open_folder, write_video) -> dict[str, str]:
    """The paths that the commands above name."""
    root = open_folder
    noise = np.random.default_rng(0)
    for number in range(8):
        path = root / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    write_video(root / "clips" / "a" / "1.mp4", noise.integers(0, 255, (6, 32, 32, 3), dtype=np.uint8))
    for name, frames, window in (("image", None, 4), ("clip", 4, (2, 4, 4))):
        model = vs.create_model("swinv2_nano", num_classes=2, frames=frames, image_size=32, window=window)
        preprocessing = vs.Preprocessing(frames, 1, (32, 32))
        vs.save_model(model, root / f"{name}.safetensors", classes=("a", "b"), preprocessing=preprocessing)
    values = {
        "init": "scratch",
        "model": {"name": "swinv2_nano", "window": 4},
        "data": {"source": str(root / "data"), "image_size": 32, "workers": 0},
        "optim": {"epochs": 1, "lr": 1e-3, "batch": 2, "micro_batch": 2},
        "engine": {"engine": "plain", "precision": "fp32", "device": "cpu"},
    }
    found = {
        "DATA": root / "data",
        "CLIPS": root / "clips",
        "MODEL": root / "image.safetensors",
        "CLIP_MODEL": root / "clip.safetensors",
        "RECIPE": write_recipe(root, values, {"out": str(root / "run")}),
        "PREPARED": root / "prepared",
        "TESTED": root / "tested",
        "TESTED2": root / "tested2",
    }
    named = {key: str(path) for key, path in found.items()}
    assert call(f"prepare CLIPS {root}/prepared --workers 1", named) == 0
    for folder in ("tested", "tested2"):
        assert call(FOLDER_VERBS["test"], named | {"OUT": str(root / folder)}) == 0
    return named


def call(command: str, paths: dict[str, str]) -> int:
    """Run a command of one of the two programs in this process, with the words that `paths` knows replaced."""
    verb, *rest = (word for word in command.split())
    arguments = [verb]
    for word in rest:
        for key in sorted(paths, key=len, reverse=True):
            if word in (key, f"out={key}") or word.startswith(f"{key}."):
                word = word.replace(key, paths[key], 1)
                break
        arguments.append(word)
    ours = ("synth", "download", "prepare", "merge", "verify", "split", "status")
    return (data_prep if verb in ours else video_swinv2)(arguments)


def refused(capsys: pytest.CaptureFixture[str], command: str, paths: dict[str, str]) -> str:
    """The one line with which a command fails. An exception other than UserError would be a traceback for the user."""
    capsys.readouterr()
    assert call(command, paths) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("error:"))
    assert lines[-1] == line
    return line


@pytest.mark.parametrize("verb", [*FOLDER_VERBS, *FILE_VERBS])
def test_a_path_below_a_file(paths, tmp_path, capsys, verb):
    (tmp_path / "file").write_text("not a folder")
    out = tmp_path / "file" / "below"
    line = refused(capsys, (FOLDER_VERBS | FILE_VERBS)[verb], paths | {"OUT": str(out)})
    assert str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("verb", FOLDER_VERBS)
def test_a_file_in_the_place_of_a_folder(paths, tmp_path, capsys, verb):
    (tmp_path / "file").write_text("not a folder")
    line = refused(capsys, FOLDER_VERBS[verb], paths | {"OUT": str(tmp_path / "file")})
    assert str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("verb", FILE_VERBS)
def test_a_folder_in_the_place_of_a_file(paths, tmp_path, capsys, verb):
    suffix = FILE_VERBS[verb].rpartition("OUT")[2]
    (tmp_path / f"out{suffix}").mkdir()
    (tmp_path / f"out{suffix}" / "kept").write_text("")
    assert f"out{suffix}" in refused(capsys, FILE_VERBS[verb], paths | {"OUT": str(tmp_path / "out")})
    assert [path.name for path in tmp_path.rglob("*")] == [f"out{suffix}", "kept"]


def test_a_lock_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/\.lock: cannot be written \(Not a directory\); "):
        lock_file(tmp_path / "file" / ".lock", "busy").__enter__()


@contextmanager
def without_rights() -> Iterator[None]:
    """Go on as a user whom permissions stop, since they do not stop root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("read", [read_card, read_tensors, load_model, read_checkpoint])
def test_a_model_file_without_permission_to_read(paths, open_folder, read):
    path = open_folder / read.__name__ / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(Path(paths["MODEL"]).read_bytes())
    read(path)
    for locked in (path, path.parent):
        mode = locked.stat().st_mode
        locked.chmod(0)
        with without_rights(), pytest.raises(UserError, match=rf"{path}: cannot be read \(Permission denied\)"):
            read(path)
        locked.chmod(mode)


# Without those that start other programs, which the other user may not be allowed to do.
@pytest.mark.parametrize(
    "verb",
    [
        *("synth", "download", "prepare", "prepare --shard", "prepare --preflight", "train", "pretrain"),
        *("test", "probe", "report", "convert to a folder"),
    ],
)
def test_a_folder_without_permission_to_write(paths, open_folder, capsys, monkeypatch, verb):
    monkeypatch.setenv("XDG_CACHE_HOME", str(open_folder / "cache"))
    # Imported before, because the other user may not be allowed to read the files of Python itself.
    for module in ("data_prep.download", "video_swinv2.training.loop"):
        importlib.import_module(module)
    out = open_folder / verb.replace(" ", "")
    out.mkdir(mode=0o555)
    with without_rights():
        line = refused(capsys, FOLDER_VERBS[verb], paths | {"OUT": str(out)})
    assert str(out) in line
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        "train RECIPE out=OUT",
        "pretrain RECIPE out=OUT mask.unit=8 augment.mixup=0",
        "test MODEL DATA --split all --protocol center-1x1 --out OUT data.workers=0",
        "probe MODEL DATA --out OUT data.workers=0",
        "predict MODEL DATA --video OUT",
        "prepare DATA OUT --workers 1",
    ],
)
def test_nothing_is_written_among_the_samples(paths, tmp_path, capsys, command):
    """The pictures of the report would be samples of the next run."""
    (tmp_path / "link").symlink_to(paths["DATA"])
    before = sorted(Path(paths["DATA"]).rglob("*"))
    for out in (Path(paths["DATA"]), Path(paths["DATA"]) / "runs" / "a", tmp_path / "link" / "runs"):
        line = refused(capsys, command, paths | {"OUT": str(out)})
        assert f"{out}: is inside the source {paths['DATA']}; choose a folder outside it" in line
    assert sorted(Path(paths["DATA"]).rglob("*")) == before


def test_a_data_set_with_lists_may_hold_its_runs(tmp_path):
    """It consists of what its lists name, whatever else is in the folder."""
    with pytest.raises(UsageError, match="is inside the source"):
        refuse_inside_tree(tmp_path / "runs", [tmp_path])
    (tmp_path / "train.txt").write_text("a.mp4 0\n")
    refuse_inside_tree(tmp_path / "runs", [tmp_path])
