"""The verbs of `video-swinv2`: parse, call one function of one room, print."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from video_swinv2 import __version__
from video_swinv2.command import add_verb, run_verb


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb of the toolkit."""
    return run_verb(make_parser(), arguments)


def make_parser() -> argparse.ArgumentParser:
    """The command line: verbs, their arguments, an example for each."""
    parser = argparse.ArgumentParser(
        prog="video-swinv2",
        description="Swin Transformer V2 for video: train, test with many views, predict. Clips are prepared with "
        "`python -m data_prep`.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    # DeepSpeed's launcher puts it before the verb in every process; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    for name, run, text in (
        ("pretrain", _pretrain, "SimMIM on images, frames of videos, or clips"),
        ("train", _train, "supervised training, images or clips"),
    ):
        example = f"torchrun --nproc_per_node 8 -m video_swinv2 {name} CONFIG.yaml optim.lr=3e-4 out=runs/a"
        verb = add_verb(verbs, name, run, text, example)
        verb.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, see configs/")
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")

    example = "video-swinv2 test runs/a/model.safetensors data/k400 --protocol videoswin-4x3 --out runs/a/test"
    verb = add_verb(verbs, "test", _test, "multi-view accuracy with a report", example)
    verb.add_argument("model", type=Path, metavar="MODEL")
    verb.add_argument("data", type=Path, metavar="DATA")
    verb.add_argument("--protocol", default="videoswin-4x3", help="which views, default %(default)s")
    verb.add_argument("--split", default="test", help="default %(default)s; all: every image of a tree")
    verb.add_argument(
        "--classes-by",
        choices=("name", "index"),
        default="name",
        help="index: class folders of images are places in the model's classes, as ImageNet-V2's are",
    )
    verb.add_argument("--out", type=Path, required=True, help="folder for scores, result.json and report.html")
    verb.add_argument("--json", action="store_true", help="print the whole result as JSON")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.frame_stride=4")

    verb = add_verb(
        verbs, "report", _report, "write the report again from saved scores", "video-swinv2 report runs/a/test"
    )
    verb.add_argument("folders", type=Path, nargs="+", metavar="DIR")

    example = "video-swinv2 predict runs/a/model.safetensors clip.mp4 folder/ --top 3"
    verb = add_verb(verbs, "predict", _predict, "the likeliest classes of files and folders", example)
    verb.add_argument("model", type=Path, metavar="MODEL")
    verb.add_argument("paths", type=Path, nargs="+", metavar="FILE|DIR")
    verb.add_argument("--top", type=int, default=5, help="answers per file, default %(default)s")
    verb.add_argument("--protocol", default="videoswin-4x3", help="which views, default %(default)s")
    verb.add_argument("--json", action="store_true", help="print JSON")

    example = "video-swinv2 probe runs/pre/model.safetensors data/photos --random-weights --out runs/pre/probe"
    verb = add_verb(verbs, "probe", _probe, "what frozen features are worth: k-NN and a linear probe", example)
    verb.add_argument("model", type=Path, metavar="MODEL", help="file or Hub-style folder of any known layout")
    verb.add_argument("data", type=Path, metavar="DATA", help="images or videos with labels")
    verb.add_argument("--method", choices=("knn", "linear", "both"), default="both", help="default %(default)s")
    verb.add_argument("--train-split", metavar="NAME", help="to learn from; default train")
    verb.add_argument(
        "--test-split", metavar="NAME", help="default val; without splits a share of each class is drawn by the seed"
    )
    verb.add_argument("--k", type=int, default=20, metavar="N", help="neighbours, default %(default)s")
    verb.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions, default %(default)s")
    verb.add_argument("--random-weights", action="store_true", help="also the same architecture untrained")
    verb.add_argument("--out", type=Path, metavar="DIR", help="keep features there for the next probe, and probe.json")
    verb.add_argument("--json", action="store_true", help="print the whole result as JSON")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.image_size=256")

    example = "video-swinv2 convert swinv2_tiny_patch4_window8_256.pth tiny.safetensors --frames 16 --window 8,7,7"
    verb = add_verb(
        verbs, "convert", _convert, "any known checkpoint to a model file, or ours to other windows", example
    )
    verb.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="file or Hub-style folder of any known layout"
    )
    verb.add_argument("out", type=Path, metavar="OUT", help="a name that ends in .safetensors, or a folder")
    verb.add_argument("--model", metavar="NAME", help="by default counted in the tensors")
    verb.add_argument("--frames", type=int, metavar="N", help="frames of a clip; image weights are inflated")
    verb.add_argument("--image-size", type=_axes, metavar="H,W", help="pixels; by default as trained")
    verb.add_argument("--patch-size", type=_axes, metavar="T,H,W", help="by default as trained, and 2 frames")
    verb.add_argument("--window", type=_axes, metavar="T,H,W", help="tokens; by default as trained, and 8 in time")
    verb.add_argument("--cpb-norm", type=_integers, metavar="12,12,12,6", help="of weights that do not tell it")
    verb.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line")
    verb.add_argument(
        "--class-map", type=Path, metavar="FILE", help="rows of the head to keep, one number per line (map22kto1k.txt)"
    )
    verb.add_argument(
        "--frame-stride", type=int, metavar="N", help="distance of frames in a clip; default as trained, or 1"
    )
    verb.add_argument("--json", action="store_true", help="print the account as JSON")

    example = "video-swinv2 bench model --against torchvision"
    verb = add_verb(verbs, "bench", _bench, "speed and memory, measured on this machine", example)
    verb.add_argument("what", choices=("model",), help="model: against another library's, or backend by backend")
    verb.add_argument(
        "--against",
        choices=("torchvision", "timm", "backends"),
        default="torchvision",
        help="clips against Video Swin, SimMIM of images against SwinV2, or backend by backend; default %(default)s",
    )
    verb.add_argument("--model", metavar="NAME", help="default swinv2_tiny, against timm swinv2_base")
    verb.add_argument("--batch", type=int, metavar="N", help="samples; default 1 clip, 8 images")
    verb.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each, default %(default)s")
    verb.add_argument("--threads", type=int, default=1, metavar="N", help="one, the default, is the steadiest")
    verb.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    verb.add_argument("--json", action="store_true", help="print JSON")

    example = "video-swinv2 export runs/a/model.safetensors model.onnx --check clip.mp4"
    verb = add_verb(verbs, "export", _export, "a program for other software: torch.export or ONNX, checked", example)
    verb.add_argument("model", type=Path, metavar="MODEL")
    verb.add_argument("out", type=Path, metavar="OUT", help="a name that ends in .onnx or .pt2")
    verb.add_argument("--frames", type=int, metavar="N", help="frames of a clip; by default as trained")
    verb.add_argument("--image-size", type=_axes, metavar="H,W", help="pixels; by default as trained")
    verb.add_argument("--window", type=_axes, metavar="T,H,W", help="tokens; by default as trained")
    verb.add_argument("--opset", type=int, help="of ONNX, default 23, the first with scaled dot products")
    verb.add_argument("--check", type=Path, metavar="FILE", help="compare on this video or image; default noise")

    example = "video-swinv2 plan CONFIG.yaml engine.zero_stage=3 --processes 8 --memory 80GB"
    verb = add_verb(verbs, "plan", _plan, "memory, work and steps of a training run, computed beforehand", example)
    verb.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, see configs/")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")
    verb.add_argument("--processes", type=int, default=1, metavar="N", help="devices, default %(default)s")
    verb.add_argument("--pretrain", action="store_true", help="plan `pretrain`, not `train`")
    verb.add_argument("--samples", type=int, metavar="N", help="training samples, where the data is not here")
    verb.add_argument("--classes", type=int, metavar="N", help="classes, where the data is not here")
    verb.add_argument("--memory", type=_bytes, metavar="80GB", help="of a device; exit code 1 if the run does not fit")
    verb.add_argument("--json", action="store_true", help="print JSON")

    example = "video-swinv2 demo --out runs/demo"
    verb = add_verb(verbs, "demo", _demo, "the whole path on generated clips, in minutes on a laptop", example)
    verb.add_argument("--out", type=Path, default=Path("runs/demo"), help="default %(default)s")
    return parser


