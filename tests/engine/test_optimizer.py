"""Groups, decay and schedules against tables worked out by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from video_swinv2.engine.optimizer import (
    Schedule,
    build_optimizer,
    parameter_groups,
    write_hyperparameters,
)
from video_swinv2.errors import UsageError, UserError
from video_swinv2.models.parameters import decays, layer_id
from video_swinv2.models.variants import create_model

TINY = (2, 2, 6, 2)
SMALL = (2, 2, 18, 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("patch_embed.proj.weight", 0),
        ("patch_embed.norm.bias", 0),
        ("mask_token", 0),
        ("encoder.mask_token", 0),
        ("layers.0.blocks.0.attn.qkv.weight", 1),
        ("encoder.layers.0.blocks.1.norm2.weight", 2),
        ("layers.0.downsample.reduction.weight", 2),
        ("layers.1.blocks.0.mlp.fc1.weight", 3),
        ("layers.1.downsample.norm.weight", 4),
        ("layers.2.blocks.0.attn.logit_scale", 5),
        ("layers.2.blocks.17.enorm.weight", 22),
        ("layers.2.downsample.reduction.weight", 22),
        ("layers.3.blocks.0.attn.proj.weight", 23),
        ("layers.3.blocks.1.attn.cpb_mlp.0.weight", 24),
        ("norm.weight", 25),
        ("encoder.norm.bias", 25),
        ("head.weight", 25),
        ("decoder.0.weight", 25),
        ("backbone.encoder.patch_embed.norm.bias", 0),
        ("backbone.encoder.layers.2.downsample.reduction.weight", 22),
        ("backbone.norm0.weight", 25),
    ],
)
def test_layer_ids_of_small(name: str, expected: int) -> None:
    assert layer_id(name, SMALL) == expected


@pytest.mark.parametrize(
    "name", ["layers.4.blocks.0.norm1.weight", "layers.0.blocks.2.norm1.weight", "layers.4.downsample.norm.bias"]
)
def test_a_block_beyond_the_depths_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(name)):
        layer_id(name, TINY)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.0.blocks.0.attn.qkv.weight", (9, 3), True),
        ("layers.0.blocks.0.attn.q_bias", (3,), False),
        ("layers.0.blocks.0.attn.logit_scale", (3, 1, 1), False),
        ("encoder.layers.0.blocks.0.attn.logit_scale", (3, 1, 1), False),
        ("encoder.layers.0.blocks.0.attn.cpb_mlp.0.weight", (512, 2), False),
        ("layers.0.blocks.0.attn.cpb_mlp.2.weight", (3, 512), False),
        ("layers.0.blocks.0.norm1.weight", (3,), False),
        ("encoder.mask_token", (1, 1, 3), False),
        ("patch_embed.proj.weight", (3, 3, 4, 4), True),
        ("decoder.0.weight", (9, 3, 1, 1), True),
        ("decoder.0.bias", (9,), False),
    ],
)
def test_what_decays(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert decays(name, torch.zeros(shape)) is expected


def test_layer_decay_of_a_24_layer_model() -> None:
    module = create_model("swinv2_small", num_classes=2)
    groups = {group["name"]: group for group in parameter_groups(module, SMALL, weight_decay=0.05, layer_decay=0.75)}
    assert len(groups) == 52
    assert groups["layer_00_decay"]["lr_scale"] == pytest.approx(0.75**25)
    assert groups["layer_00_decay"]["lr_scale"] == pytest.approx(7.53e-4, rel=1e-3)
    assert groups["layer_24_decay"]["lr_scale"] == 0.75
    assert groups["layer_25_decay"]["lr_scale"] == 1.0
    assert groups["layer_25_decay"]["parameter_names"] == ["head.weight"]
    assert groups["layer_00_decay"]["parameter_names"] == ["patch_embed.proj.weight"]
    assert groups["layer_03_decay"]["weight_decay"] == 0.05
    assert groups["layer_03_no_decay"]["weight_decay"] == 0.0


def test_every_parameter_is_in_one_group_and_tiny_has_48_undecayed_of_attention() -> None:
    module = create_model("swinv2_tiny", num_classes=2)
    groups = parameter_groups(module, module.depths, weight_decay=0.05)
    assert [group["name"] for group in groups] == ["all_layers_decay", "all_layers_no_decay"]
    names = [name for group in groups for name in group["parameter_names"]]
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())
    named = dict(module.named_parameters())
    for group in groups:
        assert all(parameter is named[name] for parameter, name in zip(*_columns(group), strict=True))
    undecayed = [name for name in groups[1]["parameter_names"] if "cpb_mlp" in name or "logit_scale" in name]
    assert len(undecayed) == 48


def _columns(group: dict[str, Any]) -> tuple[list[nn.Parameter], list[str]]:
    return group["params"], group["parameter_names"]


def test_frozen_parameters_are_in_no_group_and_a_frozen_model_is_refused() -> None:
    module = create_model("swinv2_nano", num_classes=2)
    module.patch_embed.requires_grad_(False)
    groups = parameter_groups(module, module.depths, weight_decay=0.05, layer_decay=0.5)
    assert groups[0]["name"] == "layer_01_decay"
    module.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter is left to train"):
        parameter_groups(module, module.depths, weight_decay=0.05)


@pytest.mark.parametrize("layer_decay", [0.0, -1.0, 1.5, math.nan])
def test_an_invalid_layer_decay_is_refused(layer_decay: float) -> None:
    with pytest.raises(UsageError, match="layer_decay"):
        parameter_groups(nn.Linear(2, 2), TINY, weight_decay=0.0, layer_decay=layer_decay)


def test_the_head_of_a_dense_model_is_all_but_its_encoder() -> None:
    module = nn.Module()
    module.backbone = nn.Module()
    module.backbone.encoder = create_model("swinv2_nano", features_only=True)
    module.backbone.norm0 = nn.LayerNorm(8)
    module.classifier = nn.Conv2d(8, 2, 1)
    groups = parameter_groups(module, (2, 2, 2, 2), weight_decay=0.1, backbone_lr=0.1)
    scales = {name: group["lr_scale"] for group in groups for name in group["parameter_names"]}
    assert {name for name, scale in scales.items() if scale == 1.0} == {
        "backbone.norm0.weight",
        "backbone.norm0.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert scales["backbone.encoder.layers.0.blocks.0.norm1.bias"] == 0.1


def test_linear_falls_in_equal_steps_after_the_warm_up() -> None:
    schedule = Schedule(lr=1.0, steps=12, warmup_steps=2, min_lr=0.5, kind="linear")
    assert [schedule.lr_at(step) for step in range(14)] == pytest.approx(
        [0, 0.5, 1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.5]
    )


def test_cosine_with_warm_up() -> None:
    schedule = Schedule(lr=1.0, steps=12, warmup_steps=4, min_lr=0.2, warmup_lr=0.1)
    expected = {
        0: 0.1,
        1: 0.325,
        2: 0.55,
        3: 0.775,
        4: 1.0,
        6: 0.2 + 0.4 * (1 + math.sqrt(0.5)),
        8: 0.6,
        12: 0.2,
        99: 0.2,
    }
    assert {step: schedule.lr_at(step) for step in expected} == pytest.approx(expected)
    rates = [schedule.lr_at(step) for step in range(4, 13)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("warmup_lr", [0.0, 1e-4])
def test_the_cosine_schedule_is_timms(warmup_lr: float) -> None:
    """In every step: the first, which with warmup_lr 0 changes nothing, the last, and those after it."""
    parameter = nn.Parameter(torch.zeros(1))
    theirs = CosineLRScheduler(
        torch.optim.SGD([parameter], lr=1e-3),
        t_initial=40,
        lr_min=1e-5,
        warmup_t=8,
        warmup_lr_init=warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    ours = Schedule(lr=1e-3, steps=48, warmup_steps=8, min_lr=1e-5, warmup_lr=warmup_lr)
    rates = [ours.lr_at(step) for step in range(50)]
    assert rates == pytest.approx([theirs._get_lr(step)[0] for step in range(50)])
    assert (rates[0], rates[8]) == pytest.approx((warmup_lr, 1e-3))
    assert rates[47] == pytest.approx(1e-5 + 0.99e-3 * 0.00154, rel=1e-3)
    assert rates[48] == 1e-5


def test_the_cosine_schedule_is_torchs() -> None:
    """LinearLR, which cannot start at 0, and CosineAnnealingLR after it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=8)
    theirs = SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, T_max=40, eta_min=1e-5)], milestones=[8])
    ours = Schedule(lr=1e-3, steps=48, warmup_steps=8, min_lr=1e-5, warmup_lr=1e-4)
    for step in range(48):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(ours.lr_at(step)), step
        optimizer.step()
        theirs.step()


