"""Damaged files through everything that reads videos: each is read, or fails alone with an error that names it.

The quick tests take a few dozen mutations, the slow ones all of them. `-s` shows what became of the files.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from data_prep.jobs import TranscodeSettings
from data_prep.outcomes import REASONS, outcome_counts
from data_prep.prepare import prepare
from tests.data.mutations import write_mutations
from tests.inference.conftest import save_model
from video_swinv2.config import AugmentConfig, DataConfig
from video_swinv2.data.datasets import UNREADABLE_LABEL, SampleDataset
from video_swinv2.data.loading import plan_batch, training_loader, validation_loader
from video_swinv2.data.manifest import Entry
from video_swinv2.evaluation.protocols import find_protocol
from video_swinv2.evaluation.reading import Group, VideoGroups, VideoRecord, deliver_groups
from video_swinv2.inference.predictor import OverTime, predict
from video_swinv2.weights.store import Preprocessing

ALL = 1500
WORKERS = 2
LIMIT_SECONDS = 20.0


@pytest.fixture(
    scope="module", params=[range(0, 1480, 37), pytest.param(range(ALL), marks=pytest.mark.slow)], ids=["some", "all"]
)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_mutations(tmp_path_factory.mktemp("mutations"), request.param)


def samples(files: list[Path], augment: AugmentConfig | None) -> SampleDataset:
    data = DataConfig(
        source=str(files[0].parent),
        image_size=32,
        frames=4,
        short_side=36,
        workers=WORKERS,
        decode_seconds=LIMIT_SECONDS,
    )
    return SampleDataset([Entry(path.name, str(path), 0) for path in files], data, augment, 0, None)


def show(what: str, results: Iterable[str]) -> None:
    """Print how many files had each result, without the numbers in it."""
    print(f"\n{what}")
    for result, count in Counter("".join("#" if c.isdigit() else c for c in text) for text in results).most_common():
        print(f"{count:6} {result or 'read'}")


def test_training(files: list[Path]) -> None:
    """An epoch has every sample in its order, several to a batch. What is broken is named and replaced."""
    dataset = samples(files, AugmentConfig(rand_augment=2, erasing=0.25))
    plan = plan_batch(len(files), 8, 1)
    loader = training_loader(dataset, plan, seed=0, rank=0, first=0, last=1, pin=False)
    batches = list(loader)
    assert plan.micro > 1
    assert [number for batch in batches for number in batch.numbers] == dataset.mixture.order(0, 0).tolist()
    broken = dict(line.split(": ", 1) for batch in batches for line in batch.broken)
    assert set(broken) <= set(map(str, files))
    assert 0 < len(broken) < len(files)
    assert loader.restarts <= 2 * len(dataset.given_up), "a worker died, and not because of a file"
    show(f"training: {loader.restarts} worker deaths", broken.values())


def test_validation(files: list[Path]) -> None:
    """Every file has its own sample, which is either read, or wrong and named."""
    dataset = samples(files, None)
    loader = validation_loader(dataset, 1, rank=0, world=1, pin=False)
    results = []
    for path, batch in zip(files, loader, strict=True):
        results.append("".join(batch.broken).removeprefix(f"{path}: "))
        assert len(batch.broken) == (batch.labels.item() == UNREADABLE_LABEL)
        assert not batch.broken or batch.broken[0].startswith(f"{path}: ")
        assert "\n" not in results[-1]
    assert loader.restarts <= 2 * len(dataset.given_up), "a worker died, and not because of a file"
    show(f"validation: {loader.restarts} worker deaths", results)


def test_views(files: list[Path]) -> None:
    """The test delivers every group, and for each of its videos the views or a reason of one line."""
    groups = VideoGroups(
        [Entry(path.name, str(path), 0) for path in files],
        find_protocol("videoswin-4x3"),
        Preprocessing(frames=4, frame_stride=2, image_size=(32, 32)),
        group_videos=3,
        frame_order="in-order",
        seed=0,
        time_limit_seconds=LIMIT_SECONDS,
    )
    records: dict[int, VideoRecord] = {}

    def deliver(group: Group, waited_seconds: float) -> None:
        assert len(group.pixels) == len(group.videos) * groups.views
        records.update((record.position, record) for record in group.videos)

    deliver_groups(groups, range(len(groups)), WORKERS, deliver)
    assert sorted(records) == list(range(len(files)))
    assert all(bool(record.views) != bool(record.reason) for record in records.values())
    assert not any("\n" in record.reason for record in records.values())
    show("views", (record.reason for record in records.values()))


@pytest.mark.parametrize("over_time", [None, OverTime(every_seconds=0.2)], ids=["views", "over time"])
def test_predict(files: list[Path], over_time: OverTime | None, tmp_path: Path) -> None:
    """Each file gets an answer or an error of one line, in the order of the files."""
    torch.manual_seed(0)
    model = save_model(tmp_path / "model.safetensors", 4)
    # Over time, each file is decoded in a process of its own, which takes longer; so only every fourth is.
    chosen = files[:: 1 if over_time is None else 4]
    found = predict(
        model,
        chosen,
        protocol="videoswin-4x3",
        over_time=over_time,
        device="cpu",
        workers=WORKERS,
        time_limit_seconds=LIMIT_SECONDS,
    )
    assert [prediction.path for prediction in found] == [str(path) for path in chosen]
    assert all(bool(prediction.answers) != bool(prediction.error) for prediction in found)
    assert not any("\n" in prediction.error for prediction in found)
    show("predict", (prediction.error for prediction in found))


def test_prepare(files: list[Path], tmp_path: Path) -> None:
    """Each file is prepared or fails with a reason, and the counts add up."""
    listed = tmp_path / "all.csv"
    listed.write_text("".join(f"{path} 0\n" for path in files))
    settings = TranscodeSettings(short_side=32, fps=25.0)
    report = prepare(files[0].parent, tmp_path / "out", settings, annotations=[listed], workers=WORKERS)
    (counts,) = report.counts.values()
    groups = outcome_counts(counts)
    assert groups["listed"] == len(files) == groups["ok"] + groups["broken"]
    assert set(counts.failed) <= set(REASONS)
    with (tmp_path / "out" / "failed.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    show("prepare", ["read"] * groups["ok"] + [": ".join(row[-2:]) for row in rows[1:]])
