"""Several seeds or folds in one command: a folder each, resumable as a whole, with mean and spread at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report.report_pages import Page, make_folder, write_page
from tests.training.resume_worker import Ranks
from tests.training.runs import write_noise_clips, write_recipe
from video_swinv2.cli import main
from video_swinv2.report.training_run import Series, SeriesRun, read_training_run
from video_swinv2.training.metrics import read_metrics


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_noise_clips(folder, write_video, [number % 2 for number in range(8)], ("a", "b"))
    for fold in range(2):
        lines = [
            f"{number}.mp4,{'ab'[number % 2]},{'val' if number // 4 == fold else 'train'}\n" for number in range(8)
        ]
        (folder / f"fold-{fold}.csv").write_text("path,label,split\n" + "".join(lines))
    return folder


@pytest.fixture
def recipe(clips: Path, tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        values = {
            "out": str(tmp_path / "out"),
            "init": "scratch",
            "model": {"name": "swinv2_nano", "window": [2, 4, 4]},
            "data": {"source": str(clips), "frames": 2, "image_size": 32, "workers": 0},
            "optim": {"epochs": 1, "lr": 1e-3, "batch": 4, "micro_batch": 2},
            "engine": {"engine": "plain", "precision": "fp32", "device": "cpu"},
            "log_every": 1,
        }
        return str(write_recipe(tmp_path, values, changes))

    return write


def test_seeds_run_one_after_the_other_and_what_has_finished_is_kept(
    recipe: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe(), "--seeds", "3"]) == 0
    first = (tmp_path / "out" / "seed-3" / "last.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["train", recipe(), "--seeds", "3,7"]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "out" / "seed-3" / "last.safetensors").stat().st_mtime_ns == first
    assert f"run 1 of 2: {tmp_path / 'out' / 'seed-3'}\n" in said
    assert f"{tmp_path / 'out' / 'seed-3'}: finished at step 2 of 2" in said
    runs = json.loads((tmp_path / "out" / "series.json").read_text())["runs"]
    for seed, figures in zip((3, 7), runs, strict=True):
        folder = tmp_path / "out" / f"seed-{seed}"
        record = json.loads((folder / "run.json").read_text())
        assert record["seed"] == seed
        last = read_metrics(folder)[-1]["val/top1"]
        assert figures == {
            "name": f"seed-{seed}", "best": record["best"], "best_step": record["best_step"], "last": last
        }  # fmt: skip
    mean = sum(figures["best"] for figures in runs) / 2
    assert f"{tmp_path / 'out'}: val/top1, mean of 2 runs: best {100 * mean:.2f} % (standard deviation " in said
    # The report of a model's test shows what is in the record of its training run.
    assert read_training_run(folder).record["series"] in said
    values = {"path": str(folder / "model.safetensors")}
    make_folder(tmp_path / "test", ("a", "b"), 20, model=values)
    assert read_training_run(folder).record["series"] in Page(write_page(tmp_path / "test")).text


def test_folds_are_trained_on_their_lists(
    recipe: Callable[..., str], clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe(optim={"epochs": 0.5}), "--folds", "2"]) == 0
    records = [json.loads((tmp_path / "out" / f"fold-{fold}" / "run.json").read_text()) for fold in range(2)]
    assert [record["data"]["source"] for record in records] == [[str(clips / f"fold-{fold}.csv")] for fold in range(2)]
    assert [(record["data"]["samples"], record["data"]["val_samples"]) for record in records] == [(4, 4)] * 2
    assert "mean of 2 runs" in capsys.readouterr().out
    assert main(["train", recipe(), "--folds", "3"]) == 2
    assert f"--folds: {clips} has 2 lists of folds, not 3; run `python -m data_prep split" in capsys.readouterr().err
    assert main(["train", recipe(), "--seeds", "1,1"]) == 2
    assert "--seeds: names a seed twice" in capsys.readouterr().err


def train_seeds(config: str) -> None:
    """Run `video-swinv2 train CONFIG --seeds 0,1` and exit with its code."""
    sys.exit(main(["train", config, "--seeds", "0,1"]))


def test_two_processes_stay_together_for_all_runs(recipe: Callable[..., str], tmp_path: Path) -> None:
    config = recipe(engine={"engine": "deepspeed"})
    assert Ranks(2, train_seeds, config, log=tmp_path / "log").wait() == [0, 0], (tmp_path / "log").read_text()[-3000:]
    runs = json.loads((tmp_path / "out" / "series.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["seed-0", "seed-1"]
    assert (tmp_path / "log").read_text().count("mean of 2 runs") == 1


def test_the_spread_is_the_standard_deviation_of_a_sample() -> None:
    runs = [SeriesRun(name=f"seed-{i}", best=best, best_step=2, last=0.5) for i, best in enumerate((0.6, 0.7, 0.8))]
    assert Series(metric="val/top1", runs=runs).summary() == (
        "val/top1, mean of 3 runs: best 70.00 % (standard deviation 10.00 %), last 50.00 % (standard deviation 0.00 %)"
    )
    assert Series(metric="val/loss", runs=runs[:1]).summary() == "val/loss, mean of 1 runs: best 0.6000, last 0.5000"
