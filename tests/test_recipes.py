"""Every recipe: its header is complete, it loads and builds, and it can be planned on the devices that it names."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from video_swinv2.config import Config, load_config
from video_swinv2.data.loading import plan_batch
from video_swinv2.dense.detectors import Detector, DetectorDesign
from video_swinv2.dense.segmenters import Segmenter, SegmenterDesign
from video_swinv2.engine.optimizer import freeze_stages, make_schedule, parameter_groups
from video_swinv2.errors import UsageError
from video_swinv2.models.simmim import SimMIM
from video_swinv2.plan.plan import make_plan
from video_swinv2.training.tasks.base import build_model
from video_swinv2.training.tasks.simmim import resolved_mask

CONFIGS = REPOSITORY / "configs"
ALL_RECIPES = sorted(CONFIGS.rglob("*.yaml"))
SMALL = ("demo", "ut_interaction", "photographs", "camvid", "bccd")  # for one small machine, with numbers of our own
RECIPES = [path for path in ALL_RECIPES if path.parent.name not in SMALL]
NAMES = [str(path.relative_to(CONFIGS).with_suffix("")) for path in RECIPES]
# Numbers of training clips: the official lists (Kinetics-700: mmaction2's copy), UCF101's and HMDB51's first split.
SAMPLES = {
    "image": 1_281_167,
    "pretrain": 1_281_167,
    "kinetics400": 246_534,
    "kinetics600": 392_622,
    "kinetics700": 542_357,
    "something_v2": 168_913,
    "ucf101": 9_537,
    "hmdb51": 3_570,
    "ade20k": 20_210,
    "coco": 118_287,
}
CLASSES = {
    "image": 1000,
    "kinetics400": 400,
    "kinetics600": 600,
    "kinetics700": 700,
    "something_v2": 174,
    "ucf101": 101,
    "hmdb51": 51,
    "ade20k": 150,
    "coco": 80,
}


def devices(text: str) -> int:
    """How many processes the command in the header starts."""
    nodes = re.search(r"--nnodes (\d+)", text)
    return int(re.search(r"--nproc_per_node (\d+)", text)[1]) * (int(nodes[1]) if nodes else 1)  # type: ignore[index]


def test_all_sizes_and_sets_are_there() -> None:
    wanted = {f"kinetics400/{size}" for size in ("tiny", "small", "base", "large", "giant_1", "giant_2")}
    wanted |= {f"kinetics400/{size}_simmim" for size in ("tiny", "small", "base", "large")}
    wanted |= {f"{name}/base" for name in ("kinetics600", "kinetics700", "something_v2", "ucf101", "hmdb51")}
    assert wanted <= set(NAMES)


def header(path: Path) -> str:
    """The comment lines that a recipe starts with."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(itertools.takewhile(lambda line: line.startswith("#"), lines))


@pytest.mark.parametrize("path", ALL_RECIPES, ids=lambda path: str(path.relative_to(CONFIGS).with_suffix("")))
def test_a_recipe_says_where_its_numbers_are_from_and_how_it_is_started(path: Path) -> None:
    text = header(path)
    verb = "pretrain" if path.stem == "pretrain" or path.parent.name == "pretrain" else "train"
    assert f" {verb} {path.relative_to(REPOSITORY)}" in text[text.index("# command: ") :]
    assert re.search("^# (not )?measured", text, re.MULTILINE)
    if path.parent.name in SMALL:
        assert "ours" in text
    else:
        assert "# source: " in text
    if path.parent.name == "image":
        assert "# normaliser: " in text, "which window the position bias is normalised with"


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_can_be_built(path: Path) -> None:
    """Model on the meta device, optimizer groups, schedule, and the batch on the devices that the header names."""
    config = load_config(path)
    optim = config.optim
    assert config.out == f"runs/{path.relative_to(CONFIGS).with_suffix('')}"
    module = build(config, path.parent.name)
    groups = parameter_groups(
        module,
        depths(module),
        weight_decay=optim.weight_decay,
        layer_decay=optim.layer_decay,
        backbone_lr=optim.backbone_lr,
    )
    layers = sum(depths(module)) + 2  # the patch embedding, the blocks, the head
    expected = {optim.layer_decay**depth for depth in range(layers)} | {optim.backbone_lr}
    assert sorted({group["lr_scale"] for group in groups}) == pytest.approx(sorted(expected))
    samples = SAMPLES[path.parent.name] * config.augment.repeats
    steps = round(optim.epochs * samples / optim.batch)
    schedule = make_schedule(optim, steps, samples)
    assert schedule.lr_at(steps - 1) < schedule.lr
    assert schedule.lr_at(schedule.warmup_steps) == pytest.approx(schedule.lr)
    plan = plan_batch(optim.batch, optim.micro_batch, devices(header(path)), config.augment.repeats)
    assert plan.micro == optim.micro_batch, (
        "a micro-batch that does not divide the share would silently be made smaller"
    )
    if config.augment.mixup or config.augment.cutmix:
        assert plan.micro > 1, "one sample has nothing to be mixed with"


