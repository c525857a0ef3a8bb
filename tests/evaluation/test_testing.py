"""Whole tests on small real files: the same scores on any number of processes; broken videos only move the bounds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import video_swinv2 as vs
from tests.evaluation.report_pages import metrics_of
from video_swinv2 import files
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.manifest import class_list_hash, read_manifest
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation import reading, shards, testing
from video_swinv2.evaluation.metrics import video_probabilities
from video_swinv2.evaluation.mistakes import surest_mistakes
from video_swinv2.evaluation.overrides import TestOverrides, parse_overrides
from video_swinv2.evaluation.protocols import PROTOCOLS
from video_swinv2.evaluation.scores import load_scores, read_arrays
from video_swinv2.evaluation.shards import Share, join_shares
from video_swinv2.evaluation.testing import run_test, run_tests, summary
from video_swinv2.evaluation.views import read_views

CLASSES = ("left", "right", "up")
MOTION = {"left": (0, -2), "right": (0, 2), "up": (-2, 0)}
N_VIDEOS = 7


def shift(n: int, step: tuple[int, int], seed: int) -> np.ndarray:
    """Frames (n, 40, 56, 3) of noise that moves by `step` each frame."""
    picture = np.random.default_rng(seed).integers(0, 256, (10, 14, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    return np.stack([np.roll(picture, (i * step[0], i * step[1]), axis=(0, 1)) for i in range(n)])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model = vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=32, window=(2, 4, 4))
    with torch.no_grad():  # fresh weights answer everything alike
        for name, parameter in model.named_parameters():
            if name.endswith(("norm1.weight", "norm2.weight")):
                parameter.fill_(1.0)
        model.head.weight.mul_(40)
    preprocessing = vs.Preprocessing(frames=4, frame_stride=2, image_size=(32, 32))
    vs.save_model(model, path, classes=CLASSES, preprocessing=preprocessing, provenance={"init": "scratch"})
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """A list data set whose class order is not the model's, with names that are hard on shells and pages."""
    root = tmp_path_factory.mktemp("data")
    own = ("up", "left", "right")
    lines = []
    for i in range(N_VIDEOS):
        name = own[i % 3]
        path = f'{name}/it\'s a "clip" {i}.mp4'
        write_video(root / path, shift(6 + 5 * i, MOTION[name], i))
        lines.append(f"{path} {i % 3}")
    (root / "test.txt").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("\n".join(own) + "\n")
    return root


