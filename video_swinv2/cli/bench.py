"""Command-line verb `bench`: measures speed and memory on this machine and compares them with other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path

from video_swinv2.command import MAX_SIZE, Verbs, add_verb, whole_number, whole_numbers
from video_swinv2.errors import UsageError
from video_swinv2.files import json_text


def add_bench_verbs(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add `bench`. Its first argument selects the benchmark.

    The help text of an option begins with the benchmarks that it applies to, unless it applies to all of them.
    """
    # Options without a default here have one that depends on the benchmark.
    text = "measure speed and memory on this machine"
    verb = add_verb(verbs, "bench", _bench, text, "video-swinv2 bench model --against torchvision")
    verb.add_argument(
        "what",
        choices=("model", "train", "loader", "test"),
        help="model: the network against another library's, or its attention backends against each other; train: "
        "training steps under each engine, and torchvision's Video Swin; loader: clips read per second by number of "
        "workers, and a plain DataLoader; test: where a multi-view test spends its time, and what one decode for all "
        "views saves",
    )
    verb.add_argument(
        "--against",
        choices=("torchvision", "timm", "backends"),
        default="torchvision",
        help="model: clips against torchvision's Video Swin, SimMIM on images against timm's SwinV2, or the attention "
        "backends against each other (default: %(default)s)",
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
        "--processes",
        type=whole_number(most=1000),
        default=1,
        metavar="N",
        help="train: number of devices (default: %(default)s)",
    )
    verb.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16", help="train: precision (default: %(default)s)"
    )
    verb.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="loader, test: a prepared data set (default for loader: generated clips)",
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
        help="loader, test: clips per round (default: %(default)s)",
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
    {"model": _bench_model, "train": _bench_train, "loader": _bench_loader, "test": _bench_test}[options.what](options)


def _bench_model(options: argparse.Namespace) -> None:
    from video_swinv2.bench.layer import bench_layer, layer_table
    from video_swinv2.bench.model import bench_model, model_table

    common = {"rounds": options.rounds, "threads": options.threads, "device": options.device}
    if options.against == "backends":
        rows = bench_layer(options.model or "swinv2_tiny", batch=options.batch or 1, **common)
        print(json_text(rows, indent=1) if options.json else layer_table(rows))
        return
    # The defaults of each comparison: images against timm, a clip against torchvision.
    name, batch = ("swinv2_base", 8) if options.against == "timm" else ("swinv2_tiny", 1)
    result = bench_model(options.model or name, against=options.against, batch=options.batch or batch, **common)
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
    from video_swinv2.bench.loader import Reading, bench_loader, loader_table

    # Frames are resized to a slightly larger short side than the crop, in the usual ratio of 256 to 224. The stride is
    # 2.
    short_side = round(options.pixels * 256 / 224)
    reading = Reading(options.frames, 2, options.pixels, short_side, options.batch or 8, options.clips)
    result = bench_loader(options.data, reading, options.workers, rounds=options.rounds)
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
        device=options.device,
    )
    print(json_text(result, indent=1) if options.json else bench_test_table(result))