def build(config: Config, folder: str) -> torch.nn.Module:
    """The task's module, without memory."""
    with torch.device("meta"):
        if folder == "pretrain":
            encoder = build_model(config, 0)
            return SimMIM(encoder, resolved_mask(config, encoder).unit)
        if config.task == "segmentation":
            design = SegmenterDesign(CLASSES[folder], config.segmentation.channels)
            return Segmenter(build_model(config, 0, features_only=True), design)
        if config.task == "detection":
            return Detector(build_model(config, 0, features_only=True), DetectorDesign(80, config.detection.kind))
        encoder = build_model(config, CLASSES[folder])
    freeze_stages(encoder, config.optim.frozen_stages)
    return encoder


def depths(module: torch.nn.Module) -> tuple[int, ...]:
    return tuple(getattr(module, "encoder", module).depths)


def test_what_the_published_recipes_say() -> None:
    """The numbers that matter most, against the table of Video Swin's files and the SwinV2 paper's appendix."""
    video_swin = {
        "tiny": (1e-3, 0.02, 0.1),
        "small": (1e-3, 0.02, 0.1),
        "base": (3e-4, 0.05, 0.2),
        "large": (3e-4, 0.05, 0.2),
    }
    for size, numbers in video_swin.items():
        config = load_config(CONFIGS / "kinetics400" / f"{size}.yaml")
        optim, data = config.optim, config.data
        assert (optim.lr, optim.weight_decay, config.model.drop_path) == numbers
        assert (data.frames, data.frame_stride, data.image_size, config.model.window) == (32, 2, 224, (8, 7, 7))
        assert (optim.epochs, optim.batch, optim.warmup_epochs, optim.backbone_lr) == (30, 64, 2.5, 0.1)
    for stage, numbers in ((1, (256, 16, 20, 2.5, 80, 3.6e-4)), (2, (320, 20, 5, 1, 64, 5e-5))):
        config = load_config(CONFIGS / "kinetics400" / f"giant_{stage}.yaml")
        side, window, *rest = numbers
        assert (config.data.image_size, config.model.window) == (side, (8, window, window))
        optim = config.optim
        assert [optim.epochs, optim.warmup_epochs, optim.batch, optim.lr] == rest
        assert optim.weight_decay == 0.1
    assert load_config(CONFIGS / "something_v2" / "base.yaml").augment.flip == 0, "left and right are classes"
    for size in ("tiny", "small", "base"):
        config = load_config(CONFIGS / "ade20k" / f"{size}.yaml")
        schedule = make_schedule(config.optim, round(config.optim.epochs * 20_210 / 16), 20_210)
        assert (schedule.steps, schedule.warmup_steps, schedule.kind) == (
            pytest.approx(160_000, abs=20),
            1500,
            "linear",
        )
        assert (config.optim.lr, config.optim.weight_decay, config.optim.batch) == (6e-5, 0.01, 16)
        assert (config.model.drop_path, config.data.image_size, config.segmentation.channels) == (0.3, 512, 512)
    detectors = {
        "mask_rcnn_tiny_1x": (12, (8, 11), 0.1),
        "mask_rcnn_tiny_3x": (36, (27, 33), 0.2),
        "cascade_tiny_3x": (36, (27, 33), 0.2),
        "cascade_small_3x": (36, (27, 33), 0.2),
        "cascade_base_3x": (36, (27, 33), 0.3),
    }
    assert {f"coco/{name}" for name in detectors} == {name for name in NAMES if name.startswith("coco/")}
    for name, numbers in detectors.items():
        config = load_config(CONFIGS / "coco" / f"{name}.yaml")
        optim = config.optim
        assert (optim.epochs, optim.milestones, config.model.drop_path) == numbers
        assert (optim.lr, optim.weight_decay, optim.batch, optim.schedule) == (1e-4, 0.05, 16, "multistep")
        assert (config.data.image_size, config.detection.short_sides) == ((800, 1333), (480, 800))
        assert make_schedule(optim, round(optim.epochs * 118_287 / 16), 118_287).warmup_steps == 500
        assert config.detection.kind == ("mask_rcnn" if "mask" in name else "cascade_mask_rcnn")


