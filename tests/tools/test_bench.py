"""The benchmarks at small sizes: every figure is measured, and what they print holds it. No clock decides anything."""

import json

import pytest

from video_swinv2.errors import UsageError
from video_swinv2.tools.bench import bench_layer, bench_model, show_layer, show_model


def test_both_models_are_raced_and_weighed():
    result = bench_model("swinv2_tiny", rounds=2, threads=1, device="cpu", frames=2, pixels=32)
    assert [(race["what"], len(race["ours"]), len(race["peer"])) for race in result["races"]] == [
        ("forward", 2, 2),
        ("training step", 2, 2),
    ]
    assert all(seconds > 0 for race in result["races"] for seconds in (*race["ours"], *race["peer"], race["ratio"]))
    # Gradients of 28 million weights alone are 100 MiB, and both models have to make them.
    assert all(100 * 2**20 < peak < 2 * 2**30 for peak in result["peak_bytes"].values())
    assert all(0 < share < 1 for share in result["share_of_floor"].values())
    assert all(sum(shares.values()) == pytest.approx(1) for shares in result["where_time_goes"].values())
    text = show_model(result)
    assert "torchvision swin3d_t: [1, 3, 2, 32, 32]" in text
    assert f"{result['races'][0]['ratio']:.2f}" in text
    json.dumps(result)


def test_every_backend_has_its_row():
    rows = bench_layer("swinv2_tiny", rounds=1, threads=1, device="cpu", cases=[(32, (8, 4, 4))])
    assert [(row["backend"], row["gradients"]) for row in rows] == [
        (backend, gradients) for backend in ("eager", "sdpa", "flex", "sequential") for gradients in (False, True)
    ]
    assert [row["backend"] for row in rows if "not_run" in row] == ["flex", "flex"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows if "not_run" not in row)
    assert show_layer(rows).count("8, 4, 4") == 8


def test_a_size_that_torchvision_lacks_is_refused():
    with pytest.raises(UsageError, match="swinv2_giant: torchvision has no such size"):
        bench_model("swinv2_giant", rounds=1, threads=1, device="cpu")
