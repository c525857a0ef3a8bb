"""Options of the loop: frozen stages, rates, class weights, repeats, early stop; and what a run prints about them."""

import json
import re
import shutil
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import video_swinv2 as vs
from tests.training.runs import write_noise_clips, write_recipe
from video_swinv2.config import OptimConfig, load_config
from video_swinv2.data import datasets
from video_swinv2.data.datasets import collate
from video_swinv2.engine.optimizer import freeze_stages, make_schedule, parameter_groups
from video_swinv2.errors import UsageError, UserError
from video_swinv2.models.swinv2 import DropPath
from video_swinv2.training.loop import run
from video_swinv2.training.metrics import read_metrics
from video_swinv2.training.tasks.classification import Classification, flip_notes
from video_swinv2.training.tasks.simmim import Pretraining
from video_swinv2.weights.store import read_tensors


@pytest.fixture(scope="module")
def clips(tmp_path_factory, write_video):
    """Six clips of class `often`, two of class `seldom`."""
    labels = [int(number > 5) for number in range(8)]
    return write_noise_clips(tmp_path_factory.mktemp("clips"), write_video, labels, ("often", "seldom"))


@pytest.fixture
def config(clips, tmp_path):
    """A function that makes a small configuration with overrides."""

    def make(*overrides):
        values = {
            "out": str(tmp_path / "run"),
            "init": "scratch",
            "model": {"name": "swinv2_nano", "window": [2, 4, 4], "drop_path": 0.3},
            "data": {"source": str(clips), "frames": 2, "image_size": 32, "workers": 0},
            "optim": {"epochs": 2, "lr": 1e-3, "batch": 4, "micro_batch": 4},
            "engine": {"engine": "plain", "precision": "fp32", "device": "cpu"},
            "log_every": 1,
        }
        return load_config(write_recipe(tmp_path, values, {}), overrides)

    return make


def test_frozen_stages_keep_their_weights_and_repeats_are_counted(config, capsys):
    """One run for both, and for what it prints at its end."""
    settings = config("optim.frozen_stages=2", "augment.repeats=2", "optim.lr_batch=8")
    task = Classification(settings)
    before = {name: tensor.clone() for name, tensor in task.module.state_dict().items()}
    folder = run(settings, lambda *_: task)
    after, _ = read_tensors(folder / "last.safetensors")
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    frozen = {name for name in after if name.startswith(("patch_embed.", "layers.0.", "layers.1."))}
    assert frozen <= same
    # Biases that start at zero and get zero gradients stay zero, so only weights are sure to have moved.
    assert not {name for name in same - frozen if name.endswith((".qkv.weight", ".fc1.weight", "head.weight"))}
    record = json.loads((folder / "run.json").read_text())
    assert (record["repeats"], record["steps"], record["config"]["augment"]["repeats"]) == (2, 8, 2)
    said = capsys.readouterr().out
    assert "batch: 4 = 1 processes x 2 clips x 2 repeats x 1 accumulated; 16 samples, 8 steps" in said
    assert "peak learning rate 0.0005 = optim.lr 0.001 x batch 4 / optim.lr_batch 8 (linear rule)" in said
    assert f"{folder}: done at step 8 of 8" in said
    assert f"best          val/top1 {100 * record['best']:.2f} % at step {record['best_step']}" in said
    assert said.splitlines()[-1].startswith(f"next: video-swinv2 test {folder}/model.safetensors ")
    assert "top5" not in said, "of two classes, any answer is among the first five"
    speed = record["speed"]
    assert speed["samples_per_second"] > 0
    assert 0 <= speed["data_wait"] <= 1
    assert record["slowest_file"][1].endswith(".mp4")
    logged = [line for line in read_metrics(folder) if "train/loss" in line]
    assert {"speed/tflops_per_device", "speed/memory_gb", "speed/data_wait"} <= logged[-1].keys()


