"""Detection on real files: learning, figures of validations, exact resumption, and one process against two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import video_swinv2 as vs
from tests.training.dense_runs import check_resumed_equals_whole, finish, losses
from tests.training.runs import write_recipe
from video_swinv2.config import load_config
from video_swinv2.data.datasets import UNREADABLE_LABEL, collate
from video_swinv2.dense.detection_dataset import read_detection_data
from video_swinv2.dense.detection_metrics import detection_figures, image_detections
from video_swinv2.errors import UserError
from video_swinv2.training.flops import count_forward_flops
from video_swinv2.training.loop import run
from video_swinv2.training.metrics import read_metrics
from video_swinv2.training.tasks.choosing import task_to_train
from video_swinv2.training.tasks.detection import SEED, Detection, heads_flops

Recipe = Callable[..., Path]
COLOURS = np.array([[200, 40, 40], [40, 180, 60], [50, 60, 220]], dtype=np.uint8)
TRAIN, VAL = 6, 3
HEADS = {
    "fpn_channels": 16,
    "head_channels": 32,
    "mask_channels": 8,
    "anchor_sizes": [8, 16, 32, 64, 128],
    "proposals": 50,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noisy rectangles in two colours, of several sizes, in COCO's layout; one of them has no rectangle."""
    root = tmp_path_factory.mktemp("rectangles")
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split, count in (("train", TRAIN), ("val", VAL)):
        (root / split).mkdir()
        content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": 4, "name": "box"}, {"id": 9, "name": "hole"}]
        for number in range(count):
            height, width = 48 + 8 * (number % 3), 64
            pixels = np.broadcast_to(COLOURS[0], (height, width, 3)).astype(int)
            for k in (1, 2) if number != 4 else ():
                left, top = (int(n) for n in rng.integers(0, 24, 2))
                box = [left + 16 * (k - 1), top, 18, 20]
                pixels[top : top + 20, box[0] : box[0] + 18] = COLOURS[k]
                right, bottom = box[0] + 18, top + 20
                outline = [[box[0], top, right, top, right, bottom, box[0], bottom]]
                item = {"image_id": number, "category_id": (4, 9)[k - 1], "bbox": box, "segmentation": outline}
                content["annotations"].append(item | {"id": len(content["annotations"]) + 1, "area": 360, "iscrowd": 0})
            noisy = np.clip(pixels + rng.integers(-30, 30, pixels.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / split / f"{number}.png")
            content["images"].append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Recipe:
    def write(name: str, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "out": str(tmp_path / name),
            "init": "scratch",
            "task": "detection",
            "model": {"name": "swinv2_nano", "window": 4},
            "data": {"source": str(data), "image_size": [48, 80], "workers": 0},
            "detection": {"kind": "mask_rcnn", "short_sides": [32, 64], **HEADS},
            "optim": {"epochs": 4, "lr": 1e-3, "batch": 4, "micro_batch": 1, "schedule": "linear", "warmup_epochs": 1},
            "engine": {"zero_stage": 1, "precision": "fp32", "device": "cpu"},
            "log_every": 1,
            "val_epochs": 100,
            "checkpoint_minutes": 0,
        }
        return write_recipe(tmp_path, values, changes, name)

    return write


def test_killed_and_resumed_equals_uninterrupted_and_two_processes_equal_one(recipe: Recipe) -> None:
    whole, killed = recipe("whole"), recipe("killed")
    check_resumed_equals_whole(whole, killed)
    # Micro-batches of two images: their losses are those of two micro-batches of one.
    one = finish(recipe("one", engine={"engine": "plain"}, optim={"micro_batch": 2}), 1)
    assert len(losses(one)) == 6
    # One process sums in another order. At the beginning that is all; later a box may fall on the other side of a
    # threshold.
    theirs = losses(whole.with_suffix(""))
    assert losses(one)[:2] == pytest.approx(theirs[:2], rel=1e-5)
    assert losses(one) == pytest.approx(theirs, rel=0.05)
    folders = (one, whole.with_suffix(""))
    first, second = (next(line for line in read_metrics(folder) if "val/ap" in line) for folder in folders)
    # `figures` refuses an image that is missing or counted twice, as one of three could be in two processes.
    assert "val/mask_ap" in first
    assert first == pytest.approx(second, rel=1e-9)


@pytest.fixture(scope="module")
def learned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that sees the same three images in every step, with other anchors and boxes drawn from them."""
    out = tmp_path_factory.mktemp("learned")
    values: dict[str, Any] = {
        "out": str(out / "run"),
        "init": "scratch",
        "task": "detection",
        "model": {"name": "swinv2_nano", "window": 4},
        "data": {"source": str(data), "image_size": [64, 80], "workers": 0, "train_split": "val"},
        "detection": {"kind": "mask_rcnn", **HEADS, "sampled_anchors": 64, "sampled_boxes": 32},
        "augment": {"flip": 0.0},
        "optim": {"epochs": 100, "lr": 2e-3, "batch": 3, "micro_batch": 3, "weight_decay": 0.0, "warmup_epochs": 5},
        "engine": {"engine": "plain", "precision": "fp32", "device": "cpu"},
        "log_every": 1,
        "val_epochs": 1000,
        "checkpoint_minutes": 1000,
    }
    values["optim"]["clip_norm"] = 5.0
    return run(load_config(write_recipe(out, values, {}, "run")), Detection)


def test_a_run_learns_and_its_figures_are_those_of_the_model(learned: Path, data: Path) -> None:
    found = losses(learned)
    assert found[-1] < 0.4 * found[0], found[::20]  # tests/dense/test_detectors.py learns a batch by heart
    model = vs.load_model(learned)
    assert isinstance(model, vs.Detector)
    assert model.classes == ("box", "hole")
    assert (model.design.short_side, model.design.max_side) == (64, 80)
    annotated = read_detection_data(data, "val")
    everything = []
    with torch.no_grad():
        for place in range(VAL):
            image, _ = vs.DetectionDataset(data, "val")[place]
            everything.append(image_detections(place, model.detect(image), annotated.size(place)))
    last = [line for line in read_metrics(learned) if "val/ap" in line][-1]
    for masks, prefix in ((False, ""), (True, "mask_")):
        figures = detection_figures(annotated, everything, masks=masks).figures
        for name in ("ap", "ap50", "ar100"):
            assert last[f"val/{prefix}{name}"] == pytest.approx(figures[name], rel=1e-6), (prefix, name)
    assert last["val/ap50"] > 0.5
    assert last["val/mask_ap50"] > 0.5
    assert len(list((learned / "pictures").glob("*.png"))) == 2


def task(config: Path, *overrides: str) -> Detection:
    return Detection(load_config(config, overrides))


def test_the_next_command_tests_on_a_split_that_exists(recipe: Recipe, tmp_path: Path) -> None:
    assert task(recipe("a")).next_command(tmp_path).endswith(f"--split val --out {tmp_path}/test")


def test_an_unreadable_validation_image_counts_as_missed(recipe: Recipe) -> None:
    made = task(recipe("a"))
    assert made.val_samples is not None
    sample = made.val_samples[(0, 1)]
    kept = made.tally(made.module.eval(), collate([sample]))
    assert len(kept["found"][0].boxes)
    black = torch.zeros(3, 8, 8, dtype=torch.uint8)
    broken = collate([type(sample)(black, UNREADABLE_LABEL, None, (), 1, 0.0, sample.target)])
    missed = made.tally(made.module, broken)
    assert (missed["found"][0].place, len(missed["found"][0].boxes)) == (1, 0)


def test_samples_are_functions_of_their_address(recipe: Recipe) -> None:
    made, again = task(recipe("a")), task(recipe("b"))
    for number in range(TRAIN):
        one, two = made.train_samples[(3, number)], again.train_samples[(3, number)]
        assert torch.equal(one.pixels, two.pixels)
        assert one.target is not None
        assert two.target is not None
        assert all(torch.equal(one.target[key], two.target[key]) for key in one.target)
        assert 32 <= min(one.pixels.shape[1:]) <= 64
    other = made.train_samples[(4, 0)]
    assert other.target is not None
    assert int(other.target[SEED]) != int(made.train_samples[(3, 0)].target[SEED])  # type: ignore[index]  # a target


def test_large_scale_jitter_gives_squares(recipe: Recipe) -> None:
    made = task(recipe("a"), "detection.short_sides=null", "detection.jitter=[0.1,2]")
    assert {tuple(made.train_samples[(0, number)].pixels.shape) for number in range(TRAIN)} == {(3, 80, 80)}


def test_operations_of_the_heads_are_counted(recipe: Recipe) -> None:
    made = task(recipe("a"))
    boxes = task(recipe("b"), "detection.kind=faster_rcnn")
    cascade = task(recipe("c"), "detection.kind=cascade_mask_rcnn")
    assert boxes.training_flops() < made.training_flops() < cascade.training_flops()
    found = heads_flops(made.design, [32, 64, 128, 256], (48, 80))
    module = made.module
    assert isinstance(module, vs.Detector)
    maps = {str(n): m for n, m in enumerate(module.backbone(torch.zeros(1, 3, 48, 80)))}
    fpn = count_forward_flops(module.fpn, maps)
    rpn = count_forward_flops(module.rpn.head, list(module.fpn(maps).values()))
    box_head = 2 * made.design.sampled_boxes * (16 * 49 * 32 + 32 * 32)
    assert found > fpn + rpn + box_head
    assert heads_flops(boxes.design, [32, 64, 128, 256], (48, 80)) == fpn + rpn + box_head


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.frames=4", "data.frames: detection is in images"),
        ("augment.mixup=0.8", "augment.mixup: is not for detection"),
        ("optim.label_smoothing=0.1", "optim.label_smoothing: is not for detection"),
        ("data.train_split=test", "has no annotations for the split test"),
        ("data.short_side=32", "data.short_side: is not for detection"),
        ("detection.kind=yolo", "detection.kind: invalid value 'yolo'"),
        ("detection.short_sides=[64,32]", "detection.short_sides: "),
        ("detection.short_sides=[64,100]", "detection.short_sides: [64, 100] with a longer side of 80"),
        ("detection.jitter=[0.1,2]", "detection.jitter, short_sides: each is a way"),
        ("detection.anchor_sizes=[8,16]", "detection.anchor_sizes"),
        ("model.head_dropout=0.1", "model.head_dropout"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(recipe: Recipe, override: str, message: str) -> None:
    with pytest.raises(UserError) as fault:
        task(recipe("a"), override)
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)


def test_masks_need_segmentations(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "plain" / "annotations").mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / split).symlink_to(data / split)
        path = Path("annotations", f"instances_{split}.json")
        content = json.loads((data / path).read_text())
        for item in content["annotations"]:
            del item["segmentation"]
        (tmp_path / "plain" / path).write_text(json.dumps(content))
    source = f"data.source={tmp_path / 'plain'}"
    with pytest.raises(UserError, match=r"detection\.kind: mask_rcnn needs masks"):
        task(recipe("a"), source)
    assert list(task(recipe("a"), source, "detection.kind=faster_rcnn").metrics) == ["val/ap", "val/ap50"]


def test_the_configuration_names_the_task(recipe: Recipe) -> None:
    assert task_to_train(load_config(recipe("a"))) is Detection