@pytest.fixture(scope="module")
def with_broken(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The same list with two broken files, one of them in the midst of others' batches."""
    root = tmp_path_factory.mktemp("broken")
    lines = (data / "test.txt").read_text().splitlines()
    absolute = [f"{data}/{line}" for line in lines]
    (root / "cut.mp4").write_bytes((data / lines[0].rsplit(" ", 1)[0]).read_bytes()[:200])
    absolute[3:3] = [f"{root}/cut.mp4 1"]
    (root / "test.txt").write_text("\n".join([*absolute, "gone.mp4 2"]) + "\n")
    (root / "classes.txt").write_text((data / "classes.txt").read_text())
    return root


def quick(**changes: object) -> TestOverrides:
    return TestOverrides(**{"workers": 0, "device": "cpu", **changes})  # type: ignore[arg-type]  # keys are the fields


@pytest.fixture(scope="module")
def tested(model_path: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    run_test(model_path, data, protocol="videoswin-4x3", split="test", out=out, overrides=quick())
    return out


def test_scores_are_the_models_own(tested: Path, model_path: Path, data: Path) -> None:
    """Each logit against one view at a time through the model, outside of the machinery."""
    scores = load_scores(tested / "scores.npz")
    model, card = vs.load_model(model_path), vs.read_card(model_path)
    assert scores.logits.shape == (N_VIDEOS, 12, 3)
    assert scores.classes == CLASSES
    for row, entry in enumerate(read_manifest(data, "test", CLASSES).entries):
        assert scores.paths[row] == entry.name
        assert CLASSES[scores.labels[row]] == entry.name.split("/")[0], "labels follow the model's order"
        pixels, views = read_views(entry.path, PROTOCOLS["videoswin-4x3"], card.preprocessing)
        with torch.no_grad():
            expected = torch.cat(
                [
                    model(normalise(pixels[i : i + 1], card.preprocessing.mean, card.preprocessing.std))
                    for i in range(12)
                ]
            )
        np.testing.assert_allclose(scores.logits[row], expected.numpy(), rtol=2e-3, atol=2e-3)
        assert scores.views[row].tolist() == [[view.start, *view.box] for view in views]
    assert np.ptp(scores.logits.astype(float), axis=0).max() > 0.1, "the model answers everything alike"


def test_result_holds_what_it_promises(tested: Path, model_path: Path, data: Path) -> None:
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
    assert f"{100 * result['top1']:.2f}" in summary({"videoswin-4x3": result}, tested)


def test_strips_are_of_the_surest_mistakes(tested: Path) -> None:
    scores = load_scores(tested / "scores.npz")
    strips = read_arrays(tested / "strips.npz", "")
    expected = surest_mistakes(scores, video_probabilities(scores, "prob"))
    assert expected, "the model makes mistakes"
    assert strips["positions"].tolist() == [mistake.position for mistake in expected]
    assert all(strips[f"jpeg_{row:03d}"].tobytes().startswith(b"\xff\xd8\xff") for row in range(len(expected)))


THREE = "videoswin-4x3,center-1x1,videomae-5x3"


@pytest.mark.parametrize("protocols", ["videoswin-4x3", THREE])
def test_one_open_and_one_pass_for_each_video(
    protocols: str, model_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the whole test, its report and film strips included."""
    opened: list[Path] = []
    frames: Counter[tuple[Path, int]] = Counter()

    class Counting(VideoReader):
        def __init__(self, path: Path, *, time_limit_seconds: float) -> None:
            opened.append(path)
            super().__init__(path, time_limit_seconds=time_limit_seconds)

        def _decode(self, start: int) -> Iterator[tuple[int, av.VideoFrame]]:
            for index, frame in super()._decode(start):
                frames[self.path, index] += 1
                yield index, frame

    monkeypatch.setattr(reading, "VideoReader", Counting)
    run_tests(model_path, data, protocols=protocols, split="test", out=tmp_path, overrides=quick())
    assert sorted(opened) == sorted(entry.path for entry in read_manifest(data, "test").entries)
    assert max(times for (_, index), times in frames.items() if index) == 1
    assert max(times for (_, index), times in frames.items() if not index) <= 2, "the first frame tells the size"


def test_several_protocols_at_once_are_what_each_is_alone(
    model_path: Path, data: Path, tested: Path, tmp_path: Path
) -> None:
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
    # Other views are in the model's batch, which may round other bits.
    np.testing.assert_allclose(together.logits.astype(float), alone.logits.astype(float), rtol=2e-3, atol=2e-3)
    told = summary(results, tmp_path)
    assert all(str(tmp_path / name / "report.html") in told for name in results)


@pytest.mark.parametrize("protocol", ["center-1x1", "videoswin-4x3"])
def test_a_broken_video_moves_the_bounds_and_nothing_else(
    protocol: str, model_path: Path, data: Path, with_broken: Path, tmp_path: Path
) -> None:
    whole = run_test(model_path, data, protocol=protocol, split="test", out=tmp_path / "a", overrides=quick())
    broken = run_test(
        model_path, with_broken, protocol=protocol, split="test", out=tmp_path / "b", overrides=quick(workers=2)
    )
    first, second = load_scores(tmp_path / "a" / "scores.npz"), load_scores(tmp_path / "b" / "scores.npz")
    assert [bool(reason) for reason in second.reasons] == [i in (3, 8) for i in range(9)]
    assert "no such file" in second.reasons[8]
    if protocol == "videoswin-4x3":  # one video is one batch; in center-1x1 the batch itself is another one
        np.testing.assert_array_equal(first.logits, second.logits[second.scored])
    for key in ("top1", "top5", "mean_class_accuracy", "top1_interval", "per_class"):
        assert whole[key] == broken[key]
    assert broken["videos"] == {"listed": 9, "scored": 7, "failed": 2}
    right = round(whole["top1"] * 7)
    assert broken["top1_bounds"] == [right / 9, (right + 2) / 9]
    page = (tmp_path / "b" / "report.html").read_text()
    assert "cut.mp4" in page
    assert "no such file" in page


SCRIPT = """
import sys
from pathlib import Path
from video_swinv2.evaluation.overrides import TestOverrides
from video_swinv2.evaluation.testing import run_test
from video_swinv2.training.runtime import start, stop
model, data, out = sys.argv[1:]
start("cpu")  # one rendezvous for both tests
for protocol, batch in (("center-1x1", 2), ("videoswin-4x3", 12)):
    result = run_test(model, data, protocol=protocol, split="test", out=Path(out) / protocol,
                      overrides=TestOverrides(workers=1, device="cpu", batch_views=batch))
    print("processes", result["processes"])
stop()
"""


def test_two_processes_give_the_scores_of_one_to_the_bit(model_path: Path, with_broken: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(vs.__file__).parents[1])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    both = subprocess.Popen([*launcher, script, model_path, with_broken, tmp_path / "2"], env=environment)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does; how sums are split is up to the number of threads
    for protocol, batch in (("center-1x1", 2), ("videoswin-4x3", 12)):
        out = tmp_path / "1" / protocol
        run_test(model_path, with_broken, protocol=protocol, split="test", out=out, overrides=quick(batch_views=batch))
    torch.set_num_threads(threads)
    assert both.wait(timeout=600) == 0
    for protocol in ("center-1x1", "videoswin-4x3"):
        one, two = (load_scores(tmp_path / n / protocol / "scores.npz") for n in ("1", "2"))
        assert (one.metadata["processes"], two.metadata["processes"]) == (1, 2)
        assert one.paths == two.paths
        assert one.reasons == two.reasons
        np.testing.assert_array_equal(one.logits.view(np.uint16), two.logits.view(np.uint16))
        np.testing.assert_array_equal(one.views, two.views)


def _one_of(rank: int, size: int, port: int, arguments: tuple[Path, Path, Path], kill: str, kills: int) -> None:
    """A process of a test, which `kill` may end with signal 9 at its `kills`-th shard."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    die, times = (lambda: os.kill(os.getpid(), signal.SIGKILL)), Counter[str]()
    really_save, really_keep = shards.ShardFolder.save, files.keep

    def save(folder: shards.ShardFolder, number: int, share: Share) -> None:
        times["save"] += 1
        if kill == "before" and times["save"] == kills:
            die()
        really_save(folder, number, share)
        if kill == "after" and times["save"] == kills:
            die()

    def keep(part: Path, path: Path) -> None:
        if kill == "within" and times["save"] == kills:
            part.write_bytes(part.read_bytes()[:99])
            die()
        really_keep(part, path)

    shards.ShardFolder.save, files.keep = save, keep  # type: ignore[method-assign]  # of this process only
    if kill == "report":
        testing.write_report = lambda out: die()
    model, data, out = arguments
    run_test(model, data, protocol="videoswin-4x3", split="test", out=out, overrides=quick())


def run_world(size: int, *arguments: Path, kill: str = "", kills: int = 1) -> list[int | None]:
    """Exit codes of a test in `size` processes, killed with signal 9; those that are left are ended with the first."""
    context = torch.multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_one_of, args=(rank, size, port, arguments, kill, kills)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 900
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return [process.exitcode for process in processes]


def test_any_number_of_processes_killed_at_any_time_end_in_the_same_bits(
    model_path: Path, with_broken: Path, tmp_path: Path
) -> None:
    """1, 2 and 3 processes, and a test killed five times that each time goes on with another number of processes."""
    done: list[int] = []
    for size in (1, 2, 3):
        assert run_world(size, model_path, with_broken, tmp_path / str(size)) == [0] * size
    for size, kill, kills in ((1, "before", 1), (2, "within", 1), (3, "after", 1), (1, "after", 1), (2, "report", 1)):
        codes = run_world(size, model_path, with_broken, tmp_path / "killed", kill=kill, kills=kills)
        assert -signal.SIGKILL in codes
        done.append(len(list((tmp_path / "killed").glob("shards/*/[0-9]*.npz"))))
    assert done[:2] == [0, 0]
    assert 1 <= done[2] < done[3] <= 4
    assert done[4] == 9, "killed over the report, all shards were done"
    assert run_world(3, model_path, with_broken, tmp_path / "killed") == [0, 0, 0]
    one, *others = (load_scores(tmp_path / name / "scores.npz") for name in ("1", "2", "3", "killed"))
    assert [bool(reason) for reason in one.reasons] == [i in (3, 8) for i in range(9)]
    for other, processes in zip(others, (2, 3, 3), strict=True):
        assert other.metadata["processes"] == processes
        assert (other.paths, other.reasons) == (one.paths, one.reasons)
        np.testing.assert_array_equal(other.logits.view(np.uint16), one.logits.view(np.uint16))
        np.testing.assert_array_equal(other.views, one.views)
    strips = [(tmp_path / name / "strips.npz").read_bytes() for name in ("1", "2", "3", "killed")]
    assert len(set(strips)) == 1
    figures = [json.loads((tmp_path / name / "results.json").read_text())["top1_bounds"] for name in ("1", "killed")]
    assert figures[0] == figures[1]
    assert not (tmp_path / "killed" / "shards").exists()


def test_shards_of_another_test_are_not_used(model_path: Path, data: Path, tested: Path, tmp_path: Path) -> None:
    assert run_world(1, model_path, data, tmp_path, kill="after", kills=3) == [-signal.SIGKILL]
    assert len(list(tmp_path.glob("shards/*/[0-9]*.npz"))) == 3
    overrides = quick(frame_order="reversed")
    run_test(model_path, data, protocol="videoswin-4x3", split="test", out=tmp_path, overrides=overrides)
    plain, turned = load_scores(tested / "scores.npz"), load_scores(tmp_path / "scores.npz")
    assert all((plain.logits[row] != turned.logits[row]).any() for row in range(1, N_VIDEOS))


def test_two_tests_in_one_folder_are_refused(model_path: Path, data: Path, tmp_path: Path) -> None:
    with files.hold(tmp_path / ".lock", "x"), pytest.raises(UserError, match="another test is writing here"):
        run_test(model_path, data, protocol="center-1x1", split="test", out=tmp_path, overrides=quick())


@pytest.mark.skipif(torch.multiprocessing.get_start_method() != "fork", reason="the stand-in decoder needs fork")
def test_a_decoder_that_kills_its_process_costs_one_video(
    model_path: Path, data: Path, tested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segmentation fault in a decoding library takes its process down; the video is named and the test goes on."""
    here = os.getpid()

    class Deadly(VideoReader):
        def __init__(self, path: Path, *, time_limit_seconds: float) -> None:
            if 'clip" 4' in str(path) and os.getpid() != here:
                os.kill(os.getpid(), signal.SIGKILL)
            super().__init__(path, time_limit_seconds=time_limit_seconds)

    monkeypatch.setattr(reading, "VideoReader", Deadly)
    overrides = quick(workers=2)
    result = run_test(model_path, data, protocol="videoswin-4x3", split="test", out=tmp_path, overrides=overrides)
    assert result["videos"] == {"listed": 7, "scored": 6, "failed": 1}
    scores, whole = load_scores(tmp_path / "scores.npz"), load_scores(tested / "scores.npz")
    assert scores.reasons[4] == f"the decoder crashed (exit code {-signal.SIGKILL})"
    np.testing.assert_array_equal(scores.logits[scores.scored], whole.logits[scores.scored])


@pytest.mark.skipif(torch.multiprocessing.get_start_method() != "fork", reason="the stand-in decoder needs fork")
def test_a_decoder_that_hangs_costs_one_video(
    model_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging(VideoReader):
        def __init__(self, path: Path, *, time_limit_seconds: float) -> None:
            if 'clip" 2' in str(path):
                signal.pause()
            super().__init__(path, time_limit_seconds=time_limit_seconds)

    monkeypatch.setattr(reading, "VideoReader", Hanging)
    monkeypatch.setattr(reading, "_GRACE_SECONDS", 0.0)
    overrides = quick(workers=1, time_limit_seconds=0.5)
    result = run_test(model_path, data, protocol="center-1x1", split="test", out=tmp_path, overrides=overrides)
    assert result["videos"]["failed"] == 1
    assert load_scores(tmp_path / "scores.npz").reasons[2] == "the decoder did not answer within 1.5 seconds"


def test_overrides_change_what_they_name(model_path: Path, data: Path, tested: Path, tmp_path: Path) -> None:
    overrides = parse_overrides(
        ["data.frames=2", "data.image_size=64", "data.frame_stride=3", "model.window=[1, 8, 8]", "data.workers=0"]
    )
    result = run_test(model_path, data, protocol="center-1x1", split="test", out=tmp_path, overrides=overrides)
    assert (result["frames"], result["frame_stride"], result["image_size"]) == (2, 3, [64, 64])
    assert load_scores(tmp_path / "scores.npz").views[0, 0, 3:].tolist() == [64, 64]
    run_test(
        model_path, data, protocol="videoswin-4x3", split="test", out=tmp_path, overrides=quick(frame_order="reversed")
    )
    plain, turned = load_scores(tested / "scores.npz"), load_scores(tmp_path / "scores.npz")
    assert turned.metadata["frame_order"] == "reversed"
    assert not np.array_equal(plain.logits, turned.logits)
    assert "Frames were reversed" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("data.frame_strid=2", r"unknown key data.frame_strid: did you mean data.frame_stride\?"),
        ("data.frames=0", "data.frames=0 does not do: .*greater than or equal to 1"),
        ("data.frame_order=random", "data.frame_order=random does not do: .*'in-order', 'shuffled' or 'reversed'"),
        ("data.image_size=[1,2,3]", "data.image_size="),
        ("data.frames", "key.sub=value"),
    ],
)
def test_overrides_that_cannot_be(text: str, fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        parse_overrides([text])


def test_wrong_usage_is_said_before_any_work(model_path: Path, data: Path, tmp_path: Path) -> None:
    def test(**changes: object) -> None:
        arguments = {"protocol": "center-1x1", "split": "test", "out": tmp_path / "out", "overrides": quick()}
        run_test(model_path, changes.pop("data", data), **(arguments | changes))  # type: ignore[arg-type]  # as above

    with pytest.raises(UsageError, match="center-1x2"):
        test(protocol="center-1x2")
    with pytest.raises(UsageError, match="no split 'val'"):
        test(split="val")
    (tmp_path / "test.txt").write_text(f"{data}/x.mp4 0\n")
    (tmp_path / "classes.txt").write_text("rigth\n")
    with pytest.raises(UsageError, match=r"rigth.*right"):
        test(data=tmp_path)
    (tmp_path / "classes.txt").write_text("right\n")
    (tmp_path / "test.txt").write_text(f"{data}/x.mp4 0\n{data}/y.mp4 -1\n")
    with pytest.raises(UsageError, match=r"1 of 2 videos .*have no label.*y\.mp4.*predict"):
        test(data=tmp_path)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot be made a folder"):
        test()


def test_no_video_that_can_be_scored_is_a_failure(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("a.mp4 0\nb.mp4 1\n")
    (tmp_path / "classes.txt").write_text("left\nright\n")
    with pytest.raises(UserError, match=r"none of the 2 listed videos .*a\.mp4: no such file"):
        run_test(model_path, tmp_path, protocol="center-1x1", split="test", out=tmp_path / "out", overrides=quick())


def test_scores_that_are_not_finite_name_the_video(data: Path, model_path: Path, tmp_path: Path) -> None:
    model = vs.load_model(model_path)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    card = vs.read_card(model_path)
    path = tmp_path / "nan.safetensors"
    vs.save_model(model, path, classes=card.classes, preprocessing=card.preprocessing, provenance={})
    with pytest.raises(UserError, match=r"clip.* 0\.mp4: the model's scores are not finite"):
        run_test(path, data, protocol="center-1x1", split="test", out=tmp_path / "out", overrides=quick())


@pytest.mark.parametrize(("views", "batch"), [(1, 12), (12, 12), (12, 32), (15, 12), (17, 32), (28, 12), (30, 64)])
def test_batches_are_full_whatever_the_number_of_views(views: int, batch: int) -> None:
    group = reading.videos_of_a_group(views, batch) * views
    assert group >= 0.9 * batch * -(-group // batch)
    assert group <= 10 * batch + views


def test_shares_must_hold_each_video_once() -> None:
    def share(*videos: int, views: int = 2) -> Share:
        n = len(videos)
        return Share(
            videos=np.array(videos),
            logits=np.full((n, views, 2), videos[0], np.float16),
            views=np.zeros((n, views, 5), np.int32),
            stand_ins=np.zeros(n, np.int32),
            reasons=np.array([f"r{video}" for video in videos]),
            seconds=np.array([1.0, 0.5]),
            strip_places=np.array([[videos[0], 1]]),
            strip_bytes=np.array([len(videos)]),
            strips=np.full(len(videos), videos[0], np.uint8),
        )

    merged = join_shares([share(0, 3), share(1, 2)], 4)
    assert merged.videos.tolist() == [0, 1, 2, 3]
    assert merged.reasons.tolist() == ["r0", "r1", "r2", "r3"]
    assert merged.logits[:, 0, 0].tolist() == [0, 1, 1, 0]
    assert merged.seconds.tolist() == [2.0, 1.0]
    assert {place: jpeg.tolist() for place, jpeg in merged.pictures().items()} == {(0, 1): [0, 0], (1, 1): [1, 1]}
    with pytest.raises(UserError, match="1 were not scored and 0 more than once"):
        join_shares([share(0, 3), share(1)], 4)
    with pytest.raises(UserError, match="0 were not scored and 1 more than once"):
        join_shares([share(0, 3), share(1, 2, 3)], 4)
    with pytest.raises(UserError, match="of 3 videos"):
        join_shares([share(0, 3), share(1, 2)], 3)
    with pytest.raises(UserError, match="not the same"):
        join_shares([share(0, 3), share(1, 2, views=3)], 4)