def test_where_the_best_weights_are_missing_the_best_are_those_to_come(config, tmp_path, capsys):
    """In a run that continues another one, and in one that has nothing but its checkpoints.

    The rate is so small that no validation is better than the first one: all have the same accuracy.
    """
    first = run(config("optim.lr=1e-12", "optim.epochs=1"), Classification)
    record = json.loads((first / "run.json").read_text())
    assert (record["steps"], record["best_step"]) == (2, 2)
    other = run(config("optim.lr=1e-12", f"resume={first}", f"out={tmp_path / 'other'}"), Classification)
    (first / "model.safetensors").unlink()
    capsys.readouterr()
    again = run(config("optim.lr=1e-12"), Classification, accept_changes=True)
    for folder in (other, again):
        assert (folder / "model.safetensors").is_file()
        assert json.loads((folder / "run.json").read_text())["best_step"] == 4
    assert f"the best weights so far, of step 2, are not in {first}" in capsys.readouterr().out


def test_drop_path_is_off_in_frozen_stages_and_too_many_are_refused():
    model = vs.create_model("swinv2_nano", num_classes=2, drop_path=0.3)
    rates = [part.rate for part in model.modules() if isinstance(part, DropPath)]
    freeze_stages(model, 1)
    left = [part.rate for part in model.modules() if isinstance(part, DropPath)]
    first = model.depths[0]
    assert left == [0.0] * first + rates[first:]
    assert all(rate > 0 for rate in left[first:])
    with pytest.raises(UsageError, match=r"optim\.frozen_stages: 5 is more than the model.s 4 stages"):
        freeze_stages(model, 5)


def test_the_backbone_has_a_rate_of_its_own():
    model = vs.create_model("swinv2_nano", num_classes=2)
    groups = {g["name"]: g for g in parameter_groups(model, model.depths, weight_decay=0.05, backbone_lr=0.1)}
    assert [(name, group["lr_scale"]) for name, group in groups.items()] == [
        ("all_layers_backbone_decay", 0.1),
        ("all_layers_backbone_no_decay", 0.1),
        ("all_layers_head_decay", 1.0),
        ("all_layers_head_no_decay", 1.0),
    ]
    assert groups["all_layers_head_decay"]["parameter_names"] == ["head.weight"]
    both = parameter_groups(model, model.depths, weight_decay=0.05, layer_decay=0.5, backbone_lr=0.1)
    scales = {name: group["lr_scale"] for group in both for name in group["parameter_names"]}
    assert (scales["head.weight"], scales["norm.weight"]) == (1.0, 0.1)
    assert scales["patch_embed.proj.weight"] == pytest.approx(0.1 * 0.5 ** (sum(model.depths) + 1))


def test_the_linear_scaling_rule_applies_to_every_rate():
    optim = OptimConfig(
        epochs=4, lr=1e-3, lr_batch=64, batch=16, micro_batch=4, warmup_epochs=1, warmup_lr=1e-6, min_lr=1e-5
    )
    schedule = make_schedule(optim, 40, 160)
    assert [schedule.lr_at(step) for step in (0, 10, 40)] == pytest.approx([2.5e-7, 2.5e-4, 2.5e-6])


