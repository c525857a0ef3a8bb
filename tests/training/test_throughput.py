"""What a run says of its speed: the work of a sample against counted products, and the verdict on a loader."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import video_swinv2 as vs
from video_swinv2.config import check
from video_swinv2.engine.optimizer import freeze
from video_swinv2.models.simmim import SimMIM
from video_swinv2.training import throughput as speed
from video_swinv2.training.throughput import forward_macs, training_flops, verdict


def without_bias_networks(model):
    """The log-CPB networks run once a batch and do not count: zeros in their tables' place."""
    for block in model.blocks():
        heads = block.attn.logit_scale.numel()
        block.attn._table = lambda window, norm, device, heads=heads: torch.zeros(
            heads, math.prod(2 * side - 1 for side in window)
        )
    return model


@pytest.mark.parametrize(
    "sizes",
    [
        {"frames": 5, "image_size": (40, 72), "window": (2, 4, 4)},  # padding in every axis
        {"image_size": 64, "window": 4},
    ],
)
@pytest.mark.parametrize("frozen", [0, 2])
def test_the_work_of_a_sample_is_that_of_its_products(sizes, frozen):
    model = without_bias_networks(vs.create_model("swinv2_nano", num_classes=7, attention="eager", **sizes))
    freeze(model, frozen)
    pixels = torch.zeros(2, 3, *([sizes["frames"]] if "frames" in sizes else []), *model.image_size)
    with FlopCounterMode(display=False) as counter:
        model(pixels).sum().backward()
    # The first block above frozen stages has no gradient of its input to compute, nor has the patch embedding.
    assert training_flops(model, frozen_stages=frozen) == pytest.approx(counter.get_total_flops() / 2, rel=0.03)


def test_forward_work_is_exact_and_simmims_too():
    encoder = without_bias_networks(vs.create_model("swinv2_nano", num_classes=0, image_size=64, window=4))
    for block in encoder.blocks():
        block.attn.attention = "eager"
    masked = SimMIM(encoder, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        masked(torch.zeros(1, 3, 64, 64), torch.zeros(1, 4, 4, dtype=torch.bool))
    assert 2 * sum(forward_macs(encoder, pretraining=True)) == counter.get_total_flops()


def config(workers):
    values = {
        "out": "x",
        "init": "scratch",
        "model": {"name": "swinv2_nano"},
        "data": {"source": "x", "image_size": 64, "workers": workers},
        "optim": {"epochs": 1, "lr": 1e-3, "batch": 2, "micro_batch": 2},
    }
    return check(values, "x.yaml")


def test_a_starved_device_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(speed, "cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert verdict(config(2), 0.1, (0.5, "a.mp4")) is None
    text = verdict(config(2), 0.43, (0.5, "a.mp4"))
    assert "43% of the time" in text
    assert "raise data.workers from 2 (8 cores here); slowest file: 0.50 s a.mp4" in text
    assert "8 workers keep all 8 cores busy" in verdict(config(4), 0.43, (0.5, "a.mp4"))
