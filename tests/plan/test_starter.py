"""The first configuration of a data set: what it is made from, and that it can be trained with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from video_swinv2.cli import main
from video_swinv2.config import load_config
from video_swinv2.errors import UserError
from video_swinv2.plan.plan import make_plan
from video_swinv2.plan.starter import starter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="expects the sizes for CPUs")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Sixteen videos of 40 frames at 25 per second, and one that cannot be read."""
    root = tmp_path_factory.mktemp("my clips")
    lines = ["path,label"]
    for number in range(16):
        write_video(root / f"{number}.mp4", np.zeros((40, 64, 96, 3), np.uint8))
        lines.append(f"{number}.mp4,{('SwipeLeft', 'SwipeRight')[number % 2]}")
    (root / "cut.mp4").write_bytes(b"no video")
    (root / "train.csv").write_text("\n".join([*lines, "cut.mp4,SwipeLeft"]) + "\n")
    return root


def test_a_starter_is_made_from_the_videos(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "mine.yaml"
    assert main(["config", "init", str(clips), "--out", str(file)]) == 0
    assert f"wrote {file}; next: video-swinv2 plan {file}" in capsys.readouterr().out
    header = [line for line in file.read_text().splitlines() if line.startswith("# ")]
    assert f"# {clips}: 17 videos of 2 classes in train; splits: train" in header
    assert "# median video: 40 frames at 25 per second, short side 64 pixels; a clip spans 1.6 s" in header
    assert any("needs a split val: python -m data_prep split" in line for line in header)
    config = load_config(file)
    # 8 frames over all 40, which are less than the two seconds that a clip should show.
    assert (config.data.frames, config.data.frame_stride, config.model.name) == (8, 5, "swinv2_nano")
    assert config.data.image_size == 56, "no larger than the videos, and a whole window"
    assert config.augment.flip == 0.0, "a flip turns one class into the other"
    assert config.optim.micro_batch is None, "planned on the machine that trains"
    assert config.optim.batch == 4, "four steps in an epoch of 17"
    assert config.optim.lr == pytest.approx(1e-3 * 4 / 64)
    plan = make_plan(config)
    assert (plan.device, plan.steps_per_epoch) == ("cpu", 17 / 4)
    assert main(["config", "init", str(clips), "--out", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_images_have_no_frames(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 30)).save(tmp_path / "set" / "train" / name / f"{number}.png")
    (tmp_path / "a.yaml").write_text(starter(tmp_path / "set"))
    config = load_config(tmp_path / "a.yaml")
    assert (config.data.frames, config.model.patch_size, config.augment.flip) == (None, (8, 8), 0.5)


def test_a_data_set_of_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    (tmp_path / "train.csv").write_text("path,label\na.mp4,x\n")
    with pytest.raises(UserError, match=r"a\.mp4.*check the data set"):
        starter(tmp_path)