def _pretrain(options: argparse.Namespace) -> None:
    from video_swinv2.config import load_config
    from video_swinv2.training.loop import run
    from video_swinv2.training.tasks import Pretraining

    run(load_config(options.config, options.overrides), Pretraining)


def _train(options: argparse.Namespace) -> None:
    from video_swinv2.config import load_config
    from video_swinv2.training.loop import run
    from video_swinv2.training.tasks import Classification

    run(load_config(options.config, options.overrides), Classification)


def _test(options: argparse.Namespace) -> None:
    from video_swinv2.evaluation.testing import parse_overrides, run_test, summary

    overrides = parse_overrides(options.overrides)
    result = run_test(
        options.model,
        options.data,
        protocol=options.protocol,
        split=options.split,
        classes_by=options.classes_by,
        out=options.out,
        overrides=overrides,
    )
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result, indent=1) if options.json else summary(result, options.out))


def _probe(options: argparse.Namespace) -> None:
    from video_swinv2.evaluation.overrides import parse_overrides
    from video_swinv2.evaluation.probe import run_probe, show

    result = run_probe(
        options.model,
        options.data,
        methods=("knn", "linear") if options.method == "both" else (options.method,),
        train_split=options.train_split,
        test_split=options.test_split,
        k=options.k,
        seeds=options.seeds,
        random_weights=options.random_weights,
        out=options.out,
        overrides=parse_overrides(options.overrides),
    )
    print(json.dumps(result, indent=1) if options.json else show(result))