def test_class_weights_weigh_the_loss(config):
    task = Classification(config("optim.class_weights=balanced", "optim.label_smoothing=0.1"))
    assert task.class_weights.tolist() == pytest.approx([8 / (2 * 6), 8 / (2 * 2)])
    logits = torch.randn(3, 2)
    samples = [task.train_samples[(0, number)] for number in (0, 5, 7)]
    found = task.loss(lambda inputs: logits, collate(samples))
    shares = F.one_hot(torch.tensor([0, 0, 1]), 2) * 0.9 + 0.05
    expected = -(shares * task.class_weights * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(found, expected)
    mild = Classification(config("optim.class_weights=sqrt_balanced")).class_weights
    assert mild.tolist() == pytest.approx([8 / (6**0.5 * (6**0.5 + 2**0.5)), 8 / (2**0.5 * (6**0.5 + 2**0.5))])
    assert Classification(config("optim.class_weights=[1, 3]")).class_weights.tolist() == [1, 3]
    with pytest.raises(UsageError, match="3 weights for 2 classes"):
        Classification(config("optim.class_weights=[1, 3, 1]"))
    with pytest.raises(UsageError, match=r"optim\.class_weights: is for `train`"):
        Pretraining(config("optim.class_weights=balanced"))


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("Left", "Right"), "left from right ('Left' and 'Right')"),
        (("SwipeLeft", "swipe_right", "stop"), "left from right ('SwipeLeft' and 'swipe_right')"),
        (("from left to right", "from right to left"), "left from right ('from left to right')"),
        (("moving leftwards", "moving rightward"), "left from right ('moving leftwards' and 'moving rightward')"),
        (("clockwise", "Counter-clockwise"), "clockwise from counterclockwise ('clockwise' and 'Counter-clockwise')"),
        (("AntiClockwise", "Clockwise"), "clockwise from anticlockwise ('Clockwise' and 'AntiClockwise')"),
        (("bright", "cleft"), None),
        (("left", "upright"), None),
        (("clockwise", "still"), None),
        (("forward", "backward"), None),
    ],
)
def test_flips_that_turn_classes_into_each_other_are_noticed(classes, words):
    notes = flip_notes(0.5, classes)
    assert flip_notes(0.0, classes) == ()
    if words is None:
        assert notes == ()
    else:
        (note,) = notes
        assert note.startswith("augment.flip: 0.5 of the samples are mirrored and keep their label, ")
        assert f"though class names tell {words}; set augment.flip=0 unless" in note


def test_a_run_says_at_its_start_that_flips_do_not_fit_its_classes(config, clips, tmp_path, capsys):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.txt").write_text(f"{clips}/0.mp4 0\n{clips}/7.mp4 1\n")
    (lists / "classes.txt").write_text("turn left\nturn right\n")
    for flip, notes in ((0.5, 1), (0.0, 0)):
        # A run of less than one step: it ends after what it prints at its start.
        overrides = (f"augment.flip={flip}", f"data.source={lists}", f"out={tmp_path}/run{flip}")
        run(config("optim.epochs=0.5", "optim.batch=2", "data.val_split=none", *overrides), Classification)
        said = capsys.readouterr().out.splitlines()
        assert len([line for line in said if line.startswith("augment.flip: 0.5 of the samples")]) == notes


def test_a_class_without_samples_is_told(config, clips, tmp_path):
    (tmp_path / "train.txt").write_text(f"{clips}/0.mp4 0\n")
    (tmp_path / "classes.txt").write_text("often\nnever\n")
    task = Classification(config(f"data.source={tmp_path}", "data.val_split=none"))
    assert task.notes == ("split train has no video of 1 of 2 classes: 'never'",)


def test_a_class_without_samples_has_no_balanced_weight(config, clips, tmp_path):
    (tmp_path / "train.txt").write_text(f"{clips}/0.mp4 0\n")
    (tmp_path / "classes.txt").write_text("often\nnever\n")
    with pytest.raises(UsageError, match="class 'never' has no training sample"):
        Classification(config("optim.class_weights=balanced", f"data.source={tmp_path}"))


def test_a_run_that_does_not_improve_stops_early(config, capsys):
    """Two steps an epoch; at a learning rate of nearly zero the first validation stays the best."""
    settings = config("optim.epochs=20", "optim.lr=1e-12", "early_stop_epochs=1.5")
    folder = run(settings, Classification)
    record = json.loads((folder / "run.json").read_text())
    # Equal accuracies do not count as an improvement, but the later weights are kept.
    assert (record["step"], record["steps"], record["best_step"], record["stopped_early"]) == (6, 40, 6, True)
    assert "done at step 6 of 40 (stopped early)" in capsys.readouterr().out
    run(settings, Classification)
    said = capsys.readouterr().out
    assert f"{folder}: finished at step 6 of 40; to go on, raise or omit early_stop_epochs, now 1.5; for a new" in said


