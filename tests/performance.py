"""Measures speed beside other libraries, and makes docs/performance.md from what was measured.

    python -m tests.performance measure --data PREPARED --raw RAW [NAME ...]    all benchmarks, or those named
    python -m tests.performance page                                            the page and the README, from kept JSON

`measure` runs the commands that the page shows, and keeps the JSON that each prints, with the machine and the commit,
in docs/results/performance. PREPARED is a data set as `data_prep prepare` writes it, of ten-second clips, and RAW a
folder of videos as they come. It takes an hour on a quiet core. `page` only reads the JSON; a test
does the same, and fails if the page says something else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import video_swinv2 as vs
from tests.markers import put_between
from video_swinv2.bench.layer import layer_table
from video_swinv2.bench.loader import loader_table
from video_swinv2.bench.measuring import table_text
from video_swinv2.bench.model import model_table
from video_swinv2.bench.preparation import preparation_table
from video_swinv2.bench.scale import scale_table
from video_swinv2.bench.testing import DECODE_PER_VIEW, SEEK_PER_VIEW, bench_test_table

REPOSITORY = Path(__file__).resolve().parents[1]
KEPT = REPOSITORY / "docs" / "results" / "performance"
PAGE, README = REPOSITORY / "docs" / "performance.md", REPOSITORY / "README.md"


@dataclass(frozen=True)
class Benchmark:
    """A command of the page. In `arguments`, {data}, {raw} and {model} stand for what `measure` is given or makes."""

    title: str
    arguments: str
    table: Callable[[Any], str]


BENCHMARKS = {
    "model": Benchmark("Clips, beside torchvision's Video Swin", "model --against torchvision", model_table),
    "simmim": Benchmark(
        "SimMIM on images, beside timm's SwinV2", "model --against timm --batch 8 --rounds 3", model_table
    ),
    "backends": Benchmark("Attention backends: one layer", "model --against backends --rounds 3", layer_table),
    **{
        f"loader-{name}": Benchmark(
            f"Reading, beside {peer}",
            f"loader --data {{{source}}} --against {name.split('-')[0]} --batch 4 --clips 22 --rounds 3 {options}",
            loader_table,
        )
        for name, peer, source, options in (
            ("torchcodec", "torchcodec", "data", "--workers 0,1,2"),
            ("torchcodec-resized", "torchcodec, with resizing", "data", "--workers 0 --short-side 256"),
            ("torchcodec-raw", "torchcodec, of videos as they come", "raw", "--workers 0 --short-side 256"),
            ("decord", "decord", "data", "--workers 0,1,2"),
            ("videomae", "VideoMAE's loader", "data", "--workers 0,2"),
            ("pytorchvideo", "pytorchvideo", "data", "--workers 0,2"),
        )
    },
    "testing-4x3": Benchmark(
        "Testing: 4 clips x 3 crops",
        "test --model {model} --data {data} --split train --clips 8 --batch 48 --protocol videoswin-4x3",
        bench_test_table,
    ),
    "testing-three": Benchmark(
        "Testing: three protocols at once",
        "test --model {model} --data {data} --split train --clips 8 --batch 48 --rounds 3 "
        "--protocol videoswin-4x3,slowfast-10x3,videomae-5x3",
        bench_test_table,
    ),
    "prepare": Benchmark(
        "Preparation, beside the ffmpeg program", "prepare --data {raw} --clips 22 --rounds 3", preparation_table
    ),
    "scale": Benchmark("How costs grow", "scale --rounds 2 --part model reading processes", scale_table),
    "lists": Benchmark(
        "Lists of up to ten million videos", "scale --part lists --rows 10000,100000,1000000,10000000", scale_table
    ),
}


@dataclass(frozen=True)
class Headline:
    """A ratio at the top of the page: how to find it in the JSON of a benchmark, and what it should be at least."""

    what: str
    benchmark: str
    find: Callable[[Any], float]
    aim: float


def _race(what: str, precision: str) -> Callable[[Any], float]:
    def find(result: Any) -> float:
        return float(next(r["ratio"] for r in result["races"] if (r["what"], r["precision"]) == (what, precision)))

    return find


def _memory(precision: str) -> Callable[[Any], float]:
    return lambda result: result["peak_bytes"][precision]["peer"] / result["peak_bytes"][precision]["ours"]


def _reading(result: Any) -> float:
    return float(next(row["ratio"] for row in result["rows"] if row["workers"] == 0))


def _seek(result: Any) -> float:
    return float(result["times_as_fast"][SEEK_PER_VIEW])


def _same_files(result: Any) -> float:
    return float(next(iter(result["throughput"].values())))


HEADLINES = (
    Headline("forward, fp32, beside `swin3d_t`", "model", _race("forward", "fp32"), 2.2),
    Headline("forward, bf16, beside `swin3d_t`", "model", _race("forward", "bf16"), 5.0),
    Headline("training step, fp32, beside `swin3d_t`", "model", _race("training step", "fp32"), 1.5),
    Headline("training step, bf16, beside `swin3d_t`", "model", _race("training step", "bf16"), 2.0),
    Headline("memory of a training step, fp32: its over ours", "model", _memory("fp32"), 1 / 0.6),
    Headline("memory of a training step, bf16: its over ours", "model", _memory("bf16"), 1 / 0.6),
    Headline("SimMIM step, fp32, beside timm", "simmim", _race("training step", "fp32"), 1.3),
    Headline("SimMIM step, bf16, beside timm", "simmim", _race("training step", "bf16"), 1.6),
    Headline("reading, beside bare torchcodec", "loader-torchcodec", _reading, 1.0),
    Headline("reading with resizing, beside torchcodec", "loader-torchcodec-resized", _reading, 1.0),
    Headline("reading videos as they come, beside torchcodec", "loader-torchcodec-raw", _reading, 1.0),
    Headline("reading, beside bare decord", "loader-decord", _reading, 1.0),
    Headline("reading, beside decord as VideoMAE uses it", "loader-videomae", _reading, 1.5),
    Headline("reading, beside pytorchvideo's `LabeledVideoDataset`", "loader-pytorchvideo", _reading, 3.0),
    Headline("testing, 4 x 3 views, beside a seek per view", "testing-4x3", _seek, 4.0),
    Headline("testing, three protocols, beside a seek per view", "testing-three", _seek, 6.0),
    Headline("preparation, beside ffmpeg writing the same files", "prepare", _same_files, 1.0),
)


def machine_facts() -> dict[str, Any]:
    """What the figures were measured with."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = facts.get("flags", "").split()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=REPOSITORY, check=False
    ).stdout.strip()
    return {
        "cpu": facts.get("model name", platform.processor()),
        "instructions": [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in flags],
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    }


