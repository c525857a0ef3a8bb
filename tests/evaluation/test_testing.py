"""Complete tests on small real files: scores are the model's own, broken videos only move the bounds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import video_swinv2 as vs
from tests.evaluation.small import CLASSES, N_VIDEOS, quick
from tests.report.report_pages import metrics_of
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.manifest import class_list_hash, read_manifest
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation import reading
from video_swinv2.evaluation.overrides import KEYS, TestOverrides, parse_overrides
from video_swinv2.evaluation.parts import ScoredVideos, join_scored_videos
from video_swinv2.evaluation.protocols import PROTOCOLS
from video_swinv2.evaluation.testing import run_test, run_tests, summarize_tests
from video_swinv2.evaluation.views import read_views
from video_swinv2.report.metrics import video_probabilities
from video_swinv2.report.mistakes import Strip, surest_mistakes
from video_swinv2.report.scores import load_scores, read_arrays


def test_scores_are_the_models_own(tested: Path, model_path: Path, data: Path) -> None:
    """Logits equal those of the model called by hand, one view at a time."""
    scores = load_scores(tested / "scores.npz")
    model, card = vs.load_model(model_path), vs.read_card(model_path)
    assert scores.logits.shape == (N_VIDEOS, 12, 3)
    assert scores.classes == CLASSES
    for row, entry in enumerate(read_manifest(data, "test", CLASSES).entries):
        assert scores.paths[row] == entry.name
        assert CLASSES[scores.labels[row]] == entry.name.split("/")[0], "labels index the model's classes"
        pixels, views = read_views(entry.path, PROTOCOLS["videoswin-4x3"], card.preprocessing)
        for view in range(row % 4, 12, 4):  # three views per video; over the videos, all twelve
            alone = normalise(pixels[view : view + 1], card.preprocessing.mean, card.preprocessing.std)
            with torch.no_grad():
                expected = model(alone)[0]
            np.testing.assert_allclose(scores.logits[row, view], expected.numpy(), rtol=2e-3, atol=2e-3)
        assert scores.views[row].tolist() == [[view.start, *view.box] for view in views]
    assert np.ptp(scores.logits.astype(float), axis=0).max() > 0.1, "the model gives all videos the same answer"


def test_the_result_describes_the_test(tested: Path, model_path: Path, data: Path) -> None:
    result = json.loads((tested / "results.json").read_text())
    metrics = metrics_of(load_scores(tested / "scores.npz"))
    assert result["top1"] == metrics.top1
    assert result["top1_interval"] == list(metrics.top1_interval)
    assert result["top1_bounds"] == [metrics.top1, metrics.top1]
    assert result["videos"] == {"listed": N_VIDEOS, "scored": N_VIDEOS, "failed": 0}
    assert [row["name"] for row in result["per_class"]] == list(CLASSES)
    assert (result["protocol"], result["views"], result["frames"], result["frame_stride"]) == (
        "videoswin-4x3",
        12,
        4,
        2,
    )
    assert result["image_size"] == [32, 32]
    assert result["classes_sha256"] == class_list_hash(CLASSES)
    assert result["data_fingerprint"] == read_manifest(data, "test", CLASSES).fingerprint
    assert result["model"]["provenance"] == {"init": "scratch"}
    assert "PyAV" in result["decoder"]
    assert {"top5", "mean_class_accuracy", "frame_order", "versions", "seconds", "seed"} <= result.keys()
    assert result["protocol_numbers"] == {
        "clips": 4,
        "crops": 3,
        "frames": 4,
        "frame_stride": 2,
        "starts": "videoswin",
        "boxes": "videoswin",
        "resize": "1",
        "crop_size": [32, 32],
        "average": "prob",
    }
    assert {"report.html", "results.json", "scores.npz", "strips.npz"} <= {file.name for file in tested.iterdir()}
    assert not (tested / "shards").exists()
    assert f"{100 * result['top1']:.2f}" in summarize_tests({"videoswin-4x3": result}, tested)


def test_film_strips_show_the_most_confident_mistakes(tested: Path) -> None:
    scores = load_scores(tested / "scores.npz")
    strips = read_arrays(tested / "strips.npz", "")
    expected = surest_mistakes(scores, video_probabilities(scores, "prob"))
    assert expected, "without mistakes this test shows nothing"
    assert strips["positions"].tolist() == [mistake.position for mistake in expected]
    assert all(strips[f"jpeg_{row:03d}"].tobytes().startswith(b"\xff\xd8\xff") for row in range(len(expected)))


THREE = "videoswin-4x3,center-1x1,videomae-5x3"


@pytest.mark.parametrize("protocols", ["videoswin-4x3", THREE])
def test_one_open_and_one_pass_for_each_video(
    protocols: str, model_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During the complete test, report and film strips included."""
    opened: list[Path] = []
    frames: Counter[tuple[Path, int]] = Counter()

    class Counting(VideoReader):
        def __init__(self, path: Path, *, time_limit_seconds: float, max_pixels: int) -> None:
            opened.append(path)
            super().__init__(path, time_limit_seconds=time_limit_seconds, max_pixels=max_pixels)

        def _decode(self, *request: Any) -> Iterator[tuple[int, av.VideoFrame]]:
            for index, frame in super()._decode(*request):
                frames[self.path, index] += 1
                yield index, frame

    monkeypatch.setattr(reading, "VideoReader", Counting)
    run_tests(model_path, data, protocols=protocols, split="test", out=tmp_path, overrides=quick())
    assert sorted(opened) == sorted(entry.path for entry in read_manifest(data, "test").entries)
    assert max(times for (_, index), times in frames.items() if index) == 1
    assert max(times for (_, index), times in frames.items() if not index) <= 2, (
        "the first frame is also decoded for its size"
    )


