"""The probe on small real files: features are the model's own, figures equal a count by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import video_swinv2 as vs
from tests.closeness import assert_close
from tests.evaluation.small import quick
from tests.report import independent
from tests.weights.released import microsoft_state, ours, randomise
from video_swinv2.cli import main
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError
from video_swinv2.evaluation import features as features_room
from video_swinv2.evaluation.features import extract_features, open_backbone, with_random_weights
from video_swinv2.evaluation.probe import (
    TEMPERATURE,
    ProbeData,
    knn_probabilities,
    linear_probabilities,
    run_probe,
    summarize_probe,
)
from video_swinv2.evaluation.protocols import PROTOCOLS
from video_swinv2.evaluation.splits import read_labelled_split
from video_swinv2.evaluation.views import cut_image

PER_CLASS = 10
NAMES = ("blue", "green", "red")
QUICK = quick()
pytestmark = pytest.mark.usefixtures("own_cache")


def colours(root: Path, count: int, seed: int = 0) -> Path:
    """`count` noisy pictures per class; the classes differ in colour."""
    generator = np.random.default_rng(seed)
    for channel, name in enumerate(reversed(NAMES)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 120, (64, 64, 3), dtype=np.uint8)
            pixels[..., channel] += 130
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colours(tmp_path_factory.mktemp("data") / "colours", PER_CLASS)


@pytest.fixture(scope="module")
def simmim(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, vs.SwinV2]:
    """A pre-training file, which has no head, and the encoder in it."""
    encoder = ours(num_classes=0)
    path = tmp_path_factory.mktemp("model") / "simmim.safetensors"
    vs.save_model(vs.SimMIM(encoder, 32), path, classes=[], preprocessing=vs.Preprocessing(None, 1, (64, 64)))
    return path, encoder


def probe(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    return run_probe(model, data, **({"k": 5, "seeds": 2, "overrides": QUICK} | changes))


def test_features_are_the_mean_of_the_last_tokens(simmim: tuple[Path, vs.SwinV2], data: Path) -> None:
    path, encoder = simmim
    manifest = read_labelled_split(data, "all")
    made = extract_features(open_backbone(path, QUICK), manifest, PROTOCOLS["center-1x1"], QUICK, None)
    assert made.names == tuple(f"{name}/{i:02d}.png" for name in NAMES for i in range(PER_CLASS))
    assert made.labels.tolist() == [label for label in range(3) for _ in range(PER_CLASS)]
    preprocessing = vs.Preprocessing(None, 1, (64, 64))
    for row in (0, 17, 29):
        picture = torch.from_numpy(np.array(Image.open(data / made.names[row]))).permute(2, 0, 1)
        pixels, _ = cut_image(picture, PROTOCOLS["center-1x1"], preprocessing)
        with torch.no_grad():
            tokens = encoder.eval().forward_features(normalise(pixels, preprocessing.mean, preprocessing.std))
        assert_close(made.vectors[row], tokens.mean(dim=(1, 2))[0])


def test_classes_of_different_colour_are_told_apart_and_reported(
    simmim: tuple[Path, vs.SwinV2], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["probe", str(simmim[0]), str(data), "--k", "5", "--seeds", "2", "--random-weights"]
    assert main([*line, "data.workers=0", "engine.device=cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["weights"], row["method"], row["seed"]) for row in result["rows"]] == [
        (weights, method, seed) for weights in ("given", "random") for seed in (0, 1) for method in ("knn", "linear")
    ]
    for row in result["rows"]:
        assert (row["train"], row["test"]) == (24, {"listed": 6, "scored": 6, "failed": 0})
        assert row["top1"] == 1.0
        assert row["top1_interval"] == pytest.approx(independent.wilson(1.0, 6)), "6 of 6 leave a wide interval"
    assert result["model"]["layout"] == "swinv2_nano of this project, SimMIM"
    assert result["data_fingerprint"] == {"all": read_labelled_split(data, "all").fingerprint}
    assert result["channels"] == 256
    assert main([*line, "data.workers=0", "--method", "knn"]) == 0
    text = capsys.readouterr().out
    assert "3 classes, 24 training and 6 test samples; 20% of each class" in text
    assert "random weights, k-NN" in text
    assert "linear" not in text


def test_votes_equal_a_count_by_hand() -> None:
    generator = np.random.default_rng(0)
    x, test = (generator.normal(size=(n, 7)).astype(np.float32) for n in (40, 9))
    y = generator.integers(0, 3, 40) * 2  # classes 1 and 3 have no training sample
    shares = knn_probabilities(x, y, test, classes=5, k=6)
    for vector, row in zip(test, shares, strict=True):
        cosine = [float(vector @ other / np.linalg.norm(vector) / np.linalg.norm(other)) for other in x]
        votes = np.zeros(5)
        for place in sorted(range(40), key=lambda i: -cosine[i])[:6]:
            votes[y[place]] += np.exp(cosine[place] / TEMPERATURE)
        np.testing.assert_allclose(row, votes / votes.sum(), rtol=1e-4)
    with pytest.raises(UsageError, match="--k 41: there are only 40 training samples"):
        knn_probabilities(x, y, test, classes=5, k=41)


def test_the_linear_probe_finds_what_neighbours_cannot() -> None:
    """The smallest of fifty channels decides the class: cosines hardly see it, standardised weights do."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, 400)
    x = generator.normal(size=(400, 50)).astype(np.float32)
    x[:, 0] = (y * 2 - 1) * 0.01
    probabilities, chosen = linear_probabilities(x[:300], y[:300], x[300:], classes=2, seed=0)
    assert (probabilities.argmax(axis=1) == y[300:]).mean() == 1.0
    assert (knn_probabilities(x[:300], y[:300], x[300:], classes=2, k=5).argmax(axis=1) == y[300:]).mean() < 0.8
    assert chosen["C"] in (1e-4, 1e-3, 1e-2, 0.1, 1, 10)
    pure = generator.integers(0, 2, 300)
    _, chosen = linear_probabilities(x[:300, 1:], pure, x[300:, 1:], classes=2, seed=0)
    assert chosen["C"] < 1, "on noise, cross-validation prefers strong regularisation"