def test_changed_settings_do_not_rewrite_the_history_of_a_run(config, capsys):
    """Four steps of two epochs; then two more epochs with another learning rate and without flips."""
    folder = run(config(), Classification)
    before = {name: (folder / name).read_bytes() for name in ("run.json", "config.yaml")}
    first = json.loads(before["run.json"])["config"]
    overrides = ("optim.epochs=4", "optim.lr=2e-3", "augment.flip=0", "log_every=2")
    with pytest.raises(UsageError) as caught:
        run(config(*overrides), Classification)
    learned = "augment.flip: 0.5 -> 0.0, optim.epochs: 2.0 -> 4.0, optim.lr: 0.001 -> 0.002"
    assert str(caught.value) == (
        f"{folder}: has a checkpoint of step 4, and what has changed since affects what is learned: {learned}; "
        "undo them, add --accept-changes, or choose another out"
    )
    assert {name: (folder / name).read_bytes() for name in before} == before, "a refused run writes nothing"

    # A finished run says how to go on; a setting that changes nothing it has learned is no hindrance, nor recorded.
    capsys.readouterr()
    run(config("log_every=2"), Classification)
    assert "finished at step 4 of 4; to go on, raise optim.epochs, now 2, and add --accept-changes; for a new run" in (
        capsys.readouterr().out
    )
    assert (folder / "run.json").read_bytes() == before["run.json"]

    run(config(*overrides), Classification, accept_changes=True)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "since step" in line] == [
        f"{change} (since step 4)" for change in [*learned.split(", "), "log_every: 1 -> 2"]
    ]
    record = json.loads((folder / "run.json").read_text())
    assert [kept["since_step"] for kept in record["configs"]] == [0, 4]
    assert [kept["config"] for kept in record["configs"]] == [first, record["config"]]
    assert record["config"]["optim"]["lr"] == 2e-3
    assert load_config(folder / "config.yaml") == config(*overrides)
    # Accepted once, the settings are those of the run.
    run(config(*overrides), Classification)
    assert "finished at step 8 of 8" in capsys.readouterr().out


def test_the_micro_batch_is_planned_once_and_kept_when_the_run_is_resumed(config, capsys):
    """Two samples at a time are planned at first; the plan of the resumed run, three, is not asked for."""
    planned = []

    def plan(size):
        def choose(settings, processes):
            planned.append((settings.optim.batch, processes, size))
            return size, "planned in a test"

        return choose

    settings = config("optim.micro_batch=null", "optim.epochs=1")
    folder = run(settings, Classification, plan(2))
    said = capsys.readouterr().out
    assert "micro_batch: 2 (planned in a test; optim.micro_batch sets another)\n" in said
    assert "batch: 4 = 1 processes x 2 samples x 2 accumulated" in said
    assert load_config(folder / "config.yaml").optim.micro_batch == 2
    longer = config("optim.micro_batch=null", "optim.epochs=2")
    run(longer, Classification, plan(3), accept_changes=True)
    said = capsys.readouterr().out
    assert "micro_batch: 2 (as before; optim.micro_batch sets another)\n" in said
    assert "optim.micro_batch:" not in said, "the setting has not changed"
    record = json.loads((folder / "run.json").read_text())
    assert (record["micro_batch"], record["config"]["optim"]["micro_batch"], record["step"]) == (2, 2, 4)
    # Without a checkpoint there is nothing to continue.
    shutil.rmtree(folder / "checkpoints")
    run(longer, Classification, plan(1))
    assert planned == [(4, 1, 2), (4, 1, 1)]
    # The value given by the user counts, and the record of the run must be whole.
    run(config("optim.micro_batch=4", "optim.epochs=2"), Classification, plan(3))
    assert "micro_batch: " not in capsys.readouterr().out.replace("micro_batch: 1 (planned in a test", "")
    (folder / "run.json").write_text('{"config": {"optim": {"micro_batch": "2"}}}')
    with pytest.raises(UserError, match=r"run\.json: .*micro_batch.*remove it, or give optim\.micro_batch"):
        run(longer, Classification, plan(3))


