"""Command-line verb `bench`: measures speed and memory on this machine and compares them with other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from video_swinv2.command import MAX_SIZE, Verbs, add_verb, whole_number, whole_numbers
from video_swinv2.errors import UsageError
from video_swinv2.files import json_text

# The keys of PEERS in bench/clip_readers.py (tested), which is not imported here because it loads torch.
LOADER_PEERS = ("plain", "torchcodec", "decord", "videomae", "pytorchvideo")


def add_bench_verbs(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add `bench`. Its first argument selects the benchmark.

    The help text of an option begins with the benchmarks that it applies to, unless it applies to all of them.
    """
    # Options without a default here have one that depends on the benchmark.
    text = "measure speed and memory on this machine"
    verb = add_verb(verbs, "bench", _bench, text, "video-swinv2 bench model --against torchvision")
    verb.add_argument(
        "what",
        choices=("model", "train", "loader", "test", "prepare", "scale"),
        help="model: the network against another library's, or its attention backends against each other; train: "
        "training steps under each engine, and torchvision's Video Swin; loader: clips read per second and core by "
        "number of workers, and by other libraries; test: where a multi-view test spends its time, and what one decode "
        "for all views saves; prepare: `data_prep prepare` against the ffmpeg program, and its start with a long list; "
        "scale: how costs grow with the size of each thing",
    )
    verb.add_argument(
        "--against",
        choices=("torchvision", "timm", "backends", *LOADER_PEERS),
        help="model: clips against torchvision's Video Swin, SimMIM on images against timm's SwinV2, or the attention "
        "backends against each other (default: torchvision); loader: a plain DataLoader, one that reads with "
        "torchcodec or decord, VideoMAE's, or pytorchvideo's (default: plain)",
    )
    verb.add_argument(
        "--model",
        metavar="NAME",
        help="model name (default: swinv2_tiny; against timm and for train: swinv2_base); test: a model file",
    )
    verb.add_argument(
        "--batch", type=whole_number(), metavar="N", help="batch size (default: 1 clip or 8 images; loader: 8 clips)"
    )
    verb.add_argument(
        "--frames",
        type=whole_number(most=MAX_SIZE),
        default=32,
        metavar="N",
        help="train, loader: frames per clip (default: %(default)s)",
    )
    verb.add_argument(
        "--pixels",
        type=whole_number(most=MAX_SIZE),
        default=224,
        metavar="N",
        help="train, loader: height and width (default: %(default)s)",
    )
    verb.add_argument(
        "--short-side",
        type=whole_number(most=MAX_SIZE),
        metavar="N",
        help="loader: resize the short side to this before cropping, as the recipes do (256 for 224 pixels)",
    )
    verb.add_argument(
        "--processes",
        type=whole_number(most=1000),
        default=1,
        metavar="N",
        help="train: number of devices; prepare: videos at a time (default: %(default)s)",
    )
    verb.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16", help="train: precision (default: %(default)s)"
    )
    verb.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="loader, test: a prepared data set (default for loader: generated clips); prepare: a folder of raw videos "
        "(default: generated ones)",
    )
    verb.add_argument(
        "--workers",
        type=whole_numbers(least=0, most=1000),
        default=(0, 1, 2, 4),
        metavar="0,1,2",
        help="loader: numbers of workers to compare",
    )
    verb.add_argument(
        "--clips",
        type=whole_number(),
        default=64,
        metavar="N",
        help="loader, test, prepare: clips per round (default: %(default)s)",
    )
    verb.add_argument(
        "--rows",
        type=whole_numbers(least=1, most=100_000_000),
        metavar="N[,N]",
        help="loader: also measure how a list of N videos is started on; prepare: the same (default: 246534); scale: "
        "lengths of lists (default: 10000,30000,100000)",
    )
    verb.add_argument(
        "--part",
        nargs="+",
        choices=("model", "reading", "processes", "lists"),
        default=(),
        help="scale: measure only these (default: all)",
    )
    verb.add_argument("--split", default="test", help="test: split of the data (default: %(default)s)")
    verb.add_argument(
        "--protocol", default="videoswin-4x3", metavar="NAME[,NAME]", help="test: views (default: %(default)s)"
    )
    verb.add_argument(
        "--rounds",
        type=whole_number(),
        default=5,
        metavar="N",
        help="rounds, in which all candidates alternate (default: %(default)s)",
    )
    verb.add_argument(
        "--threads",
        type=whole_number(most=1000),
        default=1,
        metavar="N",
        help="CPU threads; 1, the default, gives the steadiest times",
    )
    verb.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device (default: %(default)s)")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _bench(options: argparse.Namespace) -> None:
    benchmarks = {
        "model": _bench_model,
        "train": _bench_train,
        "loader": _bench_loader,
        "test": _bench_test,
        "prepare": _bench_prepare,
        "scale": _bench_scale,
    }
    benchmarks[options.what](options)


