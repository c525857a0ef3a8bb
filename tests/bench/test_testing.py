"""The benchmark of a test: all ways give the same scores, and each opens the files as often as it should."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import video_swinv2 as vs
from video_swinv2.bench.testing import bench_test, bench_test_table
from video_swinv2.errors import UserError


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> tuple[Path, Path]:
    """A small model and three noisy videos of 30 frames."""
    root = tmp_path_factory.mktemp("bench")
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 56, 3), dtype=np.uint8)
    for number in range(3):
        write_video(root / f"{number}.mp4", noise[:, ::-1] if number else noise)
    (root / "test.txt").write_text("".join(f"{number}.mp4 0\n" for number in range(3)))
    torch.manual_seed(0)
    model = vs.create_model("swinv2_nano", num_classes=2, frames=4, image_size=32, window=(2, 4, 4))
    preprocessing = vs.Preprocessing(frames=4, frame_stride=2, image_size=(32, 32))
    vs.save_model(model, root / "m.safetensors", classes=("a", "b"), preprocessing=preprocessing)
    (root / "classes.txt").write_text("a\nb\n")
    return root / "m.safetensors", root


def test_all_ways_give_the_same_scores(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()
    really_open = av.open

    def counting_open(file: str, **options: Any) -> Any:
        opened[Path(file).name] += 1
        return really_open(file, **options)

    monkeypatch.setattr(av, "open", counting_open)
    what = {"split": "test", "videos": 2, "batch_views": 12, "rounds": 2, "threads": 1, "device": "cpu"}
    result = bench_test(*paths, protocols="videoswin-4x3,center-1x1", **what)  # type: ignore[arg-type]  # as named
    assert opened == {"0.mp4": 3 * (1 + 13 + 13), "1.mp4": 3 * (1 + 13 + 13)}, (
        "one warm-up and two timed rounds of all three ways"
    )
    assert (result["videos"], result["views"], result["rounds"]) == (2, 13, 2)
    assert result["difference"] < 1e-4
    assert min(result["decode_times_as_fast"].values()) > 1, "13 openings and decodes take longer than one"
    text = bench_test_table(result)
    for rival in ("seek per view", "full decode per view"):
        row = next(line for line in text.splitlines() if line.startswith(f"| {rival}"))
        assert f" {result['times_as_fast'][rival]:.2f} |" in row
        assert row.endswith(f" {result['decode_times_as_fast'][rival]:.2f} |")


def test_a_video_that_cannot_be_read_is_named(paths: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"no video")
    (tmp_path / "test.txt").write_text("x.mp4 0\n")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"x\.mp4: .*remove it from the list"):
        bench_test(
            paths[0],
            tmp_path,
            protocols="center-1x1",
            split="test",
            videos=2,
            batch_views=12,
            rounds=1,
            threads=1,
            device="cpu",
        )