@pytest.mark.filterwarnings("error")
def test_one_class_and_one_sample_of_each_class_are_no_reason_to_warn(
    simmim: tuple[Path, vs.SwinV2], tmp_path: Path
) -> None:
    """scikit-learn does: of a confusion matrix of one cell, and of labels most of which occur once."""
    for i in range(5):
        (tmp_path / "data" / "only").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), 40 * i, dtype=np.uint8)).save(tmp_path / "data" / "only" / f"{i}.png")
    result = probe(simmim[0], tmp_path / "data", methods=("knn",), k=1, seeds=1)
    assert (result["classes"], result["rows"][0]["top1"]) == (1, 1.0)
    x, y = np.eye(30, dtype=np.float32), np.arange(30)
    np.testing.assert_array_equal(knn_probabilities(x, y, x, 30, 1), np.eye(30))
    twice = np.concatenate([x, x])
    probabilities, _ = linear_probabilities(twice, np.concatenate([y, y]), x, 30, 0)
    assert probabilities.argmax(axis=1).tolist() == y.tolist()


def test_top5_of_three_classes_is_left_out_and_chance_is_named(simmim: tuple[Path, vs.SwinV2], data: Path) -> None:
    result = probe(simmim[0], data)
    assert all(row["top5"] is None and row["top5_interval"] is None for row in result["rows"])
    assert result["rows"][0]["chance"] == pytest.approx(1 / 3)
    said = summarize_probe(result)
    assert "top-5" not in said
    assert "by chance 33.33 %; always answering 'blue', the most frequent class, 33.33 %" in said
    assert "only 6 independent sources" in said


def test_intervals_take_samples_of_one_group_together(
    simmim: tuple[Path, vs.SwinV2], data: Path, tmp_path: Path
) -> None:
    """Ten test pictures of five groups, two of each."""
    for split, numbers in (("train", range(5)), ("val", range(5, 10))):
        rows = [f"{data}/{name}/{i:02d}.png,{name},group {i % 5}" for name in NAMES[:2] for i in numbers]
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,label,group", *rows]) + "\n")
    row = probe(simmim[0], tmp_path, methods=("knn",), k=3, seeds=1)["rows"][0]
    assert (row["test"]["scored"], row["sources"]) == (10, 5)
    assert row["two_classes"]["roc_auc"] == 1.0


