"""Search by example: vectors equal the model's, neighbours those of largest cosine, incomparable galleries refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import video_swinv2 as vs
from tests.closeness import assert_close
from video_swinv2.cli import main
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.protocols import PROTOCOLS
from video_swinv2.evaluation.views import read_views
from video_swinv2.inference.retrieval import Gallery, load_gallery, make_gallery, save_gallery, search


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Three red and three blue clips in folders named after them, and one broken file."""
    top = tmp_path_factory.mktemp("gallery")
    for kind, channel in (("red", 0), ("blue", 2)):
        for i in range(3):
            frames = np.random.default_rng(i).integers(0, 60, (8, 48, 64, 3), dtype=np.uint8)
            frames[..., channel] += 150
            write_video(top / kind / f"{i}.mp4", frames)
    (top / "red" / "broken.mp4").write_bytes((top / "red" / "0.mp4").read_bytes()[:200])
    return top


@pytest.fixture(scope="module")
def gallery(folder: Path, evil_model: Path) -> Gallery:
    return make_gallery(evil_model, [folder], device="cpu", workers=0)


def test_vectors_equal_the_models_features(gallery: Gallery, folder: Path, evil_model: Path, tmp_path: Path) -> None:
    assert gallery.labels == ("blue",) * 3 + ("red",) * 4
    assert [bool(reason) for reason in gallery.reasons] == [Path(name).stem == "broken" for name in gallery.names]
    card = vs.read_card(evil_model)
    views, _ = read_views(folder / "red" / "1.mp4", PROTOCOLS["center-1x1"], card.preprocessing)
    model = vs.load_model(evil_model)
    model.reset_classifier(0)
    with torch.no_grad():
        expected = model(normalise(views, card.preprocessing.mean, card.preprocessing.std))[0]
    place = gallery.names.index(str(folder / "red" / "1.mp4"))
    assert_close(gallery.vectors[place], expected)
    save_gallery(gallery, tmp_path / "g.npz")
    again = load_gallery(tmp_path / "g.npz")
    assert (again.names, again.labels, again.reasons, again.record) == (
        gallery.names, gallery.labels, gallery.reasons, gallery.record
    )  # fmt: skip
    np.testing.assert_array_equal(again.vectors, gallery.vectors)


def test_neighbours_have_the_largest_cosine(gallery: Gallery) -> None:
    found = search(gallery, gallery, 4)
    vectors = gallery.vectors.astype(np.float64)
    for i, one in enumerate(found):
        if gallery.reasons[i]:
            assert one.error
            assert not one.neighbours
            continue
        cosines = {
            name: float(v @ vectors[i] / np.linalg.norm(v) / np.linalg.norm(vectors[i]))
            for name, v, reason in zip(gallery.names, vectors, gallery.reasons, strict=True)
            if not reason
        }
        assert one.neighbours[0].path == gallery.names[i]
        similarities = [near.similarity for near in one.neighbours]
        assert similarities == pytest.approx(sorted(cosines.values(), reverse=True)[:4], abs=1e-5)
        assert [cosines[near.path] for near in one.neighbours] == pytest.approx(similarities, abs=1e-5)
        votes = {label: 0.0 for label in ("red", "blue")}
        for near in one.neighbours:
            votes[near.label] += np.exp(near.similarity / 0.07)
        shares = {answer.name: answer.probability for answer in one.answers}
        assert shares == pytest.approx({k: v / sum(votes.values()) for k, v in votes.items() if v}, rel=1e-4)
        assert one.answers[0].name == gallery.labels[i], "its own colour is nearest"


def test_from_the_command_line(
    gallery: Gallery, folder: Path, evil_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_gallery(gallery, tmp_path / "g.npz")
    query = folder / "blue" / "2.mp4"
    arguments = [
        "predict",
        str(evil_model),
        str(query),
        str(tmp_path / "gone.mp4"),
        "--gallery",
        str(tmp_path / "g.npz"),
    ]
    assert main([*arguments, "--k", "2", "--json", "--features", str(tmp_path / "q.npz")]) == 1
    printed = capsys.readouterr()
    first, gone = json.loads(printed.out)
    assert first["neighbours"][0] == {"path": str(query), "label": "blue", "likeness": pytest.approx(1.0, abs=1e-5)}
    assert len(first["neighbours"]) == 2
    assert gone["error"] == "no such file"
    assert "1 of 2 files" in printed.err
    assert load_gallery(tmp_path / "q.npz").names == (str(query), str(tmp_path / "gone.mp4"))


def test_what_is_refused(gallery: Gallery, folder: Path, evil_image_model: Path, tmp_path: Path) -> None:
    clip = folder / "red" / "0.mp4"
    with pytest.raises(UsageError, match="another model"):
        search(gallery, make_gallery(evil_image_model, [clip], device="cpu", workers=0), 1)
    with pytest.raises(UsageError, match="--k 0"):
        search(gallery, gallery, 0)
    with pytest.raises(UsageError, match="is a stream"):
        make_gallery(evil_image_model, ["-"], device="cpu")
    with pytest.raises(UserError, match=r"gone\.mp4: no such file"):
        make_gallery(evil_image_model, [tmp_path / "gone.mp4"], device="cpu")
    with pytest.raises(UsageError, match=r"must end in \.npz"):
        save_gallery(gallery, tmp_path / "g.txt")
    with pytest.raises(UserError, match="no such file; make it with"):
        load_gallery(tmp_path / "gone.npz")
    np.savez(tmp_path / "other.npz", names=np.array(["a"]))
    with pytest.raises(UserError, match=r"other\.npz: holds no"):
        load_gallery(tmp_path / "other.npz")
