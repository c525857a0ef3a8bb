"""A model, seven small videos, and a finished test of the model on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import video_swinv2 as vs
from tests.evaluation.small import CLASSES, MOTION, N_VIDEOS, make_answers_differ, moving, quick
from video_swinv2.evaluation.testing import run_test


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model = vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=32, window=(2, 4, 4))
    make_answers_differ(model)
    preprocessing = vs.Preprocessing(frames=4, frame_stride=2, image_size=(32, 32))
    vs.save_model(model, path, classes=CLASSES, preprocessing=preprocessing, provenance={"init": "scratch"})
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """A list data set whose class order differs from the model's, with names that are hard to quote and escape."""
    root = tmp_path_factory.mktemp("data")
    own = ("up", "left", "right")
    lines = []
    for i in range(N_VIDEOS):
        name = own[i % 3]
        path = f'{name}/it\'s a "clip" {i}.mp4'
        write_video(root / path, moving(6 + 5 * i, MOTION[name], i))
        lines.append(f"{path} {i % 3}")
    (root / "test.txt").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("\n".join(own) + "\n")
    return root


@pytest.fixture(scope="session")
def with_broken(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The same list with two broken files, one of them in the middle of a batch."""
    root = tmp_path_factory.mktemp("broken")
    lines = (data / "test.txt").read_text().splitlines()
    absolute = [f"{data}/{line}" for line in lines]
    (root / "cut.mp4").write_bytes((data / lines[0].rsplit(" ", 1)[0]).read_bytes()[:200])
    absolute[3:3] = [f"{root}/cut.mp4 1"]
    (root / "test.txt").write_text("\n".join([*absolute, "gone.mp4 2"]) + "\n")
    (root / "classes.txt").write_text((data / "classes.txt").read_text())
    return root


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of this test's own, for the indices of image folders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tested(model_path: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    run_test(model_path, data, protocol="videoswin-4x3", split="test", out=out, overrides=quick())
    return out
