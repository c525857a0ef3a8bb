"""The choice of device and precision, on machines with and without GPUs as PyTorch would report them."""

from __future__ import annotations

import pytest
import torch

from video_swinv2.distributed.devices import (
    choose_device,
    product_dtype,
    report_missing_bf16,
    trainable_precision,
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
    assert trainable_precision("bf16", CUDA) == trained
    assert trainable_precision("fp16", CUDA) == "fp16"
    assert trainable_precision("bf16", CPU) == "bf16"
    assert use_bf16("auto", CUDA) is use_bf16("bf16", CUDA) is tested
    report_missing_bf16("auto", CUDA)
    assert capsys.readouterr().err == ""
    report_missing_bf16("bf16", CUDA)
    assert ("this GPU has no bf16, so fp32 is used" in capsys.readouterr().err) is not tested
    assert not use_bf16("auto", CPU)
    assert use_bf16("bf16", CPU)
    assert not use_bf16("fp32", CUDA)


def test_products_are_measured_in_fp32_on_cpus() -> None:
    assert product_dtype("bf16", CPU) == torch.float32
    assert [product_dtype(name, CUDA) for name in ("bf16", "fp16", "fp32")] == [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]