@pytest.mark.parametrize("path", [path for path in RECIPES if load_config(path).task is not None], ids=str)
def test_a_plan_says_that_it_is_not_for_dense_tasks(path: Path) -> None:
    with pytest.raises(UsageError, match=r"task: \w+ cannot be planned"):
        make_plan(load_config(path), processes=8, samples=1000, classes=10)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in RECIPES if load_config(path).task is None], ids=str)
def test_a_recipe_can_be_planned(path: Path) -> None:
    """Every recipe, started as its header says, fits into the memory of 80 GB devices."""
    folder = path.parent.name
    config = load_config(path, ["engine.device=cuda"])
    number = devices(path.read_text(encoding="utf-8"))
    plan = make_plan(
        config,
        processes=number,
        samples=SAMPLES[folder],
        classes=CLASSES.get(folder),
        pretraining=folder == "pretrain",
    )
    assert plan.processes * plan.micro_batch * plan.accumulation == config.optim.batch
    assert plan.steps == pytest.approx(config.optim.epochs * (plan.samples or 0) / config.optim.batch, abs=1)
    assert 0 < plan.peak < 80e9


@pytest.mark.slow
def test_giant_on_8_16_and_64_devices() -> None:
    """Under ZeRO-3 the states shrink as devices are added; the memory of a sample's activations does not."""
    config = load_config(CONFIGS / "kinetics400" / "giant_2.yaml", ["engine.device=cuda"])
    plans = [make_plan(config, processes=number, samples=246_534, classes=400) for number in (8, 16, 64)]
    assert [plan.accumulation for plan in plans] == [8, 4, 1]
    kept = [plan.states.weights + plan.states.gradients + plan.states.optimizer for plan in plans]
    # 20 bytes for each of 3.0 B parameters.
    assert kept == [pytest.approx(20 * plans[0].parameters / number, rel=1e-6) for number in (8, 16, 64)]
    assert len({plan.activations for plan in plans}) == 1
    assert plans[0].peak > plans[1].peak > plans[2].peak


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False)])
def test_the_slurm_script_starts_again_when_asked(tmp_path: Path, code: int, requeued: bool) -> None:
    """The real script, with stand-ins for the two programs that only a cluster has."""
    for name, body in (
        ("srun", f'echo "$@" > {tmp_path}/srun.txt; exit {code}'),
        ("scontrol", f'echo "$@" > {tmp_path}/again.txt'),
    ):
        program = tmp_path / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command = ["bash", str(CONFIGS / "slurm" / "kinetics400.sh"), "run.yaml", "out=runs/a b"]
    done = subprocess.run(command, env=environment, check=False)
    assert done.returncode == code
    assert (tmp_path / "srun.txt").read_text().endswith("video-swinv2 train run.yaml out=runs/a b\n")
    assert (tmp_path / "again.txt").is_file() == requeued
    if requeued:
        assert (tmp_path / "again.txt").read_text() == "requeue 7\n"
