"""Comparison of tests: pairs on shared videos, classes matched by name, differing settings, refused combinations."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report import independent
from tests.report.report_pages import ATTACK, RECORD, build_scores
from video_swinv2.cli import main
from video_swinv2.errors import UsageError, UserError
from video_swinv2.report.compare import compare, score_folders
from video_swinv2.report.scores import Scores, load_scores, save_scores

CLASSES = ("a", ATTACK, "c", "d|e")


def make(
    folder: Path,
    skill: float,
    seed: int,
    names: Sequence[str] | None = None,
    failed: Sequence[int] = (),
    **record: Any,
) -> Scores:
    """A folder with the scores of 60 videos, whose labels do not depend on the seed."""
    labels = np.random.default_rng(99).integers(0, 4, 60)
    logits = np.random.default_rng(seed).normal(size=(60, 3, 4))
    logits[np.arange(60), :, labels] += skill
    scores = build_scores(labels, logits, paths=names, classes=CLASSES, failed=failed, **RECORD | record)
    folder.mkdir(parents=True, exist_ok=True)
    save_scores(scores, folder / "scores.npz")
    return scores


def right(scores: Scores) -> np.ndarray:
    return independent.chances(scores.logits, "prob").argmax(axis=1) == scores.labels


def test_pairs_are_compared_video_by_video(tmp_path: Path) -> None:
    hits = [
        right(make(tmp_path / name, skill, i)) for i, (name, skill) in enumerate([("x", 0.5), ("y", 1.0), ("z", 3)])
    ]
    result = compare([tmp_path / name for name in "xyz"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == result
    assert [(pair["first"], pair["second"]) for pair in result["pairs"]] == [("A", "B"), ("A", "C"), ("B", "C")]
    p_values = []
    for pair, (i, j) in zip(result["pairs"], [(0, 1), (0, 2), (1, 2)], strict=True):
        paired = pair["paired"]
        only = int((hits[i] & ~hits[j]).sum()), int((hits[j] & ~hits[i]).sum())
        assert (paired["only_first"], paired["only_second"], paired["n"]) == (*only, 60)
        assert paired["difference"] == pytest.approx(hits[j].mean() - hits[i].mean())
        assert paired["p_value"] == pytest.approx(independent.mcnemar(*only))
        p_values.append(paired["p_value"])
    assert max(pair["p_holm"] / pair["paired"]["p_value"] for pair in result["pairs"]) == pytest.approx(3, rel=1)
    assert min(pair["p_holm"] for pair in result["pairs"]) == pytest.approx(3 * min(p_values))
    assert [test["top1"] for test in result["tests"]] == pytest.approx([hit.mean() for hit in hits])
    page = (tmp_path / "out" / "comparison.html").read_text()
    text = re.sub(r"<[^>]*>", " ", page)
    for pair in result["pairs"]:
        assert f"{100 * pair['paired']['difference']:+.1f}" in text
    assert page.count("abababababab") >= 6, "each accuracy with its data fingerprint"
    assert ATTACK not in page
    assert "script-src" not in page
    assert "<script" not in page
    said = (tmp_path / "out" / "comparison.md").read_text()
    assert said.count("videoswin-4x3") == 3


def test_the_verdict_and_the_videos_that_only_one_got_right(tmp_path: Path) -> None:
    """Of a pair far apart and a pair that chance explains, on the page, in the text and in the JSON."""
    scores = [make(tmp_path / name, skill, i) for i, (name, skill) in enumerate([("x", 0.3), ("y", 0.4), ("z", 4)])]
    hits = [right(one) for one in scores]
    result = compare([tmp_path / name for name in "xyz"], tmp_path / "out")
    near, far, _ = result["pairs"]
    assert far["verdict"].startswith("C is better than A: +")
    counts = f"{(hits[2] & ~hits[0]).sum()} are right in C only and {(hits[0] & ~hits[2]).sum()} in A only"
    assert far["verdict"].endswith(f"of 60 videos, {counts}")
    assert re.match(r"([AB]) is ahead of ([AB]), but not by more than chance explains: \+", near["verdict"])
    assert [one["path"] for one in far["only_second"]] == [f"{i}.mp4" for i in np.flatnonzero(hits[2] & ~hits[0])]
    answers = independent.chances(scores[0].logits, "prob").argmax(axis=1)
    for one in far["only_second"]:
        row = int(one["path"].removesuffix(".mp4"))
        assert (one["label"], one["wrong_answer"]) == (CLASSES[scores[0].labels[row]], CLASSES[answers[row]])
    assert len(far["only_first"]) == far["paired"]["only_first"]
    page = unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", (tmp_path / "out" / "comparison.html").read_text())))
    for pair in result["pairs"]:
        assert pair["verdict"] + "." in page
        assert f"{len(pair['only_second'])} that only {pair['second']} got right, not {pair['first']}" in page
    said = (tmp_path / "out" / "comparison.md").read_text()
    assert f"* {far['verdict']}" in said.replace("\\", "")


def test_the_axis_of_top1_holds_what_is_drawn_and_little_more(tmp_path: Path) -> None:
    """Two tests near 100 % are not squeezed into the end of a scale from 0: it begins at chance, a quarter."""
    for i, name in enumerate("xy"):
        make(tmp_path / name, 4, i)
    compare([tmp_path / name for name in "xy"], tmp_path / "out")
    page = (tmp_path / "out" / "comparison.html").read_text()
    axis = re.findall(
        r"<span style=\"left:[\d.]+%\">([\d.]+) %</span>", page[page.index('class="axis"') :].split("</div>")[0]
    )
    assert (axis[0], axis[-1]) == ("20", "100")
    assert 'class="chance" style="left:6.25%"' in page


def test_classes_in_another_order_are_the_same_classes(tmp_path: Path) -> None:
    scores = make(tmp_path / "x", 1.5, 0)
    order = [2, 0, 3, 1]
    turned = replace(
        scores,
        classes=tuple(CLASSES[i] for i in order),
        labels=np.argsort(order)[scores.labels],
        logits=scores.logits[:, :, order],
    )
    (tmp_path / "y").mkdir()
    save_scores(turned, tmp_path / "y" / "scores.npz")
    result = compare([tmp_path / "x", tmp_path / "y"], tmp_path / "out")
    assert (result["pairs"][0]["paired"]["only_first"], result["pairs"][0]["paired"]["only_second"]) == (0, 0)
    assert all(row["apart"] == 0 for row in result["classes"])
    other = replace(scores, classes=("a", "b", "c", "d"))
    save_scores(other, tmp_path / "y" / "scores.npz")
    other_classes = r"y/scores\.npz: a test of other classes than the first: 'b' is not among its 4 classes; compare"
    with pytest.raises(UserError, match=other_classes):  # no class is near enough to be offered
        compare([tmp_path / "x", tmp_path / "y"], tmp_path / "out")
    save_scores(replace(scores, classes=("a", ATTACK + "s", "c", "d|e")), tmp_path / "y" / "scores.npz")
    with pytest.raises(
        UserError, match=r"scripts?>s' is not among its 4 classes \(the nearest is .*script>'\); compare"
    ):
        compare([tmp_path / "x", tmp_path / "y"], tmp_path / "out")


def test_only_shared_videos_count(tmp_path: Path) -> None:
    x = make(tmp_path / "x", 1, 0)
    names = [*(f"{i}.mp4" for i in range(40)), *(f"other {i}.mp4" for i in range(20))]
    y = make(tmp_path / "y", 1, 1, names, range(5), data_fingerprint="cd" * 32, protocol="center-1x1")
    result = compare([tmp_path / "x", tmp_path / "y"], tmp_path / "out")
    paired = result["pairs"][0]["paired"]
    assert paired["n"] == 35
    assert paired["difference"] == pytest.approx(right(y)[5:40].mean() - right(x)[5:40].mean())
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "The tests use different data" in page
    assert "The protocols differ too" in page
    assert result["different"]["protocol"] == ["videoswin-4x3", "center-1x1"]
    assert "seed" not in result["different"]


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path: Path) -> None:
    x = make(tmp_path / "x", 1, 0)
    make(tmp_path / "y", 1, 1, [f"other {i}.mp4" for i in range(60)])
    other_data = (
        r"x and .*y: tests of different data, .* folder \(test, abababababab\) and .*: no video was scored in both"
    )
    with pytest.raises(UsageError, match=other_data):
        compare([tmp_path / "x", tmp_path / "y"], tmp_path)
    save_scores(replace(x, labels=(x.labels + 1) % 4), tmp_path / "y" / "scores.npz")
    with pytest.raises(UsageError, match=r"0\.mp4: is .* in .*x and .* in .*y"):
        compare([tmp_path / "x", tmp_path / "y"], tmp_path)
    with pytest.raises(UsageError, match="given twice"):
        compare([tmp_path / "x", tmp_path / "x"], tmp_path)
    with pytest.raises(UserError, match=r"nothing/scores\.npz: no such file"):
        score_folders(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the folder"):
        compare([tmp_path / "x", make_second(tmp_path)], tmp_path / "file" / "out")


def make_second(tmp_path: Path) -> Path:
    make(tmp_path / "second", 2, 5)
    return tmp_path / "second"


def test_the_verb_reports_one_test_and_compares_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "x", 1, 0)
    make(tmp_path / "y" / "center-1x1", 1, 1, protocol="center-1x1")
    make(tmp_path / "y" / "videoswin-4x3", 2, 1)
    assert main(["report", str(tmp_path / "x")]) == 0
    assert re.search(r"x/report\.html: top-1 \d+\.\d\d % \(95 % interval .*60 videos, videoswin-4x3, data ababababab", capsys.readouterr().out)  # fmt: skip  # noqa: E501 - one line is what is looked for
    assert (tmp_path / "x" / "results.json").is_file()
    assert main(["report", str(tmp_path / "y"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"center-1x1", "videoswin-4x3", "comparison"}
    assert (tmp_path / "y" / "comparison.html").is_file()
    assert (tmp_path / "y" / "center-1x1" / "report.html").is_file()
    assert main(["report", str(tmp_path / "x"), str(tmp_path / "y"), "--out", str(tmp_path / "all")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines[:3]] == ["A", "B", "C"]
    assert lines[-1] == str(tmp_path / "all" / "comparison.html")
    assert main(["report", str(tmp_path / "x"), str(tmp_path / "y"), "--run", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path / "x"), "--run", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "omit it" in error
    assert "no readable run.json and metrics.jsonl" in error
    assert load_scores(tmp_path / "x" / "scores.npz").classes == CLASSES
