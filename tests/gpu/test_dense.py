"""Detectors and segmenters on the GPU beside the CPU: losses, gradients and what they find; and steps in bf16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import video_swinv2 as vs
from tests.closeness import assert_close

pytestmark = pytest.mark.gpu

# fp32 without TF32, of the largest expected value. Means of losses agree further than gradients, which are sums that
# cancel: with a scale of 100 in one head, rounding reaches 2e-3 (test_attention.py).
LOSSES, GRADIENTS = 1e-4, 5e-3
DETECTOR = {"window": 4, "head_channels": 64, "fpn_channels": 32, "mask_channels": 16, "proposals": 100,
            "anchor_sizes": (8, 16, 32, 64, 128), "short_side": 96, "max_side": 160}  # fmt: skip


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def on(device: torch.device, target: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in target.items()}


def scene() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different sizes, the second without an object."""
    masks = torch.zeros(2, 96, 128, dtype=torch.uint8)
    masks[0, 10:40, 10:50] = masks[1, 20:80, 60:120] = 1
    boxes = torch.tensor([[10.0, 10, 50, 40], [60.0, 20, 120, 80]])
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
             "masks": torch.zeros(0, 70, 100, dtype=torch.uint8)}  # fmt: skip
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}, empty]
    return [drawn(3, 96, 128), drawn(3, 70, 100)], targets


def gradients(model: nn.Module, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.stack(list(losses.values())).sum().backward()
    return {name: value.grad.cpu() for name, value in model.named_parameters() if value.grad is not None}


def compare(model: nn.Module, answers: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> None:
    """The losses and gradients of the CPU first, then those of the device."""
    (losses, expected), (found_losses, found) = answers
    assert losses.keys() == found_losses.keys()
    assert expected.keys() == found.keys()
    assert len(expected) > 50
    for name, loss in losses.items():
        assert_close(found_losses[name].cpu(), loss, LOSSES, name=name)
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        # A bias before a norm has a gradient of rounding errors only.
        scale = max(float(value.abs().max()), 1e-3 * largest)
        assert float((found[name] - value).abs().max()) <= GRADIENTS * scale, name


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn", "cascade_mask_rcnn"])
def test_a_detector_learns_and_finds_the_same_as_on_the_cpu(kind: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model = vs.create_detector("swinv2_nano", num_classes=3, kind=kind, **DETECTOR)
    images, targets = scene()
    answers, found = [], []
    for where in (torch.device("cpu"), device):
        there = copy.deepcopy(model).to(where)
        seen = [image.to(where) for image in images]
        losses = there(seen, [on(where, target) for target in targets], seeds=[1, 2])
        answers.append((losses, gradients(there, losses)))
        with torch.no_grad():
            found.append([{name: value.cpu() for name, value in each.items()} for each in there.eval()(seen)])
    compare(model, answers)
    for expected, got in zip(*found, strict=True):
        # Fresh weights give many equal scores, so that the order and the last few of a hundred may differ.
        assert abs(len(expected["scores"]) - len(got["scores"])) <= 2
        count = min(len(expected["scores"]), len(got["scores"]))
        assert_close(got["scores"][:count], expected["scores"][:count], 1e-3, name="scores")


def test_a_segmenter_learns_and_answers_the_same_as_on_the_cpu(device: torch.device) -> None:
    torch.manual_seed(0)
    model = vs.create_segmenter("swinv2_nano", num_classes=5, image_size=96, window=4, channels=64)
    images, masks = drawn(2, 3, 90, 110), (drawn(2, 90, 110) * 6).long()
    masks[masks == 5] = 255  # pixels of no class
    answers, logits = [], []
    for where in (torch.device("cpu"), device):
        there = copy.deepcopy(model).to(where)
        losses = there(images.to(where), masks.to(where))
        answers.append((losses, gradients(there, losses)))
        with torch.no_grad():
            logits.append(there.eval()(images.to(where)).cpu())
    compare(model, answers)
    assert_close(logits[1], logits[0], 1e-3, name="logits")


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_steps_in_bf16_reduce_the_loss(task: str, device: torch.device) -> None:
    """Twenty steps on one batch under autocast: no piece of the heads lacks a kernel, and the sum of losses falls."""
    torch.manual_seed(0)
    images, targets = scene()
    if task == "detection":
        model: nn.Module = vs.create_detector("swinv2_nano", num_classes=3, kind="cascade_mask_rcnn", **DETECTOR)
        batch = ([image.to(device) for image in images], [on(device, target) for target in targets])
    else:
        model = vs.create_segmenter("swinv2_nano", num_classes=5, image_size=96, window=4, channels=64)
        halves = (torch.arange(96) >= 48).long().expand(2, 96, 96)  # left and right
        batch = (drawn(2, 3, 96, 96).to(device), halves.to(device))
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sums = []
    for _ in range(20):
        with torch.autocast(device.type, torch.bfloat16):
            losses = model(*batch, seeds=[1, 2]) if task == "detection" else model(*batch)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums.append(float(loss.detach()))
    assert sums[-1] < 0.9 * sums[0], sums