def test_several_protocols_at_once_equal_each_alone(model_path: Path, data: Path, tested: Path, tmp_path: Path) -> None:
    results = run_tests(model_path, data, protocols=THREE, split="test", out=tmp_path, overrides=quick())
    assert list(results) == THREE.split(",")
    for name, result in results.items():
        scores = load_scores(tmp_path / name / "scores.npz")
        assert scores.logits.shape == (N_VIDEOS, PROTOCOLS[name].views, 3)
        assert (scores.metadata["protocol"], result["protocol"]) == (name, name)
        assert scores.metadata["tested_together"] == THREE.split(",")
        assert (tmp_path / name / "report.html").is_file()
    together, alone = load_scores(tmp_path / "videoswin-4x3" / "scores.npz"), load_scores(tested / "scores.npz")
    np.testing.assert_array_equal(together.views, alone.views)
    np.testing.assert_array_equal(together.labels, alone.labels)
    # The batches hold other views, so sums may be rounded differently.
    np.testing.assert_allclose(together.logits.astype(float), alone.logits.astype(float), rtol=2e-3, atol=2e-3)
    text = summarize_tests(results, tmp_path)
    assert all(str(tmp_path / name / "report.html") in text for name in results)


@pytest.mark.parametrize("protocol", ["center-1x1", "videoswin-4x3"])
def test_a_broken_video_moves_only_the_bounds(
    protocol: str, model_path: Path, data: Path, with_broken: Path, tmp_path: Path
) -> None:
    whole = run_test(model_path, data, protocol=protocol, split="test", out=tmp_path / "a", overrides=quick())
    broken = run_test(
        model_path, with_broken, protocol=protocol, split="test", out=tmp_path / "b", overrides=quick(workers=2)
    )
    first, second = load_scores(tmp_path / "a" / "scores.npz"), load_scores(tmp_path / "b" / "scores.npz")
    assert [bool(reason) for reason in second.reasons] == [i in (3, 8) for i in range(9)]
    assert "no such file" in second.reasons[8]
    if protocol == "videoswin-4x3":  # here one video is one batch; in center-1x1 the batches differ
        np.testing.assert_array_equal(first.logits, second.logits[second.scored])
    for key in ("top1", "top5", "mean_class_accuracy", "top1_interval", "per_class"):
        assert whole[key] == broken[key]
    assert broken["videos"] == {"listed": 9, "scored": 7, "failed": 2}
    right = round(whole["top1"] * 7)
    assert broken["top1_bounds"] == [right / 9, (right + 2) / 9]
    page = (tmp_path / "b" / "report.html").read_text()
    assert "cut.mp4" in page
    assert "no such file" in page


