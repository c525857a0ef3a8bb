"""Which samples an epoch draws from several sources, and in what order; with sources of numbered entries."""

import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from video_swinv2.config import WeightedSource, load_config, to_yaml, validate_config
from video_swinv2.data.index import CompactEntries
from video_swinv2.data.manifest import Entry
from video_swinv2.data.mixture import Mixture, MixtureSource
from video_swinv2.data.sampling import random_clip, seeded, spread_clip
from video_swinv2.data.sources import unlabelled_mixture
from video_swinv2.errors import UsageError


def source(name, size):
    return [Entry(f"{name}{i}", f"{name}{i}", -1) for i in range(size)]


def drawn(mixture, epoch, seed=0):
    return [mixture[number].entry.name for number in mixture.order(seed, epoch).tolist()]


def test_without_weights_everything_comes_once():
    mixture = Mixture([MixtureSource(source("a", 5)), MixtureSource(source("b", 3))])
    assert len(mixture) == mixture.distinct_samples == 8
    assert sorted(drawn(mixture, 0)) == sorted(drawn(mixture, 1)) == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2"]
    assert drawn(mixture, 0) != drawn(mixture, 1)
    assert drawn(mixture, 0) == drawn(mixture, 0)
    assert (mixture.order(3, 2) == np.random.default_rng((3, 2)).permutation(8)).all()  # as earlier runs had it


def test_samples_of_one_entry_stay_together():
    mixture = Mixture(
        [
            MixtureSource(source("a", 4)),
            MixtureSource(source("v", 3), repeats=4),
            MixtureSource(source("w", 2), repeats=2),
        ]
    )
    assert len(mixture) == 4 + 12 + 4
    order = mixture.order(0, 5)
    assert sorted(order.tolist()) == list(range(20))
    places = [mixture[number] for number in order.tolist()]
    for at, place in enumerate(places):
        assert int(order[at]) - place.first == place.nth
        if place.nth:
            assert places[at - 1] == type(place)(place.entry, place.first, place.nth - 1, place.count)
    assert [place.count for place in places].count(4) == 12


def test_weights_are_shares_of_an_epoch():
    parts = [
        MixtureSource(source("a", 90), weight=1.0),
        MixtureSource(source("b", 6), weight=1.0),
        MixtureSource(source("v", 4), 4, weight=2.0),
    ]
    mixture = Mixture(parts)
    assert mixture.distinct_samples == 90 + 6 + 16
    kinds = [name[0] for name in drawn(mixture, 0)]
    assert [kinds.count(kind) for kind in "abv"] == [28, 28, 56]
    assert len(mixture) == 112
    numbers = mixture.order(0, 0)
    assert len(set(numbers.tolist())) == 112  # an entry drawn twice has two numbers, hence two augmentations
    small = [name for name in drawn(mixture, 0) if name[0] == "b"]
    assert sorted({small.count(f"b{i}") for i in range(6)}) == [4, 5]


def test_a_weighted_source_is_drawn_evenly():
    """Over several epochs, every entry of a large source comes once before any comes twice."""
    mixture = Mixture([MixtureSource(source("a", 50), weight=1.0), MixtureSource(source("b", 10), weight=5.0)])
    seen = [name for epoch in range(10) for name in drawn(mixture, epoch) if name[0] == "a"]
    assert len(seen) == 100
    assert len(set(seen[:50])) == len(set(seen[50:])) == 50
    assert seen[:50] != seen[50:]


def test_either_all_sources_have_weights_or_none():
    with pytest.raises(UsageError, match="some sources have a weight and some do not"):
        Mixture([MixtureSource(source("a", 5), weight=1.0), MixtureSource(source("b", 3))])