def write_model(folder: Path) -> Path:
    """A model that costs little beside reading: fresh weights, because speed does not depend on them."""
    torch.manual_seed(0)
    model = vs.create_model("swinv2_nano", num_classes=400, frames=8, image_size=64, patch_size=(2, 16, 16), window=4)
    model.preprocessing = vs.Preprocessing(frames=8, frame_stride=4, image_size=(64, 64))
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def measure(names: Sequence[str], data: Path | None, raw: Path | None) -> None:
    """Run benchmarks one by one and keep what they print. Raises SystemExit if one fails or lacks its input."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        model = write_model(Path(temporary))
        for name in names:
            arguments = BENCHMARKS[name].arguments
            for key, value in (("data", data), ("raw", raw)):
                if f"{{{key}}}" in arguments and value is None:
                    raise SystemExit(f"{name}: needs --{key}")
            print(f"{name}: video-swinv2 bench {arguments}", flush=True)
            facts = machine_facts()
            command = ["bench", *arguments.format(data=data, raw=raw, model=model).split(), "--json"]
            command = [sys.executable, "-m", "video_swinv2", *command]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: ended with {done.returncode}")
            kept = {"machine": facts, "result": _without_paths(json.loads(done.stdout), data, raw, model)}
            (KEPT / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _without_paths(found: Any, *paths: Path | None) -> Any:
    """The same with the names of the folders of this machine replaced by the last part of each."""
    text = json.dumps(found)
    for path in paths:
        if path is not None:
            text = text.replace(str(path), path.name)
    return json.loads(text)


def kept_results() -> dict[str, Any]:
    """What is kept, by the name of the benchmark: machine and result."""
    files = {name: KEPT / f"{name}.json" for name in BENCHMARKS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def tables(kept: dict[str, Any]) -> str:
    """What is between the markers of the page."""
    parts = [_headline_table(kept)]
    for name, benchmark in BENCHMARKS.items():
        if name not in kept:
            parts.append(f"### {benchmark.title}\n\nNot measured yet: `{_shown(benchmark)}`.")
            continue
        machine = kept[name]["machine"]
        about = (
            f"{machine['date']}, commit {machine['commit']}, {machine['cpu']}, {machine['cores']} cores "
            f"({', '.join(machine['instructions']) or 'no AVX-512'}), load {machine['load']} before it, "
            f"torch {machine['torch']}"
        )
        table = benchmark.table(kept[name]["result"])
        parts.append(f"### {benchmark.title}\n\n`{_shown(benchmark)}`\n\n```text\n{table}\n```\n\n{about}.")
    return "\n\n".join(parts)


def _shown(benchmark: Benchmark) -> str:
    return f"video-swinv2 bench {benchmark.arguments.format(data='DATA', raw='RAW', model='MODEL')}"


def _headline_table(kept: dict[str, Any]) -> str:
    rows = []
    for line in HEADLINES:
        if line.benchmark not in kept:
            rows.append([line.what, "not measured", f"{line.aim:.3g}", ""])
            continue
        found = line.find(kept[line.benchmark]["result"])
        verdict = "met" if found >= line.aim else f"missed by {1 - found / line.aim:.0%}"
        rows.append([line.what, f"{found:.2f}", f"{line.aim:.3g}", verdict])
    return "### Times as fast\n\n" + table_text(["", "reached", "aim", ""], rows)


def answers(kept: dict[str, Any]) -> dict[str, str]:
    """The answers of the README, each by the name of its markers there."""
    model, prepared, raw, pytorchvideo, one, three = (
        kept[name]["result"]
        for name in (
            "model",
            "loader-torchcodec-resized",
            "loader-torchcodec-raw",
            "loader-pytorchvideo",
            "testing-4x3",
            "testing-three",
        )
    )
    forward, forward_bf16, step, step_bf16, memory, memory_bf16 = (line.find(model) for line in HEADLINES[:6])
    whole = [result["times_as_fast"][DECODE_PER_VIEW] for result in (one, three)]
    return {
        "speed": (
            f"forward {forward:.1f} times (bf16 {forward_bf16:.1f}), training step {step:.1f} times (bf16 "
            f"{step_bf16:.1f}) as fast as torchvision's Video Swin on a CPU, with {1 / memory:.2f} "
            f"({1 / memory_bf16:.2f}) of its memory"
        ),
        "reading": (
            f"prepared clips {_reading(prepared):.1f} times, clips as they come {_reading(raw):.1f} times as fast as "
            f"torchcodec; prepared clips {_reading(pytorchvideo):.0f} times as fast as pytorchvideo"
        ),
        "testing": (
            f"one decode per video: {_seek(one):.1f} to {_seek(three):.1f} times as fast as a seek per view, "
            f"{whole[0]:.0f} to {whole[1]:.0f} times as fast as a full decode per view"
        ),
    }


def pages() -> dict[Path, str]:
    """The page and the README as the kept JSON has them."""
    kept = kept_results()
    readme = README.read_text(encoding="utf-8")
    for name, answer in answers(kept).items():
        readme = put_between(readme, answer, f"<!-- {name}: begin -->", f"<!-- {name}: end -->")
    return {PAGE: put_between(PAGE.read_text(encoding="utf-8"), f"\n\n{tables(kept)}\n\n"), README: readme}


def main() -> None:
    """See the docstring of this module."""
    parser = argparse.ArgumentParser(prog="python -m tests.performance", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "page"))
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], metavar="NAME", help="benchmarks (default: all)")
    parser.add_argument("--data", type=Path, help="a prepared data set of ten-second clips")
    parser.add_argument("--raw", type=Path, help="a folder of videos")
    options = parser.parse_args()
    if options.what == "measure":
        measure(options.names or list(BENCHMARKS), options.data, options.raw)
        return
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