def test_overrides_take_effect(model_path: Path, data: Path, tested: Path, tmp_path: Path) -> None:
    overrides = parse_overrides(
        ["data.frames=2", "data.image_size=64", "data.frame_stride=3", "model.window=[1, 8, 8]", "data.workers=0"]
    )
    result = run_test(model_path, data, protocol="center-1x1", split="test", out=tmp_path, overrides=overrides)
    assert (result["frames"], result["frame_stride"], result["image_size"]) == (2, 3, [64, 64])
    assert load_scores(tmp_path / "scores.npz").views[0, 0, 3:].tolist() == [64, 64]
    out = tmp_path / "reversed"
    run_test(model_path, data, protocol="videoswin-4x3", split="test", out=out, overrides=quick(frame_order="reversed"))
    plain, turned = load_scores(tested / "scores.npz"), load_scores(out / "scores.npz")
    assert turned.metadata["frame_order"] == "reversed"
    assert not np.array_equal(plain.logits, turned.logits)
    assert "Frame order: reversed" in (out / "report.html").read_text()


def test_the_result_of_another_test_is_never_replaced(model_path: Path, data: Path, tmp_path: Path) -> None:
    def test(model: Path = model_path, protocol: str = "center-1x1", **settings: object) -> dict[str, object]:
        return run_test(model, data, protocol=protocol, split="test", out=tmp_path, overrides=quick(**settings))

    first = test()
    scores = (tmp_path / "scores.npz").read_bytes()
    other, card = tmp_path / "other.safetensors", vs.read_card(model_path)
    changed = vs.load_model(model_path)
    with torch.no_grad():
        changed.head.bias.add_(1.0)
    vs.save_model(changed, other, classes=card.classes, preprocessing=card.preprocessing, provenance={})
    for arguments, what in (
        ({"protocol": "center-full-1x1"}, "protocol"),
        ({"model": other}, "model"),
        ({"frame_order": "shuffled"}, "settings"),
        ({"frame_stride": 1, "frame_order": "reversed"}, "protocol, settings"),
    ):
        with pytest.raises(UsageError, match=rf"scores\.npz: holds the result of another test, of different {what}; "):
            test(**arguments)  # type: ignore[arg-type]  # the keys are its arguments
    assert (tmp_path / "scores.npz").read_bytes() == scores
    assert test(workers=1)["top1"] == first["top1"], "the same test is run again"
    # Several protocols have folders of their own, and do not touch the result beside them.
    run_tests(model_path, data, protocols="center-1x1,center-full-1x1", split="test", out=tmp_path, overrides=quick())
    with pytest.raises(UsageError, match=r"center-full-1x1.scores\.npz: holds the result of another test"):
        run_tests(other, data, protocols="center-full-1x1,videoswin-4x3", split="test", out=tmp_path, overrides=quick())
    (tmp_path / "scores.npz").write_bytes(b"a file of somebody else")
    with pytest.raises(UsageError, match=r"scores\.npz: is in the way and cannot be read"):
        test()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("data.frame_strid=2", r"unknown key data.frame_strid; did you mean data.frame_stride\?$"),
        ("optim.lr=1", r"unknown key optim.lr; known are data.frames, .*, seed$"),
        ("data.frames=0", "data.frames: invalid value 0: .*greater than or equal to 1"),
        ("data.frame_order=random", "data.frame_order: invalid value 'random': .*'in-order', 'shuffled' or 'reversed'"),
        ("data.image_size=[1,2,3]", r"data.image_size: invalid value \[1, 2, 3\]: "),
        ("data.frames", "key.sub=value"),
    ],
)
def test_invalid_overrides_are_refused(text: str, fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        parse_overrides([text])


def test_every_default_of_a_test_can_be_given():
    for key, name in KEYS.items():
        default = getattr(TestOverrides(), name)
        assert parse_overrides([f"{key}={json.dumps(default)}"]) == TestOverrides(), key


def test_wrong_usage_is_refused_before_any_work(model_path: Path, data: Path, tmp_path: Path) -> None:
    def test(**changes: object) -> None:
        arguments = {"protocol": "center-1x1", "split": "test", "out": tmp_path / "out", "overrides": quick()}
        run_test(model_path, changes.pop("data", data), **(arguments | changes))  # type: ignore[arg-type]  # as above

    with pytest.raises(UsageError, match="center-1x2"):
        test(protocol="center-1x2")
    with pytest.raises(UsageError, match="no split 'val'"):
        test(split="val")
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "test.txt").write_text(f"{data}/x.mp4 0\n")
    (lists / "classes.txt").write_text("rigth\n")
    with pytest.raises(
        UsageError, match=r"'rigth' is not one of the 3 classes; the nearest is 'right'; rename or add it"
    ):
        test(data=lists)
    (lists / "classes.txt").write_text("playing chess\n")
    other_classes = (
        r"'playing chess' is not one of the 3 classes; add it, or use data of these classes \(such as 'left'\)$"
    )
    with pytest.raises(UsageError, match=other_classes):
        test(data=lists)
    (lists / "classes.txt").write_text("right\n")
    (lists / "test.txt").write_text(f"{data}/x.mp4 0\n{data}/y.mp4 -1\n")
    with pytest.raises(UsageError, match=r"1 of 2 videos .*have no label.*y\.mp4.*predict"):
        test(data=lists)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot create the folder"):
        test()


