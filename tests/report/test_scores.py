"""Score files: what is written is read back, and an incomplete file is refused with its fault named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from video_swinv2.errors import UserError
from video_swinv2.report.scores import Scores, load_scores, reorder_classes, save_scores


def make_scores(n: int = 6, views: int = 2, classes: int = 3, failed: tuple[int, ...] = (4,)) -> Scores:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(n, views, classes)).astype(np.float16)
    places = rng.integers(0, 9, size=(n, views, 5)).astype(np.int32)
    logits[list(failed)], places[list(failed)] = np.nan, -1
    return Scores(
        paths=tuple(f"a b/'{i}'.mp4" for i in range(n)),
        labels=rng.integers(0, classes, n),
        logits=logits,
        views=places,
        reasons=tuple("moov atom not found" if i in failed else "" for i in range(n)),
        classes=tuple(f"class {i} é" for i in range(classes)),
        metadata={"protocol": {"name": "center-1x1"}, "seed": 0},
    )


def test_round_trip(tmp_path: Path) -> None:
    scores = make_scores()
    save_scores(scores, tmp_path / "scores.npz")
    again = load_scores(tmp_path / "scores.npz")
    assert (again.paths, again.reasons, again.classes) == (scores.paths, scores.reasons, scores.classes)
    assert again.metadata == scores.metadata
    np.testing.assert_array_equal(again.labels, scores.labels)
    np.testing.assert_array_equal(again.logits.view(np.uint16), scores.logits.view(np.uint16))
    np.testing.assert_array_equal(again.views, scores.views)
    assert again.scored.tolist() == [True, True, True, True, False, True]
    assert [file.name for file in tmp_path.iterdir()] == ["scores.npz"]


def _changed(**changes: Any) -> Scores:
    return dataclasses.replace(make_scores(), **changes)


def _logits(row: int, view: int, value: float) -> np.ndarray:
    logits = make_scores().logits.copy()
    logits[row, view] = value
    return logits


def _views_without(row: int) -> np.ndarray:
    views = make_scores().views.copy()
    views[row, 1] = -1
    return views


@pytest.mark.parametrize(
    ("scores", "fault"),
    [
        (_changed(logits=_logits(2, 1, np.nan)), r"'2'\.mp4 has no finite logits for view 1"),
        (_changed(logits=_logits(0, 0, np.inf)), r"'0'\.mp4 has no finite logits for view 0"),
        (_changed(logits=_logits(4, 0, 0.0)), r"'4'\.mp4 failed but has scores"),
        (_changed(views=_views_without(3)), r"'3'\.mp4 has no recorded place for view 1"),
        (_changed(paths=("a", "b", "c", "d", "e", "a")), "a is scored more than once"),
        (_changed(labels=np.array([0, 1, 2, 0, 1, 3])), "labels range from 0 to 3, but there are 3 classes"),
        (_changed(labels=np.array([0, 1, 2, 0, 1, -1])), "labels range from -1"),
        (_changed(labels=np.array([0, 1])), "2 labels and 6 reasons for 6 videos"),
        (_changed(logits=make_scores().logits.astype(np.float32)), "float32"),
        (_changed(logits=make_scores(n=5).logits), r"\(5, 2, 3\)"),
        (_changed(views=make_scores(views=1).views), r"views are \(6, 1, 5\)"),
    ],
)
def test_incomplete_scores_are_refused(scores: Scores, fault: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=fault):
        save_scores(scores, tmp_path / "scores.npz")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    with pytest.raises(UserError, match=r"no such file.*video-swinv2 test"):
        load_scores(path)
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match="damaged"):
        load_scores(path)
    np.savez(path, a=np.zeros(2))
    with pytest.raises(UserError, match="holds no paths"):
        load_scores(path)
    save_scores(make_scores(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_scores(path)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    save_scores(make_scores(), tmp_path / "scores.npz")
    with np.load(tmp_path / "scores.npz") as archive:
        arrays = dict(archive)
    arrays["reasons"] = np.array([{}] * 6, dtype=object)
    np.savez(tmp_path / "scores.npz", **arrays)
    with pytest.raises(UserError, match="damaged"):
        load_scores(tmp_path / "scores.npz")


def test_status_and_reasons_must_agree(tmp_path: Path) -> None:
    save_scores(make_scores(), tmp_path / "scores.npz")
    with np.load(tmp_path / "scores.npz") as archive:
        arrays = dict(archive)
    assert json.loads(str(arrays["metadata"]))["seed"] == 0
    arrays["status"][0] = "failed"
    np.savez(tmp_path / "scores.npz", **arrays)
    with pytest.raises(UserError, match="contradict"):
        load_scores(tmp_path / "scores.npz")


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*cannot be written"):
        save_scores(make_scores(), tmp_path / "nowhere" / "scores.npz")


def test_another_class_order_is_matched_by_name_or_refused() -> None:
    scores = make_scores()
    order = ("class 2 é", "class 0 é", "class 1 é")
    turned = reorder_classes(scores, order, "b")
    assert turned.classes == order
    for row in range(6):
        assert order[turned.labels[row]] == scores.classes[scores.labels[row]]
        for column, name in enumerate(order):
            old = scores.logits[row, :, scores.classes.index(name)]
            np.testing.assert_array_equal(turned.logits[row, :, column], old)
    assert reorder_classes(turned, scores.classes, "b").labels.tolist() == scores.labels.tolist()
    assert reorder_classes(scores, scores.classes, "b") is scores
    with pytest.raises(
        UserError,
        match=r"b: a test of other classes .* 'class 2 é' is not among its 3 classes \(the nearest is 'klass 2 é'",
    ):
        reorder_classes(scores, ("class 0 é", "class 1 é", "klass 2 é"), "b")
    with pytest.raises(UserError, match=r"b: a test of other classes .*: it lacks 'more'"):
        reorder_classes(scores, (*scores.classes, "more"), "b")
