"""The benchmarks of model and layer at small sizes: every figure is there and printed. No test depends on a time."""

import json
import re

import pytest
import torch

from tests.weights.released import randomise
from video_swinv2.bench.layer import bench_layer, layer_table
from video_swinv2.bench.model import bench_model, model_table
from video_swinv2.bench.peers import build_image_encoder, build_side, compare_on_masked_images
from video_swinv2.errors import UsageError


def test_both_models_are_timed_and_their_memory_measured():
    result = bench_model(
        "swinv2_tiny", rounds=2, threads=1, device="cpu", frames=2, pixels=32, precisions=("fp32", "bf16")
    )
    assert [(race["what"], race["precision"], len(race["ours"]), len(race["peer"])) for race in result["races"]] == [
        ("forward", "fp32", 2, 2),
        ("training step", "fp32", 2, 2),
        ("forward", "bf16", 2, 2),
        ("training step", "bf16", 2, 2),
    ]
    assert all(seconds > 0 for race in result["races"] for seconds in (*race["ours"], *race["peer"], race["ratio"]))
    # The gradients of 28 million weights alone take 100 MiB, in both models.
    assert all(100 * 2**20 < peak < 2 * 2**30 for peaks in result["peak_bytes"].values() for peak in peaks.values())
    assert all(0 < race["share_of_floor"] < 1 for race in result["races"])
    assert all(sum(race["where_time_goes"].values()) == pytest.approx(1) for race in result["races"])
    text = model_table(result)
    assert "against torchvision swin3d_t: [1, 3, 2, 32, 32]" in text
    assert f"{result['races'][0]['ratio']:.2f}" in text
    json.dumps(result)


def test_simmim_is_compared_with_timms_encoder():
    result = bench_model("swinv2_nano", against="timm", rounds=1, threads=1, device="cpu", batch=2, pixels=64)
    assert [(race["what"], race["precision"], len(race["ours"]), len(race["peer"])) for race in result["races"]] == [
        ("training step", "fp32", 1, 1)  # no bf16, as conftest.py forbids the units for it
    ]
    # The gradients of 2.4 million weights and of the head's 800,000 take 12 MiB.
    assert all(12 * 2**20 < peak < 2**30 for peak in result["peak_bytes"]["fp32"].values())
    assert "against timm SwinTransformerV2 (as swinv2_nano_window12_64): [2, 3, 64, 64]" in model_table(result)
    json.dumps(result)


def test_both_encoders_compute_the_same_function():
    """With the same weights in timm's encoder and in ours, loss and gradients agree, so both do the same work."""
    # 96 pixels give whole windows: timm attends to padding, we do not.
    comparison = compare_on_masked_images("swinv2_nano", batch=2, pixels=96)
    ours, peer = (build_side(comparison, kind).eval() for kind in ("ours", "peer"))
    randomise(ours)
    renamed = {}
    for name, value in ours.state_dict().items():
        name = re.sub(
            r"encoder\.layers\.(\d)\.downsample", lambda m: f"encoder.layers.{int(m[1]) + 1}.downsample", name
        )
        renamed[re.sub(r"^simmim\.encoder\.(?!mask_token)", "simmim.encoder.model.", name)] = value
    missing, unexpected = peer.load_state_dict(renamed, strict=False)
    assert all(name.endswith(("k_bias", "relative_coords_table", "relative_position_index")) for name in missing)
    assert not unexpected
    x = torch.randn(comparison.shape)
    losses = [model(x) for model in (ours, peer)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    mine, theirs = (dict(model.named_parameters()) for model in (ours, peer))
    for name in (
        "patch_embed.proj.weight",
        "layers.3.blocks.1.attn.qkv.weight",
        "layers.0.blocks.1.attn.cpb_mlp.0.bias",
    ):
        expected = theirs[f"simmim.encoder.model.{name}"].grad
        torch.testing.assert_close(mine[f"simmim.encoder.{name}"].grad, expected, rtol=1e-3, atol=1e-6)


def test_the_peer_of_base_is_timms_released_model():
    import timm

    comparison = compare_on_masked_images("swinv2_base", batch=1, pixels=None)
    with torch.device("meta"):
        peer = build_image_encoder("peer", comparison.name, comparison.shape[-1]).model
        released = timm.create_model("swinv2_base_window12_192", pretrained=False, num_classes=0)
    assert {n: p.shape for n, p in peer.named_parameters()} == {n: p.shape for n, p in released.named_parameters()}
    rates = [
        [b.drop_path1.drop_prob for s in m.layers for b in s.blocks if hasattr(b.drop_path1, "drop_prob")]
        for m in (peer, released)
    ]
    assert rates[0] == rates[1]


def test_every_backend_has_a_row():
    rows = bench_layer("swinv2_tiny", rounds=1, threads=1, device="cpu", cases=[(32, (8, 4, 4))])
    assert [(row["backend"], row["gradients"]) for row in rows] == [
        (backend, gradients) for backend in ("eager", "sdpa", "flex", "sequential") for gradients in (False, True)
    ]
    assert [row["backend"] for row in rows if "not_run" in row] == ["flex", "flex"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows if "not_run" not in row)
    assert layer_table(rows).count("8, 4, 4") == 8


def test_sizes_without_a_peer_are_refused():
    with pytest.raises(UsageError, match="swinv2_giant: torchvision has no model of this size"):
        bench_model("swinv2_giant", rounds=1, threads=1, device="cpu")
    with pytest.raises(UsageError, match="timm's SwinV2 has no extra norms"):
        bench_model("swinv2_huge", against="timm", rounds=1, threads=1, device="cpu")
    with pytest.raises(UsageError, match="did you mean 'swinv2_base'"):
        bench_model("swinv2_bas", against="timm", rounds=1, threads=1, device="cpu")
