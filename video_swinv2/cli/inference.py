"""Command-line verbs that use a trained model: `predict`, `serve` and `export`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from video_swinv2.cli.weights import axis_sizes
from video_swinv2.command import MAX_SIZE, WEEK_SECONDS, Verbs, add_verb, number, whole_number
from video_swinv2.errors import UsageError
from video_swinv2.escaping import for_terminal


def add_inference_verbs(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add `predict`, `serve` and `export`."""
    _add_predict(verbs)
    _add_serve(verbs)
    _add_export(verbs)


def _add_predict(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "print the most likely classes of files, folders and streams, or find similar files"
    example = "video-swinv2 predict runs/a/model.safetensors clip.mp4 folder/ http://camera/stream --top 3 --every 1"
    verb = add_verb(verbs, "predict", _predict, text, example)
    verb.add_argument("model", type=Path, metavar="MODEL", help="model file")
    verb.add_argument(
        "sources",
        nargs="+",
        metavar="FILE|DIR|URL|DEVICE|-",
        help="- reads standard input; a camera is a device such as /dev/video0",
    )
    verb.add_argument(
        "--top",
        type=whole_number(),
        default=5,
        help="classes, or of a detector objects, to print per file (default: %(default)s)",
    )
    verb.add_argument(
        "--protocol",
        help="views of each file, whose crops are also those of each segment over time "
        "(default: videoswin-4x3; with --features or --gallery center-1x1)",
    )
    verb.add_argument(
        "--every",
        type=number(0, WEEK_SECONDS),
        metavar="SECONDS",
        help="predict over time, too: classify a clip every SECONDS; streams always are, by default clip after clip",
    )
    verb.add_argument(
        "--seconds",
        type=number(0, 10**9),
        default=float("inf"),
        help="stop reading a stream after this long (default: at its end)",
    )
    verb.add_argument(
        "--video",
        type=Path,
        metavar="DIR",
        help="predict over time, too, and write copies of the videos with the answers below them",
    )
    verb.add_argument(
        "--explain",
        type=Path,
        metavar="DIR",
        help="write an image per file that shows where in its frames the evidence for the first answer lies (Grad-CAM)",
    )
    verb.add_argument(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="of a segmenter: write the mask of each image, and the image with its classes in colours and a legend; "
        "of a detector: write each image with the boxes, and masks, that were found",
    )
    verb.add_argument(
        "--min-score",
        type=number(0, 1),
        metavar="SCORE",
        help="of a detector: leave out detections with a lower score (default: 0.3)",
    )
    verb.add_argument(
        "--features", type=Path, metavar="OUT.npz", help="instead of classifying, write the files' feature vectors"
    )
    verb.add_argument(
        "--gallery",
        type=Path,
        metavar="FILE.npz",
        help="instead of classifying, find the nearest files in a --features file",
    )
    verb.add_argument("--k", type=whole_number(), default=5, help="files to find with --gallery (default: %(default)s)")
    # --json and --csv share the value `form`. argparse takes its default from the first of them.
    form = verb.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", default="text", help="print JSON")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="print CSV")


def _predict(options: argparse.Namespace) -> int:
    """Run `predict`. The exit code is 1 if any source could not be read."""
    from video_swinv2.weights.store import read_card

    if options.features or options.gallery:
        return _retrieve(options)
    task = read_card(options.model).dense.get("task")
    if task == "detection":
        return _predict_objects(options)
    if options.min_score is not None:
        raise UsageError("--min-score: is for detectors; omit it")
    if task == "segmentation":
        return _predict_masks(options)
    if options.pictures:
        raise UsageError("--pictures: is for segmenters and detectors; use --explain or --video for a classifier")

    from video_swinv2.evaluation.overrides import TestOverrides
    from video_swinv2.inference.classifier import DEFAULT_PROTOCOL
    from video_swinv2.inference.formatting import csv_header, format_predictions, format_segment
    from video_swinv2.inference.predictor import OverTime, predict

    def print_now(text: str) -> None:
        # Formatters return an empty string where their form prints nothing. The output of a live stream must not wait
        # in a buffer, even if it is a pipe.
        if text:
            print(text, flush=True)

    with TestOverrides().session("start the same command again") as world:
        # The header of CSV comes first, then segments as they are classified, and everything else at the end.
        if world.rank == 0:
            print_now(csv_header(options.form))
        predictions = predict(
            options.model,
            options.sources,
            top=options.top,
            protocol=options.protocol or DEFAULT_PROTOCOL,
            over_time=OverTime(options.every, options.seconds, options.video),
            explain=options.explain,
            on_segment=lambda path, segment: print_now(format_segment(path, segment, options.form)),
            world=world,
        )
    if world.rank == 0:
        print_now(format_predictions(predictions, options.form))
    return 1 if any(prediction.error for prediction in predictions) else 0


def _predict_masks(options: argparse.Namespace) -> int:
    """Run `predict` with a segmenter. The exit code is 1 if any image could not be read."""
    from video_swinv2.evaluation.overrides import TestOverrides
    from video_swinv2.inference.segmentation import format_masks, predict_masks

    _refuse_options(options, "a segmenter", "every", "video", "explain")
    with TestOverrides().session("start the same command again") as world:
        found = predict_masks(
            options.model, options.sources, protocol=options.protocol or "whole", pictures=options.pictures, world=world
        )
    if world.rank == 0:
        print(format_masks(found, options.form, options.top))
    return 1 if any(each.error for each in found) else 0


def _predict_objects(options: argparse.Namespace) -> int:
    """Run `predict` with a detector. The exit code is 1 if any image could not be read."""
    from video_swinv2.evaluation.overrides import TestOverrides
    from video_swinv2.inference.detection import MIN_SCORE, format_objects, predict_objects

    _refuse_options(options, "a detector", "protocol", "every", "video", "explain")
    min_score = MIN_SCORE if options.min_score is None else options.min_score
    with TestOverrides().session("start the same command again") as world:
        found = predict_objects(
            options.model, options.sources, min_score=min_score, pictures=options.pictures, world=world
        )
    if world.rank == 0:
        print(format_objects(found, options.form, options.top))
    return 1 if any(each.error for each in found) else 0


def _refuse_options(options: argparse.Namespace, model: str, *names: str) -> None:
    """Raise UsageError for options of `predict` that are for classifiers and were given with another `model`."""
    for name in names:
        if getattr(options, name):
            raise UsageError(f"--{name}: is for classifiers; omit it for {model}")


def _retrieve(options: argparse.Namespace) -> int:
    """Run `predict` with --features or --gallery, or both. The exit code is 1 if any file could not be read.

    Several processes share the computation of the features.
    """
    from video_swinv2.evaluation.overrides import TestOverrides
    from video_swinv2.inference.formatting import format_search_results
    from video_swinv2.inference.retrieval import load_gallery, make_gallery, save_gallery, search

    # The gallery is loaded first, so that a wrong file is reported before the features are computed.
    gallery = load_gallery(options.gallery) if options.gallery else None
    with TestOverrides().session("start the same command again") as world:
        queries = make_gallery(options.model, options.sources, protocol=options.protocol or "center-1x1", world=world)
    if world.rank:
        return 0
    if options.features:
        save_gallery(queries, options.features)
        read = len(queries.reasons) - sum(map(bool, queries.reasons))
        # On standard error, because the search results go to standard output.
        print(for_terminal(f"wrote {options.features}: {read} of {len(queries.names)} files"), file=sys.stderr)
    if gallery is not None:
        print(format_search_results(search(gallery, queries, options.k), options.form))
    return 1 if any(queries.reasons) else 0


def _add_serve(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "serve a web page, on this machine only, that classifies a clip dropped on it"
    verb = add_verb(verbs, "serve", _serve, text, "video-swinv2 serve runs/a/model.safetensors")
    verb.add_argument("model", type=Path, metavar="MODEL", help="model file")
    verb.add_argument(
        "--port",
        type=whole_number(0, 65535),
        default=8000,
        help="port to listen on, 0 for any free one (default: %(default)s)",
    )
    verb.add_argument("--top", type=whole_number(), default=5, help="classes to show per clip (default: %(default)s)")
    verb.add_argument(
        "--protocol",
        default="videoswin-4x3",
        help="views of each clip, whose crops are also those of each segment over time (default: %(default)s)",
    )
    verb.add_argument(
        "--most-megabytes", type=number(0.001), default=200.0, help="largest clip accepted (default: %(default)g)"
    )
    verb.add_argument(
        "--most-seconds",
        type=number(0.1, WEEK_SECONDS),
        default=60.0,
        help="longest time spent on a clip (default: %(default)g)",
    )


def _serve(options: argparse.Namespace) -> None:
    from video_swinv2.inference.clip_summary import Limits
    from video_swinv2.inference.serve import serve

    limits = Limits(upload_bytes=int(options.most_megabytes * 10**6), seconds=options.most_seconds)
    serve(options.model, port=options.port, top=options.top, protocol=options.protocol, limits=limits)


def _add_export(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "export to torch.export or ONNX, and check that the exported program computes the same"
    example = "video-swinv2 export runs/a/model.safetensors model.onnx --check clip.mp4"
    verb = add_verb(verbs, "export", _export, text, example)
    verb.add_argument("model", type=Path, metavar="MODEL", help="model file")
    verb.add_argument("out", type=Path, metavar="OUT", help="file name ending in .onnx or .pt2")
    verb.add_argument(
        "--frames", type=whole_number(most=MAX_SIZE), metavar="N", help="frames per clip (default: as trained)"
    )
    verb.add_argument("--image-size", type=axis_sizes, metavar="H,W", help="pixels (default: as trained)")
    verb.add_argument("--window", type=axis_sizes, metavar="T,H,W", help="tokens (default: as trained)")
    verb.add_argument(
        "--opset",
        type=whole_number(),
        help="ONNX opset (default: 23, the first with an operator for scaled dot products; of a detector 20)",
    )
    verb.add_argument(
        "--check",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE|DIR",
        help="videos to compare the outputs on (default: random noise)",
    )


def _export(options: argparse.Namespace) -> None:
    from video_swinv2.inference.export import export

    comparison = export(
        options.model,
        options.out,
        frames=options.frames,
        image_size=options.image_size,
        window=options.window,
        opset=options.opset,
        check=options.check,
        report=lambda step: print(for_terminal(f"export: {step}"), file=sys.stderr, flush=True),
    )
    print(for_terminal(f"wrote {options.out}; {comparison}"))