def test_cached_features_are_reused_only_for_the_same_inputs(
    simmim: tuple[Path, vs.SwinV2], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = features_room._compute_features
    monkeypatch.setattr(features_room, "_compute_features", lambda *a: made.append(1) or make(*a))
    first = probe(simmim[0], data, out=tmp_path, random_weights=True)
    assert len(made) == 3
    assert json.loads((tmp_path / "probe.json").read_text()) == json.loads(json.dumps(first))
    assert probe(simmim[0], data, out=tmp_path, random_weights=True) == first
    assert len(made) == 3
    probe(simmim[0], data, out=tmp_path, overrides=quick(image_size=(32, 32)))
    assert len(made) == 4, "another image size"
    weights = tmp_path / "other.safetensors"
    vs.save_model(
        randomise(vs.create_model("swinv2_nano", num_classes=2, image_size=64, window=4)),
        weights,
        classes=["a", "b"],
        preprocessing=vs.Preprocessing(None, 1, (64, 64)),
    )
    probe(weights, data, out=tmp_path)
    assert len(made) == 5, "other weights"
    probe(simmim[0], colours(tmp_path / "more", PER_CLASS + 1), out=tmp_path)
    assert len(made) == 6, "other data"


def test_a_broken_file_is_named_and_bounds_the_accuracy(
    simmim: tuple[Path, vs.SwinV2], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = colours(tmp_path / "data" / "train", 4).parent
    colours(data / "val", 3, seed=1)
    for split in ("train", "val"):
        (data / split / "red" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    line = ["probe", str(simmim[0]), str(data), "--k", "3", "--seeds", "1", "--method", "knn", "data.workers=0"]
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "probe.json").read_text())
    (row,) = result["rows"]
    assert (row["train"], row["test"]) == (12, {"listed": 10, "scored": 9, "failed": 1})
    right = round(9 * row["top1"])
    assert row["top1_bounds"] == [right / 10, (right + 1) / 10]
    assert [name for name, _ in result["broken"]] == ["train/red/cut.png", "val/red/cut.png"]
    assert "val/red/cut.png" in text
    assert "2 files could not be read; top-1 over all listed lies between" in text
    assert result["split"] == "splits train and val of the data set"


def test_a_tree_without_splits_is_divided_by_the_seed(simmim: tuple[Path, vs.SwinV2], data: Path) -> None:
    source = ProbeData((read_labelled_split(data, "all"),))
    labels = np.repeat(np.arange(3), PER_CLASS)
    divisions = [source.divide(labels, seed) for seed in (0, 0, 1)]
    for division in divisions:
        assert sorted([*division.train, *division.test]) == list(range(3 * PER_CLASS))
        assert Counter(labels[division.test]) == {0: 2, 1: 2, 2: 2}
    first, same, other = (division.test.tolist() for division in divisions)
    assert first == same != other
    asked = probe(simmim[0], data, train_split="train", test_split="val", seeds=1, methods=("knn",))
    assert asked["rows"][0]["test"]["listed"] == 3, "the one image in twenty that training holds out, requested by name"


def grouped_list(path: Path, data: Path, *groups: str) -> Path:
    """A list of the first pictures of two classes, as many of each as there are `groups`, and their groups."""
    rows = [f"{data}/{name}/{i:02d}.png,{name},{group}" for name in NAMES[:2] for i, group in enumerate(groups)]
    path.write_text("\n".join(["path,label,group", *rows]) + "\n")
    return path


def test_a_single_split_is_divided_into_whole_groups(
    simmim: tuple[Path, vs.SwinV2], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten pictures of each of two classes, of five recordings that are in both classes."""
    (tmp_path / "set").mkdir()
    grouped_list(tmp_path / "set" / "train.csv", data, *(f"g{i % 5}" for i in range(PER_CLASS)))
    source = ProbeData((read_labelled_split(tmp_path / "set", "train"),))
    labels, groups = np.repeat([0, 1], PER_CLASS), np.tile(np.arange(5), 2 * PER_CLASS // 5)
    seen = set()
    for seed in range(4):
        division = source.divide(labels, seed)
        assert sorted([*division.train, *division.test]) == list(range(2 * PER_CLASS))
        (group,) = set(groups[division.test])
        assert group not in groups[division.train]
        assert Counter(labels[division.test]) == {0: 2, 1: 2}
        assert source.divide(labels, seed).test.tolist() == division.test.tolist()
        seen.add(group)
    assert len(seen) > 1, "another seed tests on another group"
    result = probe(simmim[0], tmp_path / "set", k=3)
    assert [(row["test"]["scored"], row["sources"]) for row in result["rows"]] == [(4, 1)] * 4
    assert "about 20% of each class of split train held out in whole groups" in result["split"]
    assert result["notes"] == []
    assert "no groups" not in capsys.readouterr().err


def test_a_single_split_of_unknown_groups_says_so(
    simmim: tuple[Path, vs.SwinV2], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = probe(simmim[0], data, methods=("knn",), seeds=1)
    said = "no groups are known: samples of one recording may be both trained and tested on; if there are such, give "
    assert result["notes"][0].startswith(said)
    assert capsys.readouterr().err.startswith(said)
    (tmp_path / "set").mkdir()
    grouped_list(tmp_path / "set" / "train.csv", data, *(f"g{i}" if i < 7 else "" for i in range(PER_CLASS)))
    result = probe(simmim[0], tmp_path / "set", methods=("knn",), seeds=1)
    assert result["notes"][0].startswith("6 of 20 samples have no group, and count as independent; give ")


def test_groups_that_cannot_be_divided_are_refused(simmim: tuple[Path, vs.SwinV2], data: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    grouped_list(tmp_path / "set" / "train.csv", data, *["same"] * PER_CLASS)
    with pytest.raises(UsageError, match="the groups are too few or too large to leave every class in training"):
        probe(simmim[0], tmp_path / "set")


def test_few_groups_make_few_folds(simmim: tuple[Path, vs.SwinV2], data: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    grouped_list(tmp_path / "set" / "train.csv", data, *(f"g{i % 2}" for i in range(PER_CLASS)))
    rows = probe(simmim[0], tmp_path / "set", k=3, seeds=1)["rows"]
    assert [(row["train"], row["test"]["scored"]) for row in rows] == [(10, 10)] * 2


def test_groups_in_both_splits_are_told_once(
    simmim: tuple[Path, vs.SwinV2], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, groups in (("train", "abc"), ("val", "cde"), ("test", "abz")):
        grouped_list(tmp_path / f"{split}.csv", data, *groups)
    for test_split, train_split, shared in (("val", "train", "1 groups"), ("test", "train", "2 groups")):
        result = probe(
            simmim[0], tmp_path, methods=("knn",), k=1, seeds=1, train_split=train_split, test_split=test_split
        )
        (note,) = result["notes"]
        assert note.startswith(f"{shared} are in both {train_split} and {test_split}, such as")
        assert capsys.readouterr().err.startswith(note)
    assert (
        probe(simmim[0], tmp_path, methods=("knn",), k=1, seeds=1, train_split="val", test_split="test")["notes"] == []
    )


def test_regularisation_is_chosen_on_groups_apart() -> None:
    """Features tell recordings apart, not classes: folds that divide recordings favour weak regularisation."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 10)
    y = groups % 2
    x = (
        generator.normal(size=(120, 30)).astype(np.float32)
        + 3 * generator.normal(size=(12, 30)).astype(np.float32)[groups]
    )
    _, divided = linear_probabilities(x, y, x, 2, 0)
    _, whole = linear_probabilities(x, y, x, 2, 0, groups)
    assert whole["C"] < divided["C"]
    _, alone = linear_probabilities(x, y, x, 2, 0, y)
    assert alone == divided, "one recording for each class cannot be divided"


def test_random_weights_are_a_function_of_the_seed(simmim: tuple[Path, vs.SwinV2]) -> None:
    backbone = open_backbone(simmim[0], QUICK)
    kernels = [with_random_weights(backbone, seed).model.patch_embed.proj.weight for seed in (0, 0, 1)]
    assert torch.equal(kernels[0], kernels[1])
    assert not torch.equal(kernels[0], kernels[2])
    assert with_random_weights(backbone, 0).model.architecture() == backbone.model.architecture()


def test_clips_with_a_checkpoint_in_another_layout(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    """Microsoft's layout, inflated on loading, on clips in class folders."""
    for channel, name in enumerate(NAMES):
        for i in range(5):
            frames = np.full((6, 40, 40, 3), 30 + 5 * i, dtype=np.uint8)
            frames[..., channel] = 220
            write_video(tmp_path / "clips" / name / f"{i}.mp4", frames)
    reference = ours()
    torch.save({"model": microsoft_state(reference, window=4)}, tmp_path / "released.pth")
    for sizes in ({"frames": 4, "window": (2, 4, 4)}, {}):  # as clips, then the middle frame of each
        overrides = quick(**sizes)
        result = probe(tmp_path / "released.pth", tmp_path / "clips", overrides=overrides, k=3)
        assert result["preprocessing"]["frames"] == sizes.get("frames")
        assert all(row["top1"] == 1.0 for row in result["rows"])
        assert result["rows"][0]["test"]["listed"] == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 0}, "1 or more"),
        ({"k": 25}, "--k 25: there are only 24 training samples"),
        ({"train_split": "val", "test_split": "val"}, "cannot be both trained on and tested"),
        ({"train_split": "nowhere"}, "no split 'nowhere'"),
    ],
)
def test_invalid_requests_are_refused(
    simmim: tuple[Path, vs.SwinV2], data: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        probe(simmim[0], data, **changes)


def test_classes_that_are_too_small_are_refused(simmim: tuple[Path, vs.SwinV2], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be divided into training and test"):
        probe(simmim[0], colours(tmp_path / "one", 1))
    split = colours(tmp_path / "data" / "train", 1).parent
    colours(split / "val", 1)
    with pytest.raises(UsageError, match="use --method knn"):
        probe(simmim[0], split, k=1)