def test_multistep_drops_from_the_milestone_on() -> None:
    schedule = Schedule(lr=1.0, steps=10, warmup_steps=2, min_lr=0.005, kind="multistep", milestones=(5, 8, 9))
    expected = [0.0, 0.5, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.01, 0.005]
    assert [schedule.lr_at(step) for step in range(10)] == pytest.approx(expected)


def test_a_run_that_is_all_warm_up_ends_at_its_last_step() -> None:
    schedule = Schedule(lr=1.0, steps=4, warmup_steps=4)
    assert [schedule.lr_at(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 0.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "poly"}, "optim.schedule: unknown schedule 'poly'"),
        ({"steps": 0}, "do not fit"),
        ({"warmup_steps": 11}, "11 warm-up steps do not fit into 10 steps"),
        ({"lr": -1.0}, "negative"),
        ({"kind": "multistep", "milestones": (5, 5)}, "milestones"),
        ({"milestones": (5,)}, "only used by a multistep schedule"),
    ],
)
def test_invalid_schedules_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Schedule(**{"lr": 1.0, "steps": 10, "warmup_steps": 1, **values})


def test_hyperparameters_overwrite_what_the_optimizer_holds() -> None:
    module = create_model("swinv2_nano", num_classes=2)
    groups = parameter_groups(module, module.depths, weight_decay=0.05, layer_decay=0.5)
    optimizer = build_optimizer(groups, betas=(0.9, 0.98), eps=1e-6, device=torch.device("cpu"))
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    for group in optimizer.param_groups:
        group["weight_decay"] = 9.0
    write_hyperparameters(optimizer, 0.4)
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert by_name["layer_08_decay"]["lr"] == pytest.approx(0.2)
    assert by_name["layer_08_decay"]["weight_decay"] == 0.05
    assert by_name["layer_08_no_decay"]["weight_decay"] == 0.0
    assert by_name["layer_00_decay"]["lr"] == pytest.approx(0.4 * 0.5**9)
    assert by_name["layer_00_decay"]["betas"] == (0.9, 0.98)