def _report(options: argparse.Namespace) -> None:
    from video_swinv2.evaluation.report import write_report

    for folder in options.folders:
        print(write_report(folder))


def _predict(options: argparse.Namespace) -> int:
    from video_swinv2.deploy.predict import predict, show

    answers = predict(options.model, options.paths, top=options.top, protocol=options.protocol)
    print(show(answers, as_json=options.json))
    return 1 if any(answer.error for answer in answers) else 0


def _convert(options: argparse.Namespace) -> None:
    from video_swinv2.weights.convert import convert
    from video_swinv2.weights.pretrained import Sizes

    account = convert(
        options.checkpoint,
        options.out,
        Sizes(options.frames, options.image_size, options.patch_size, options.window),
        name=options.model,
        cpb_norm=options.cpb_norm,
        classes=options.classes,
        class_map=options.class_map,
        frame_stride=options.frame_stride,
    )
    print(json.dumps(dataclasses.asdict(account), indent=1) if options.json else f"{account}\nwrote {options.out}")


def _bench(options: argparse.Namespace) -> None:
    from video_swinv2.tools import bench

    common = {"rounds": options.rounds, "threads": options.threads, "device": options.device}
    if options.against == "backends":
        rows = bench.bench_layer(options.model or "swinv2_tiny", **common)
        print(json.dumps(rows, indent=1) if options.json else bench.show_layer(rows))
        return
    name, batch = ("swinv2_base", 8) if options.against == "timm" else ("swinv2_tiny", 1)
    result = bench.bench_model(options.model or name, against=options.against, batch=options.batch or batch, **common)
    print(json.dumps(result, indent=1) if options.json else bench.show_model(result))


def _export(options: argparse.Namespace) -> None:
    from video_swinv2.deploy.export import export

    difference = export(
        options.model,
        options.out,
        frames=options.frames,
        image_size=options.image_size,
        window=options.window,
        opset=options.opset,
        check=options.check,
    )
    print(f"wrote {options.out}; largest difference of a logit from the model: {difference:.1e}")


def _plan(options: argparse.Namespace) -> int:
    from video_swinv2.config import load_config
    from video_swinv2.tools.plan import make_plan, show

    plan = make_plan(
        load_config(options.config, options.overrides),
        processes=options.processes,
        samples=options.samples,
        classes=options.classes,
        pretraining=options.pretrain,
    )
    print(
        json.dumps(dataclasses.asdict(plan) | {"peak": plan.peak}, indent=1)
        if options.json
        else show(plan, options.memory)
    )
    return int(options.memory is not None and plan.peak > options.memory)


def _demo(options: argparse.Namespace) -> None:
    from video_swinv2.tools.demo import run_demo

    run_demo(options.out)


def _axes(text: str) -> int | tuple[int, ...]:
    """`8,7,7`, or one number for every axis."""
    numbers = _integers(text)
    return numbers[0] if len(numbers) == 1 else numbers


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers such as 8,7,7") from None


def _bytes(text: str) -> int:
    """`80GB` (10^9 bytes) or `80GiB` (2^30 bytes) -> bytes."""
    for unit, size in (("GiB", 2**30), ("GB", 10**9)):
        if text.endswith(unit):
            try:
                return int(float(text.removesuffix(unit)) * size)
            except ValueError:
                break
    raise argparse.ArgumentTypeError(f"{text!r} is not an amount such as 80GB or 80GiB")
