"""The verbs of `video-swinv2`: parse, call one function of one room, print."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from video_swinv2 import __version__
from video_swinv2.cli.bench import add_bench
from video_swinv2.command import add_verb, integers, run_verb


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb of the toolkit."""
    return run_verb(make_parser(), arguments)


def make_parser() -> argparse.ArgumentParser:
    """The command line: verbs, their arguments, an example for each."""
    parser = argparse.ArgumentParser(
        prog="video-swinv2",
        description="Swin Transformer V2 for video: train, test with many views, predict. Clips are prepared with "
        "`python -m data_prep`.",
        epilog="exit codes: 0 done; 1 failed, or short of a limit asked for; 2 wrong usage; 75 training was told to "
        "stop (SIGTERM, SIGUSR1, Ctrl-C) and has saved itself: start the same command again. torchrun hides the 75, so "
        "a file start-again in the run folder says the same.",
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

    example = "video-swinv2 test runs/a/model.safetensors data/k400 --protocol videoswin-4x3,center-1x1 --out runs/t"
    verb = add_verb(verbs, "test", _test, "multi-view accuracy with a report", example)
    verb.add_argument("model", type=Path, metavar="MODEL")
    verb.add_argument("data", type=Path, metavar="DATA")
    verb.add_argument(
        "--protocol",
        default="videoswin-4x3",
        metavar="NAME[,NAME]",
        help="which views, default %(default)s; several share one decode of each video and get a folder each",
    )
    verb.add_argument("--split", default="test", help="default %(default)s; all: every image of a tree")
    verb.add_argument(
        "--classes-by",
        choices=("name", "index"),
        default="name",
        help="index: class folders of images are places in the model's classes, as ImageNet-V2's are",
    )
    verb.add_argument("--out", type=Path, required=True, help="folder for scores, results.json and report.html")
    verb.add_argument("--json", action="store_true", help="print the whole result as JSON")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.frame_stride=4")

    example = "video-swinv2 report runs/a/test runs/b/test --out a-against-b"
    text = "write the report again from saved scores; several tests are compared"
    verb = add_verb(verbs, "report", _report, text, example)
    verb.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="what `test` was given as --out")
    verb.add_argument(
        "--run", dest="run_folder", type=Path, metavar="DIR", help="the training run; default the model's folder"
    )
    verb.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("comparison"), help="of a comparison, default %(default)s"
    )
    verb.add_argument("--json", action="store_true", help="print the whole result as JSON")

    example = "video-swinv2 predict runs/a/model.safetensors clip.mp4 folder/ http://camera/stream --top 3 --every 1"
    verb = add_verb(verbs, "predict", _predict, "the likeliest classes of files, folders and streams", example)
    verb.add_argument("model", type=Path, metavar="MODEL")
    verb.add_argument(
        "sources", nargs="+", metavar="FILE|DIR|URL|DEVICE|-", help="- is standard input, a camera is /dev/video0"
    )
    verb.add_argument("--top", type=int, default=5, help="answers per file, default %(default)s")
    verb.add_argument("--protocol", help="views of a file; default videoswin-4x3, of features center-1x1")
    verb.add_argument(
        "--every",
        type=float,
        metavar="SECONDS",
        help="over time instead: a window of a clip's length every so often; streams by default without overlap",
    )
    verb.add_argument("--seconds", type=float, default=float("inf"), help="end a stream then; default as it ends")
    verb.add_argument("--video", type=Path, metavar="DIR", help="write the videos there with the answers over time")
    verb.add_argument("--features", type=Path, metavar="OUT.npz", help="no classes: write the files' feature vectors")
    verb.add_argument("--gallery", type=Path, metavar="FILE.npz", help="no classes: the files likest to each in there")
    verb.add_argument("--k", type=int, default=5, help="how many of the gallery, default %(default)s")
    form = verb.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", default="text", help="print JSON")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="print CSV")

    example = "video-swinv2 serve runs/a/model.safetensors"
    verb = add_verb(verbs, "serve", _serve, "a page on this machine to drop a clip on", example)
    verb.add_argument("model", type=Path, metavar="MODEL")
    verb.add_argument("--port", type=int, default=8000, help="0 for any that is free, default %(default)s")
    verb.add_argument("--top", type=int, default=5, help="answers per clip, default %(default)s")
    verb.add_argument("--most-megabytes", type=float, default=200.0, help="of a clip, default %(default)g")
    verb.add_argument("--most-seconds", type=float, default=60.0, help="to answer it, default %(default)g")

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
    verb.add_argument("--cpb-norm", type=integers, metavar="12,12,12,6", help="of weights that do not tell it")
    verb.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line")
    verb.add_argument(
        "--class-map", type=Path, metavar="FILE", help="rows of the head to keep, one number per line (map22kto1k.txt)"
    )
    verb.add_argument(
        "--frame-stride", type=int, metavar="N", help="distance of frames in a clip; default as trained, or 1"
    )
    verb.add_argument("--json", action="store_true", help="print the account as JSON")

    add_bench(verbs)

    example = "video-swinv2 export runs/a/model.safetensors model.onnx --check clip.mp4"
    verb = add_verb(verbs, "export", _export, "a program for other software: torch.export or ONNX, checked", example)
    verb.add_argument("model", type=Path, metavar="MODEL")
    verb.add_argument("out", type=Path, metavar="OUT", help="a name that ends in .onnx or .pt2")
    verb.add_argument("--frames", type=int, metavar="N", help="frames of a clip; by default as trained")
    verb.add_argument("--image-size", type=_axes, metavar="H,W", help="pixels; by default as trained")
    verb.add_argument("--window", type=_axes, metavar="T,H,W", help="tokens; by default as trained")
    verb.add_argument("--opset", type=int, help="of ONNX, default 23, the first with scaled dot products")
    verb.add_argument(
        "--check", type=Path, nargs="+", default=(), metavar="FILE|DIR", help="compare on these clips; default noise"
    )

    example = "video-swinv2 plan CONFIG.yaml engine.zero_stage=3 --processes 8 --memory 80GB"
    verb = add_verb(verbs, "plan", _plan, "memory, work and steps of a training run, computed beforehand", example)
    verb.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, see configs/")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")
    verb.add_argument("--processes", type=int, default=1, metavar="N", help="devices, default %(default)s")
    verb.add_argument("--pretrain", action="store_true", help="plan `pretrain`, not `train`")
    verb.add_argument("--samples", type=int, metavar="N", help="training samples, where the data is not here")
    verb.add_argument("--classes", type=int, metavar="N", help="classes, where the data is not here")
    verb.add_argument(
        "--memory",
        type=_bytes,
        metavar="80GB",
        help="of a device, by default this one's; exit code 1 if something does not fit",
    )
    verb.add_argument("--tflops", type=float, metavar="N", help="that a device reaches in training; see bench train")
    verb.add_argument("--quick", action="store_true", help="do not measure how fast this machine reads and computes")
    verb.add_argument("--json", action="store_true", help="print JSON")

    example = "video-swinv2 doctor --folder /scratch/runs"
    verb = add_verb(verbs, "doctor", _doctor, "is this machine fit to train, and what mends it", example)
    verb.add_argument("--folder", type=Path, default=Path("runs"), help="where runs go, default %(default)s")
    verb.add_argument("--json", action="store_true", help="print JSON")

    example = "video-swinv2 demo --out runs/demo"
    verb = add_verb(verbs, "demo", _demo, "the whole path on generated clips, in minutes on a laptop", example)
    verb.add_argument("--out", type=Path, default=Path("runs/demo"), help="default %(default)s")
    return parser


