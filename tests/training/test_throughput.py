"""What a run reports about its speed: operations of a sample by formula and by counter, and advice on the loader."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import video_swinv2 as vs
from tests.training.runs import small_config
from video_swinv2.distributed.world import World
from video_swinv2.engine.optimizer import freeze_stages
from video_swinv2.models.simmim import SimMIM
from video_swinv2.training import throughput
from video_swinv2.training.flops import count_forward_flops, forward_macs, training_flops
from video_swinv2.training.throughput import loader_advice, peak_tflops


@pytest.fixture
def no_bias_networks(monkeypatch):
    """Zeros in place of the log-CPB tables: the formula leaves their networks out, the counter would count them."""

    def zeros(mlp, coordinates):
        return torch.zeros(mlp[-1].out_features, len(coordinates))

    monkeypatch.setattr("video_swinv2.models.attention.bias_table", zeros)


@pytest.mark.parametrize(
    "sizes",
    [
        {"frames": 5, "image_size": (40, 72), "window": (2, 4, 4)},  # padding in every axis
        {"image_size": 64, "window": 4},
    ],
)
@pytest.mark.parametrize("frozen", [0, 2])
def test_training_flops_are_near_the_counter(no_bias_networks, sizes, frozen):
    model = vs.create_model("swinv2_nano", num_classes=7, attention="eager", **sizes)
    freeze_stages(model, frozen)
    pixels = torch.zeros(2, 3, *([sizes["frames"]] if "frames" in sizes else []), *model.image_size)
    with FlopCounterMode(display=False) as counter:
        model(pixels).sum().backward()
    # Not exact: the first trained layer needs no gradient of its input, which the formula counts.
    assert training_flops(model, frozen_stages=frozen) == pytest.approx(counter.get_total_flops() / 2, rel=0.03)


def test_formula_and_counter_agree_to_the_operation(no_bias_networks):
    """Classifier and SimMIM; the counter sees every product, whatever the attention backend, which it restores."""
    encoder = vs.create_model("swinv2_nano", num_classes=7, image_size=64, window=4)
    assert 2 * sum(forward_macs(encoder)) == count_forward_flops(encoder, torch.zeros(1, 3, 64, 64))
    masked, mask = SimMIM(encoder, 16), torch.zeros(1, 4, 4, dtype=torch.bool)
    counted = count_forward_flops(masked, torch.zeros(1, 3, 64, 64), mask)
    assert 2 * sum(forward_macs(encoder, pretraining=True)) == counted
    assert {block.attn.attention for block in encoder.blocks()} == {"auto"}


def test_advice_for_a_loader_that_starves_the_device(monkeypatch):
    monkeypatch.setattr(throughput, "usable_cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert loader_advice(small_config(workers=2), 0.1, (0.5, "a.mp4")) is None
    text = loader_advice(small_config(workers=2), 0.43, (0.5, "a.mp4"))
    assert "43% of the time" in text
    assert "raise data.workers from 2 (8 cores here); slowest file: 0.50 s a.mp4" in text
    assert "8 workers keep all 8 cores busy" in loader_advice(small_config(workers=4), 0.43, (0.5, "a.mp4"))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("A100-SXM4-40GB", 312.0),  # drivers before 2021
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("Tesla V100-PCIE-16GB", 112.0),
        ("Tesla T4", 65.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),  # a seventh of the device
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe 2", None),
    ],
)
def test_the_peak_is_that_of_the_product_and_of_no_other(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu, cpu = (World(0, 1, 0, torch.device(kind)) for kind in ("cuda", "cpu"))
    assert peak_tflops(gpu, "bf16") == peak
    assert peak_tflops(gpu, "fp32") is None
    assert peak_tflops(cpu, "bf16") is None