def _bench_model(options: argparse.Namespace) -> None:
    from video_swinv2.bench.layer import bench_layer, layer_table
    from video_swinv2.bench.model import bench_model, model_table

    against: Any = options.against or "torchvision"
    if against in LOADER_PEERS:
        raise UsageError(f"--against {against}: is for loader; use torchvision, timm or backends")
    common = {"rounds": options.rounds, "threads": options.threads, "device": options.device}
    if against == "backends":
        rows = bench_layer(options.model or "swinv2_tiny", batch=options.batch or 1, **common)
        print(json_text(rows, indent=1) if options.json else layer_table(rows))
        return
    # The defaults of each comparison: images against timm, a clip against torchvision.
    name, batch = ("swinv2_base", 8) if against == "timm" else ("swinv2_tiny", 1)
    result = bench_model(options.model or name, against=against, batch=options.batch or batch, **common)
    print(json_text(result, indent=1) if options.json else model_table(result))


def _bench_train(options: argparse.Namespace) -> None:
    # The window is not an option: it is the one that the other libraries are measured with.
    from video_swinv2.bench.peers import WINDOW
    from video_swinv2.bench.train import Workload, bench_train, training_table

    work = Workload(
        model=options.model or "swinv2_base",
        frames=options.frames,
        pixels=options.pixels,
        window=WINDOW,
        clips=options.batch or 1,
        processes=options.processes,
        device=options.device,
        precision=options.precision,
        rounds=options.rounds,
        threads=options.threads,
    )
    result = bench_train(work)
    print(json_text(result, indent=1) if options.json else training_table(result))


def _bench_loader(options: argparse.Namespace) -> None:
    from video_swinv2.bench.clip_readers import Reading
    from video_swinv2.bench.loader import bench_loader, loader_table

    against: Any = options.against or "plain"
    if against not in LOADER_PEERS:
        raise UsageError(f"--against {against}: is for model; use one of {', '.join(LOADER_PEERS)}")
    reading = Reading(options.frames, 2, options.pixels, options.short_side, options.batch or 8, options.clips)
    rows = _only_number(options.rows, 0)
    result = bench_loader(options.data, reading, options.workers, against=against, rounds=options.rounds, rows=rows)
    print(json_text(result, indent=1) if options.json else loader_table(result))


def _bench_test(options: argparse.Namespace) -> None:
    from video_swinv2.bench.testing import bench_test, bench_test_table

    if options.model is None or options.data is None:
        raise UsageError("bench test: --model FILE and --data DIR are required")
    result = bench_test(
        Path(options.model),
        options.data,
        protocols=options.protocol,
        split=options.split,
        videos=options.clips,
        batch_views=options.batch or 12,
        rounds=options.rounds,
        threads=options.threads,
        device=options.device,
    )
    print(json_text(result, indent=1) if options.json else bench_test_table(result))


def _bench_prepare(options: argparse.Namespace) -> None:
    from video_swinv2.bench.preparation import bench_preparation, preparation_table

    rows = _only_number(options.rows, 246_534)
    result = bench_preparation(
        options.data, clips=options.clips, workers=options.processes, rows=rows, rounds=options.rounds
    )
    print(json_text(result, indent=1) if options.json else preparation_table(result))


def _bench_scale(options: argparse.Namespace) -> None:
    from video_swinv2.bench.scale import bench_scale, scale_table

    result = bench_scale(options.rows or (10_000, 30_000, 100_000), rounds=options.rounds, parts=options.part)
    print(json_text(result, indent=1) if options.json else scale_table(result))


def _only_number(rows: tuple[int, ...] | None, default: int) -> int:
    """The single number of --rows. Raises UsageError for several, which only `bench scale` compares."""
    if rows is None:
        return default
    if len(rows) > 1:
        raise UsageError("--rows: takes one number here; only `bench scale` compares several")
    return rows[0]