def test_it_fails_if_no_video_can_be_scored(model_path: Path, data: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "test.txt").write_text("a.mp4 0\nb.mp4 1\n")
    (lists / "classes.txt").write_text("left\nright\n")
    with pytest.raises(UserError, match=r"none of the 2 listed videos .*a\.mp4: no such file"):
        run_test(model_path, lists, protocol="center-1x1", split="test", out=tmp_path / "out", overrides=quick())
    # What scored nothing does not stand in the way once the list is corrected.
    (lists / "test.txt").write_text(f"{data}/{read_manifest(data, 'test').entries[1].name} 0\n")
    run_test(model_path, lists, protocol="center-1x1", split="test", out=tmp_path / "out", overrides=quick())


def test_non_finite_scores_name_the_video(data: Path, model_path: Path, tmp_path: Path) -> None:
    model = vs.load_model(model_path)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    card = vs.read_card(model_path)
    path = tmp_path / "nan.safetensors"
    vs.save_model(model, path, classes=card.classes, preprocessing=card.preprocessing, provenance={})
    with pytest.raises(UserError, match=r"clip.* 0\.mp4: the model's scores are not finite"):
        run_test(path, data, protocol="center-1x1", split="test", out=tmp_path / "out", overrides=quick())


@pytest.mark.parametrize(("views", "batch"), [(1, 12), (12, 12), (12, 32), (15, 12), (17, 32), (28, 12), (30, 64)])
def test_batches_are_full_for_any_number_of_views(views: int, batch: int) -> None:
    group = reading.videos_per_group(views, batch) * views
    assert group >= 0.9 * batch * -(-group // batch)
    assert group <= 10 * batch + views


def test_parts_must_contain_each_video_exactly_once() -> None:
    def part(*videos: int, views: int = 2) -> ScoredVideos:
        n = len(videos)
        return ScoredVideos(
            videos=np.array(videos),
            logits=np.full((n, views, 2), videos[0], np.float16),
            views=np.zeros((n, views, 5), np.int32),
            stand_ins=np.zeros(n, np.int32),
            reasons=np.array([f"r{video}" for video in videos]),
            seconds=np.array([1.0, 0.5]),
            strip_places=np.array([[videos[0], 1]]),
            strip_bytes=np.array([[1, len(videos) - 1]]),
            strips=np.full(len(videos), videos[0], np.uint8),
        )

    merged = join_scored_videos([part(0, 3), part(1, 2)], 4)
    assert merged.videos.tolist() == [0, 1, 2, 3]
    assert merged.reasons.tolist() == ["r0", "r1", "r2", "r3"]
    assert merged.logits[:, 0, 0].tolist() == [0, 1, 1, 0]
    assert merged.seconds.tolist() == [2.0, 1.0]
    assert merged.strips_by_view() == {(0, 1): Strip(b"\0", b"\0"), (1, 1): Strip(b"\1", b"\1")}
    with pytest.raises(UserError, match="1 were not scored and 0 were scored more than once"):
        join_scored_videos([part(0, 3), part(1)], 4)
    with pytest.raises(UserError, match="0 were not scored and 1 were scored more than once"):
        join_scored_videos([part(0, 3), part(1, 2, 3)], 4)
    with pytest.raises(UserError, match="of 3 videos"):
        join_scored_videos([part(0, 3), part(1, 2)], 3)
    with pytest.raises(UserError, match="different numbers of views"):
        join_scored_videos([part(0, 3), part(1, 2, views=3)], 4)
