"""The choice of device and precision, on machines with and without GPUs as PyTorch would report them."""

from __future__ import annotations

import pytest
import torch

from video_swinv2.distributed.devices import (
    AUTOCAST_DTYPES,
    choose_device,
    computing_precision,
    product_dtype,
    report_missing_bf16,
    use_bf16,
)
from video_swinv2.distributed.launchers import LaunchInfo
from video_swinv2.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int, bf16: str = "native") -> None:
    """Let PyTorch report GPUs whose bf16 is native, emulated or absent."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: bf16 == "native" or (including_emulation and bf16 == "emulated"),
    )


def test_without_gpus_auto_is_the_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(UsageError, match="device: cuda was requested but PyTorch sees no GPU"):
        choose_device("cuda")


def test_each_process_gets_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 4)
    assert choose_device("cpu") == CPU
    assert choose_device("auto") == CUDA
    assert choose_device("auto", LaunchInfo(6, 8, 2, "env://")) == torch.device("cuda", 2)
    with pytest.raises(UsageError, match="local rank 4 has no GPU, this machine has 4"):
        choose_device("auto", LaunchInfo(4, 8, 4, "env://"))


def test_only_srun_may_show_each_process_a_single_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 1)
    assert choose_device("auto", LaunchInfo(1, 2, 1, "tcp://a:1", from_slurm=True)) == torch.device("cuda", 0)
    with pytest.raises(UsageError, match="local rank 1 has no GPU"):
        choose_device("auto", LaunchInfo(1, 2, 1, "env://"))


@pytest.mark.parametrize(
    ("bf16", "trained", "tested"), [("native", "bf16", True), ("emulated", "fp32", False), ("absent", "fp32", False)]
)
def test_precision_depends_on_what_the_gpu_can_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bf16: str, trained: str, tested: bool
) -> None:
    """bf16 needs a GPU that computes in it, in training and in a test, whether asked for or chosen."""
    pretend_gpus(monkeypatch, 1, bf16)
    assert computing_precision("bf16", CUDA) == trained
    assert computing_precision("fp16", CUDA) == "fp16"
    assert computing_precision("bf16", CPU) == "bf16"
    assert use_bf16("auto", CUDA) is use_bf16("bf16", CUDA) is tested
    report_missing_bf16("auto", CUDA)
    assert capsys.readouterr().err == ""
    report_missing_bf16("bf16", CUDA)
    assert ("this GPU has no bf16, so fp32 is used" in capsys.readouterr().err) is not tested
    assert use_bf16("bf16", CPU)
    assert not use_bf16("fp32", CUDA)


@pytest.mark.parametrize(
    ("amx", "limit", "expected"),
    [
        (True, None, "bf16"),
        (True, "default", "bf16"),
        (True, "avx512_core_amx", "bf16"),
        (True, "AVX512_CORE_BF16", "fp32"),
        (False, None, "fp32"),
        (False, "ALL", "fp32"),
    ],
)
def test_auto_is_bf16_on_cpus_whose_products_use_amx(
    monkeypatch: pytest.MonkeyPatch, amx: bool, limit: str | None, expected: str
) -> None:
    """In training and in a test. What is asked for by name is done on every CPU."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert computing_precision("auto", CPU) == expected
    assert use_bf16("auto", CPU) is (expected == "bf16")
    assert [computing_precision(name, CPU) for name in ("bf16", "fp16", "fp32")] == ["bf16", "fp16", "fp32"]
    assert product_dtype("auto", CPU) == product_dtype("bf16", CPU) == AUTOCAST_DTYPES.get(expected, torch.float32)


def test_tests_do_not_depend_on_amx() -> None:
    """conftest.py forbids it to this process and those it starts, so that `auto` is fp32 on every CPU."""
    assert computing_precision("auto", CPU) == "fp32"


def test_products_are_measured_in_the_precision_asked_for_on_gpus() -> None:
    assert [product_dtype(name, CUDA) for name in ("bf16", "fp16", "fp32")] == [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]
