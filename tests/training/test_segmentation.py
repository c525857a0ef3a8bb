"""Segmentation on real files: learning, figures of validations, exact resumption, and one process against two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import video_swinv2 as vs
from tests.training.dense_runs import check_resumed_equals_whole, finish, losses
from tests.training.runs import write_recipe
from video_swinv2.config import load_config
from video_swinv2.data.datasets import UNREADABLE_LABEL, collate
from video_swinv2.data.transforms import normalise
from video_swinv2.dense.segmenters import Segmenter
from video_swinv2.errors import UserError
from video_swinv2.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from video_swinv2.training.flops import count_forward_flops, training_flops
from video_swinv2.training.loop import run
from video_swinv2.training.metrics import read_metrics
from video_swinv2.training.tasks.choosing import task_to_pretrain, task_to_train
from video_swinv2.training.tasks.segmentation import Segmentation, heads_flops

Recipe = Callable[..., Path]
COLOURS = np.array([[200, 40, 40], [40, 180, 60], [50, 60, 220]], dtype=np.uint8)
TRAIN, VAL = 6, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noisy rectangles in three colours, of several sizes; index 9 is a border without a class.

    Rectangles consist of whole tokens of the auxiliary head, 16 x 16 pixels, since it could not learn other edges.
    """
    root = tmp_path_factory.mktemp("rectangles")
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for number in range(TRAIN + VAL):
        mask = np.zeros((40 + 4 * (number % 3), 48), dtype=np.uint8)
        for k in (1, 2):
            top, left = 16 * rng.integers(0, 3, 2)
            mask[top : top + 16, left : left + 16] = k
        noise = rng.integers(-30, 30, (*mask.shape, 3))
        pixels = np.clip(COLOURS[mask].astype(int) + noise, 0, 255).astype(np.uint8)
        mask[:2] = 9
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("ground\nbox\nhole\n")
    (root / "train.txt").write_text("".join(f"{number}\n" for number in range(TRAIN)))
    (root / "val.txt").write_text("".join(f"{number}\n" for number in range(TRAIN, TRAIN + VAL)))
    return root


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Recipe:
    def write(name: str, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "out": str(tmp_path / name),
            "init": "scratch",
            "task": "segmentation",
            "model": {"name": "swinv2_nano", "window": 4},
            "data": {"source": str(data), "image_size": [32, 40], "workers": 0},
            "segmentation": {"ignore_index": 9, "channels": 64},
            "optim": {"epochs": 4, "lr": 2e-3, "batch": 4, "micro_batch": 1, "schedule": "linear", "warmup_epochs": 1},
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
    one = finish(recipe("one", engine={"engine": "plain"}), 1)
    assert len(losses(one)) == 6
    # One process sums in another order.
    assert losses(one) == pytest.approx(losses(whole.with_suffix("")), rel=1e-4)
    figures = [[line for line in read_metrics(folder) if "val/miou" in line] for folder in (one, whole.with_suffix(""))]
    for ours, theirs in zip(*figures, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2)
    assert figures[0][0]["val/miou"] == pytest.approx(figures[1][0]["val/miou"], rel=1e-9)  # same weights


@pytest.fixture
def learned(recipe: Recipe) -> Path:
    """A run on three whole images, which are its only batch, with both heads."""
    data = {"train_split": "val", "image_size": [48, 48]}
    optim = {"epochs": 160, "batch": 3, "micro_batch": 3, "lr": 3e-3, "weight_decay": 0.0, "warmup_epochs": 10}
    segmentation = {"scale": [1, 1], "photometric": False, "max_class_share": 1.0, "channels": 128}
    changes = {"data": data, "optim": optim, "segmentation": segmentation, "augment": {"flip": 0.0}, "val_epochs": 160}
    return run(load_config(recipe("learned", engine={"engine": "plain"}, **changes)), Segmentation)


def test_one_batch_is_learned_by_heart_and_figures_are_those_of_the_model(learned: Path, data: Path) -> None:
    found = losses(learned)
    assert found[-1] < 0.05 * found[0]
    model = vs.load_model(learned)
    assert isinstance(model, Segmenter)
    assert (model.classes, model.encoder.preprocessing.image_size) == (("ground", "box", "hole"), (48, 48))
    dataset = vs.SegmentationDataset(data, "val", ignore_index=9)
    counts, total_loss = np.zeros((3, 3), dtype=np.int64), 0.0
    with torch.no_grad():
        for image, mask in (dataset[i] for i in range(VAL)):
            logits = model(normalise(image[None], IMAGENET_MEAN, IMAGENET_STD))
            answer = logits[0].argmax(0)
            for h, w in (mask != 255).nonzero().tolist():
                counts[mask[h, w], answer[h, w]] += 1
            total_loss += float(
                torch.nn.functional.cross_entropy(logits, mask[None], ignore_index=255, reduction="sum") / mask.numel()
            )
    right, true = counts.diagonal(), counts.sum(axis=1)
    last = [line for line in read_metrics(learned) if "val/miou" in line][-1]
    assert last["val/miou"] == pytest.approx(np.mean(right / (true + counts.sum(axis=0) - right)))
    assert last["val/mean_accuracy"] == pytest.approx(np.mean(right / true))
    assert last["val/pixel_accuracy"] == pytest.approx(right.sum() / true.sum())
    assert last["val/loss"] == pytest.approx(total_loss / VAL, rel=1e-4)
    assert last["val/miou"] > 0.95
    assert len(list((learned / "pictures").glob("*.png"))) == 2


def task(config: Path, *overrides: str) -> Segmentation:
    return Segmentation(load_config(config, overrides))


def test_the_loss_adds_the_auxiliary_head(recipe: Recipe) -> None:
    made = task(recipe("a"))
    batch = collate([made.train_samples[(0, number)] for number in range(2)])
    assert batch.pixels.shape == (2, 3, 32, 40)

    def forward(images: Tensor, masks: Tensor, class_weights: None) -> dict[str, Tensor]:
        assert (images.shape, masks.shape, masks.dtype) == ((2, 3, 32, 40), (2, 32, 40), torch.int64)
        return {"loss": torch.tensor(2.0), "auxiliary_loss": torch.tensor(10.0)}

    assert float(made.loss(forward, batch)) == pytest.approx(2 + 0.4 * 10)
    plain = task(recipe("b"), "segmentation.auxiliary=0")
    assert not [name for name, _ in plain.module.named_parameters() if name.startswith("auxiliary")]
    assert float(plain.loss(plain.module, batch).detach()) > 0


@torch.no_grad()
def test_rare_classes_can_weigh_more(recipe: Recipe, data: Path) -> None:
    """By their pixels in the masks of the training split; the border without a class does not count."""
    counts = torch.zeros(3)
    for name in range(TRAIN):
        mask = np.asarray(Image.open(data / "masks" / f"{name}.png"))
        counts += torch.tensor([float((mask == k).sum()) for k in range(3)])
    for name, power in (("balanced", 1.0), ("sqrt_balanced", 0.5)):
        made = task(recipe(name), f"optim.class_weights={name}")
        assert made.class_weights is not None
        assert float((made.class_weights * counts).sum() / counts.sum()) == pytest.approx(1, rel=1e-5)
        ratio = (counts[0] / counts[2]) ** power
        assert float(made.class_weights[2] / made.class_weights[0]) == pytest.approx(float(ratio), rel=1e-5)
    assert float(ratio) > 1.2
    batch = collate([made.train_samples[(0, number)] for number in range(2)])
    torch.manual_seed(0)
    weighted = made.loss(made.module.train(), batch)
    made.class_weights = None
    assert not torch.isclose(weighted, made.loss(made.module, batch), rtol=1e-3)


@torch.no_grad()
def test_an_unreadable_validation_image_counts_as_missed(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    made = task(recipe("a"))
    assert made.val_samples is not None
    sample = made.val_samples[(0, 0)]
    kept = made.tally(made.module.eval(), collate([sample]))
    assert int(kept["confusion"][:, 3].sum()) == 0
    broken = collate(
        [type(sample)(torch.zeros(3, 8, 8, dtype=torch.uint8), UNREADABLE_LABEL, None, (), 0, 0.0, sample.target)]
    )
    missed = made.tally(made.module, broken)
    assert missed["confusion"][:, :3].sum() == 0
    assert int(missed["confusion"][:, 3].sum()) == int(kept["confusion"].sum())


@torch.no_grad()
def test_the_validation_scales_images_and_not_masks(recipe: Recipe) -> None:
    made = task(recipe("a"), "data.short_side=20")
    assert made.val_samples is not None
    sample = made.val_samples[(0, 1)]
    assert sample.target is not None
    assert (sample.pixels.shape[1], min(sample.target["mask"].shape)) == (20, 44)
    assert made.tally(made.module.eval(), collate([sample]))["confusion"].sum() == 42 * 48
    assert made.module.dense_design()["short_side"] == 20  # type: ignore[operator]  # a Segmenter


def test_operations_of_backbone_and_heads_are_counted(recipe: Recipe) -> None:
    made = task(recipe("a"), "data.image_size=64", "model.window=16")
    assert isinstance(made.module, Segmenter)
    whole = count_forward_flops(made.module, torch.zeros(1, 3, 64, 64))
    encoder = training_flops(made.encoder) / 3
    auxiliary = count_forward_flops(made.module.auxiliary, made.module.backbone(torch.zeros(1, 3, 64, 64)))  # type: ignore[arg-type]
    assert heads_flops(made.module, (64, 64)) + encoder == pytest.approx(whole + auxiliary, rel=0.2)  # and log-CPB
    assert heads_flops(made.module, (64, 64)) > auxiliary


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.frames=4", "data.frames: segmentation is of images"),
        ("augment.mixup=0.8", "augment.mixup: is not for segmentation"),
        ("augment.crop_area=[0.5,1]", "augment.crop_area: is not for segmentation"),
        ("optim.label_smoothing=0.1", "optim.label_smoothing: is not for segmentation"),
        ("data.train_split=test", "has no list test.txt"),
        ("segmentation.ignore_index=255", "index 9, but the 3 classes of classes.txt end at 2"),
        ("segmentation.channels=96", "segmentation.channels: invalid value 96"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(recipe: Recipe, override: str, message: str) -> None:
    with pytest.raises(UserError) as fault:
        task(recipe("a"), override)
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)


def test_the_next_command_tests_on_a_split_that_exists(recipe: Recipe, tmp_path: Path) -> None:
    assert task(recipe("a")).next_command(tmp_path).endswith(f"--split val --out {tmp_path}/test")


def test_the_configuration_names_the_task(recipe: Recipe) -> None:
    config = load_config(recipe("a"))
    assert task_to_train(config) is Segmentation
    with pytest.raises(UserError, match="task: segmentation is for `train`"):
        task_to_pretrain(config)
    assert task_to_pretrain(load_config(recipe("b"), ["task=simmim"])) is task_to_train(
        load_config(recipe("c"), ["task=simmim"])
    )