def test_a_run_that_continues_another_may_change_everything_and_keeps_its_history(config, tmp_path, capsys):
    first = run(config("optim.epochs=1"), Classification)
    other = run(config("optim.lr=2e-3", f"resume={first}", f"out={tmp_path / 'other'}"), Classification)
    assert "optim.lr: 0.001 -> 0.002 (since step 2)" in capsys.readouterr().out
    configs = json.loads((other / "run.json").read_text())["configs"]
    assert [(kept["since_step"], kept["config"]["optim"]["lr"]) for kept in configs] == [(0, 1e-3), (2, 2e-3)]


def test_the_metric_of_the_best_weights_can_be_chosen_and_changed(config, clips, capsys):
    folder = run(config("best_metric=val/loss", "optim.epochs=1"), Classification)
    record = json.loads((folder / "run.json").read_text())
    measured = {line["step"]: line["val/loss"] for line in read_metrics(folder) if "val/loss" in line}
    assert (record["best_metric"], record["best"], record["best_step"]) == ("val/loss", measured[2], 2)
    run(config("best_metric=val/top1"), Classification, accept_changes=True)
    lost = "best_metric val/loss then, val/top1 now: the best weights are those to come"
    assert lost in capsys.readouterr().out
    record = json.loads((folder / "run.json").read_text())
    assert (record["best_metric"], record["best_step"]) == ("val/top1", 4)
    # The same holds for other validation samples.
    (clips / "test.txt").write_text("0.mp4 0\n7.mp4 1\n")
    run(config("optim.epochs=3", "data.val_split=test"), Classification, accept_changes=True)
    assert re.search(r"val_fingerprint \w{64} then, \w{64} now: the best weights", capsys.readouterr().out)
    assert json.loads((folder / "run.json").read_text())["best_step"] == 6
    with pytest.raises(UsageError, match="best_metric: val/top5 is not measured in this run; use val/top1 or val/loss"):
        run(config("best_metric=val/top5", f"out={folder.parent}/other"), Classification)


def test_a_loader_that_starves_the_device_is_reported_with_the_slowest_file(config, monkeypatch, capsys):
    open_video = datasets.open_video

    def slow(path, decoder, **limits):
        time.sleep(3.0 if path.name == "5.mp4" else 0.5)
        return open_video(path, decoder, **limits)

    monkeypatch.setattr(datasets, "open_video", slow)
    folder = run(config("optim.epochs=1", "data.val_split=none"), Classification)
    record = json.loads((folder / "run.json").read_text())
    assert record["slowest_file"][1].endswith("/5.mp4")
    assert record["slowest_file"][0] > 3
    assert record["speed"]["data_wait"] > 0.2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data: ")]
    assert "of the time is spent waiting for samples; raise data.workers from 0" in line


def test_weights_and_biases_where_it_is_installed(config, tmp_path, monkeypatch):
    """With a stand-in that records its calls: the package itself needs an account."""
    with pytest.raises(UsageError, match="wandb: 'clips' needs the package wandb"):
        run(config("wandb=clips"), Classification)
    (tmp_path / "wandb.py").write_text(
        "calls = []\n"
        "class Run:\n"
        "    def log(self, values, step): calls.append((step, sorted(values)))\n"
        "    def finish(self): calls.append('finish')\n"
        "def init(**options):\n"
        "    calls.append(options)\n"
        "    return Run()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run(config("wandb=clips", "optim.epochs=0.5"), Classification)
    opened, *logged, last = sys.modules.pop("wandb").calls
    assert (opened["project"], opened["name"], opened["resume"]) == ("clips", "run", "allow")
    assert [step for step, _ in logged] == [0, 1, 1]
    assert "train/loss" in logged[1][1]
    assert last == "finish"


def test_the_next_command_tests_a_split_that_exists(config, clips, tmp_path):
    for split, wanted in (("train", ""), ("val", " --split val"), ("test", "")):
        (tmp_path / f"{split}.txt").write_text(f"{clips}/0.mp4 0\n{clips}/7.mp4 1\n")
        said = Classification(config(f"data.source={tmp_path}")).next_command(tmp_path / "run")
        assert f" {tmp_path} --protocol videoswin-4x3{wanted} --out " in said