def _pretrain(options: argparse.Namespace) -> None:
    from video_swinv2.config import load_config
    from video_swinv2.training.loop import run
    from video_swinv2.training.tasks.simmim import Pretraining

    run(load_config(options.config, options.overrides), Pretraining)


def _train(options: argparse.Namespace) -> None:
    from video_swinv2.config import load_config
    from video_swinv2.training.loop import run
    from video_swinv2.training.tasks.classification import Classification

    run(load_config(options.config, options.overrides), Classification)


def _test(options: argparse.Namespace) -> None:
    from video_swinv2.evaluation.testing import parse_overrides, run_tests, summary

    overrides = parse_overrides(options.overrides)
    results = run_tests(
        options.model,
        options.data,
        protocols=options.protocol,
        split=options.split,
        classes_by=options.classes_by,
        out=options.out,
        overrides=overrides,
    )
    if os.environ.get("RANK", "0") == "0":
        told = results if len(results) > 1 else next(iter(results.values()))
        print(json.dumps(told, indent=1) if options.json else summary(results, options.out))


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
    from video_swinv2.report.compare import report

    result, lines = report(options.folders, out=options.out, run=options.run_folder)
    print(json.dumps(result, indent=1) if options.json else "\n".join(lines))


def _predict(options: argparse.Namespace) -> int:
    from video_swinv2.inference.predictor import OverTime, predict
    from video_swinv2.inference.formatting import header, show, format_segment

    if options.features or options.gallery:
        return _retrieve(options)

    def say(text: str) -> None:
        if text:
            print(text, flush=True)

    say(header(options.form))
    answers = predict(
        options.model,
        options.sources,
        top=options.top,
        protocol=options.protocol or "videoswin-4x3",
        over_time=OverTime(options.every, options.seconds, options.video),
        tell=lambda path, moment: say(format_segment(path, moment, options.form)),
    )
    say(show(answers, options.form))
    return 1 if any(answer.error for answer in answers) else 0