def test_clips_of_a_video_are_spread_over_it():
    with seeded(0, 1):
        starts = [[spread_clip(40, 4, 2, nth, 3)[0] for nth in range(3)] for _ in range(400)]
    for nth, (low, high) in enumerate(((0, 11), (11, 22), (22, 33))):
        assert {row[nth] for row in starts} == set(range(low, high))
    with seeded(4, 2):
        alone = spread_clip(40, 4, 2, 0, 1)
    with seeded(4, 2):
        assert alone == random_clip(40, 4, 2)
    with seeded(0):
        assert [spread_clip(5, 4, 2, nth, 3) for nth in range(3)] == [(0, 2, 4, 1)] * 3  # too short: looped
        assert [spread_clip(2, 1, 1, nth, 4) for nth in range(4)] == [(0,), (0,), (1,), (1,)]


def settings(source):
    return {
        "out": "x",
        "init": "scratch",
        "model": {"name": "swinv2_nano"},
        "data": {"source": source, "image_size": 64},
        "optim": {"epochs": 1, "lr": 1e-3, "batch": 2, "micro_batch": 2},
    }


def test_sources_in_a_configuration(tmp_path):
    config = validate_config(settings(["a", {"path": "b", "weight": 2}]), "x.yaml")
    assert config.data.source == ("a", WeightedSource("b", 2.0))
    assert [Path(source) for source in config.data.source] == [Path("a"), Path("b")]
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert validate_config(settings({"path": "b", "weight": 2}), "x.yaml").data.source == (WeightedSource("b", 2.0),)
    assert validate_config(settings("a"), "x.yaml").data.source == ("a",)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], r"data\.source: invalid value \[\]"),
        ([{"path": "b", "weight": 0}], r"data\.source\.weight: invalid value 0"),
        ([{"path": "b"}], r"data\.source\.0\.weight is missing"),
        (
            [{"path": "b", "weight": 1, "wieght": 1}],
            r"unknown key data\.source\.0\.wieght; did you mean data\.source\.0\.weight\?",
        ),
        ([3], r"data\.source: invalid value 3"),
    ],
)
def test_wrong_sources_are_named(source, words):
    with pytest.raises(UsageError, match=rf"^x\.yaml: {words}") as caught:
        validate_config(settings(source), "x.yaml")
    assert "\n" not in str(caught.value)


def test_mixed_sources_are_drawn_by_weight(tmp_path):
    for name, size in (("many", 190), ("few", 19)):
        (tmp_path / name).mkdir()
        for i in range(size):
            (tmp_path / name / f"{i}.png").write_bytes(b"")
    weighted = [{"path": str(tmp_path / name), "weight": weight} for name, weight in (("many", 1), ("few", 3))]
    data = validate_config(settings(weighted), "x.yaml").data
    train, val = unlabelled_mixture(data, validation=False), unlabelled_mixture(data, validation=True)
    folders = [train[number].entry.path.parent.name for number in train.order(0, 0).tolist()]
    assert len(folders) == 180 + 18
    assert folders.count("few") / len(folders) == pytest.approx(0.75, abs=0.01)
    assert (len(val), val.sources[0].weight) == (10 + 1, None)


def test_entries_reach_spawned_workers_in_shared_memory():
    """Entries are sent as shared tensors: the pickle of 20,000 of them has a few kilobytes."""
    listed = CompactEntries([*source("v", 20_000)])
    sent = ForkingPickler.dumps(listed)
    assert len(sent) < 5_000 < len(pickle.dumps(source("v", 20_000)))
    assert list(pickle.loads(pickle.dumps(listed)))[5:7] == source("v", 20_000)[5:7]


def tell_last(samples, answers):
    answers.put(samples[len(samples) - 1].entry.name)


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_that_are_not_forked_get_the_entries(tmp_path, method):
    """Image files and listed videos, in a process that is not forked, as on macOS."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"")
    (images,) = unlabelled_mixture(
        validate_config(settings(str(tmp_path / "images")), "x.yaml").data, validation=False
    ).sources
    samples = Mixture([images, MixtureSource(CompactEntries(source("v", 50)))])
    context = torch.multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=tell_last, args=(samples, answers))
    process.start()
    assert answers.get(timeout=600) == "v49"
    process.join()
    assert process.exitcode == 0