def _retrieve(options: argparse.Namespace) -> int:
    from video_swinv2.inference.retrieval import load_gallery, make_gallery, save_gallery, search
    from video_swinv2.inference.formatting import format_search_results

    gallery = load_gallery(options.gallery) if options.gallery else None
    made = make_gallery(options.model, options.sources, protocol=options.protocol or "center-1x1")
    if options.features:
        save_gallery(made, options.features)
        read = len(made.reasons) - sum(map(bool, made.reasons))
        print(f"wrote {options.features}: {read} of {len(made.names)} files", file=sys.stderr)
    if gallery is not None:
        print(format_search_results(search(gallery, made, options.k), options.form))
    return 1 if any(made.reasons) else 0


def _serve(options: argparse.Namespace) -> None:
    from video_swinv2.inference.clip_summary import Limits
    from video_swinv2.inference.serve import serve

    limits = Limits(upload_bytes=int(options.most_megabytes * 10**6), seconds=options.most_seconds)
    serve(options.model, port=options.port, top=options.top, limits=limits)


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


def _export(options: argparse.Namespace) -> None:
    from video_swinv2.inference.export import export

    checked = export(
        options.model,
        options.out,
        frames=options.frames,
        image_size=options.image_size,
        window=options.window,
        opset=options.opset,
        check=options.check,
    )
    print(
        f"wrote {options.out}; largest difference of a logit from the model: {checked.difference:.1e}, the same first "
        f"five classes for {checked.same_top} of {checked.samples} samples"
    )


def _plan(options: argparse.Namespace) -> int:
    from video_swinv2.config import load_config
    from video_swinv2.plan.plan import make_plan, memory_here, shortfalls
    from video_swinv2.plan.text import show

    config = load_config(options.config, options.overrides)
    plan = make_plan(
        config,
        processes=options.processes,
        samples=options.samples,
        classes=options.classes,
        pretraining=options.pretrain,
        tflops=options.tflops,
        measuring=not options.quick,
    )
    memory = memory_here(plan) if options.memory is None else options.memory
    problems = shortfalls(plan, config, memory)
    values = dataclasses.asdict(plan) | {"peak": plan.peak, "memory": memory, "problems": problems}
    print(json.dumps(values, indent=1) if options.json else show(plan, problems, memory))
    return int(bool(problems))


def _doctor(options: argparse.Namespace) -> int:
    from video_swinv2.tools.doctor import run_doctor, show

    findings = run_doctor(options.folder)
    print(
        json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1) if options.json else show(findings)
    )
    return int(any(finding.state == "fault" for finding in findings))


def _demo(options: argparse.Namespace) -> None:
    from video_swinv2.tools.demo import run_demo

    run_demo(options.out)


def _axes(text: str) -> int | tuple[int, ...]:
    """`8,7,7`, or one number for every axis."""
    numbers = integers(text)
    return numbers[0] if len(numbers) == 1 else numbers


def _bytes(text: str) -> int:
    """`80GB` (10^9 bytes) or `80GiB` (2^30 bytes) -> bytes."""
    for unit, size in (("GiB", 2**30), ("GB", 10**9)):
        if text.endswith(unit):
            try:
                return int(float(text.removesuffix(unit)) * size)
            except ValueError:
                break
    raise argparse.ArgumentTypeError(f"{text!r} is not an amount such as 80GB or 80GiB")
