"""Command-line verbs that evaluate a model: `test`, `probe`, and `report`, which works from saved scores alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from video_swinv2.command import Verbs, add_verb, whole_number
from video_swinv2.errors import UsageError
from video_swinv2.escaping import for_terminal, terminal_lines
from video_swinv2.files import json_text


def add_testing_verbs(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add `test`, `probe` and `report`."""
    _add_test(verbs)
    _add_probe(verbs)
    _add_report(verbs)


def _add_test(verbs: Verbs[argparse.ArgumentParser]) -> None:
    example = "video-swinv2 test runs/a/model.safetensors data/k400 --protocol videoswin-4x3,center-1x1 --out runs/t"
    verb = add_verb(verbs, "test", _test, "measure the accuracy of a model on a data set and write a report", example)
    verb.add_argument("model", type=Path, metavar="MODEL", help="model file")
    verb.add_argument("data", type=Path, metavar="DATA", help="data set with labels")
    verb.add_argument(
        "--protocol",
        metavar="NAME[,NAME]",
        help="which views to test (default: videoswin-4x3); several protocols share one decode of each video, and each "
        "gets its own folder. Segmenters take one of whole (default), slide, whole-multi-scale and slide-multi-scale; "
        "detection.test_sides and detection.test_flip set the views of a detector",
    )
    verb.add_argument(
        "--split", default="test", help="split to test (default: %(default)s); `all` takes every image of a folder tree"
    )
    verb.add_argument(
        "--classes-by",
        choices=("name", "index"),
        default="name",
        help="how to read class folders of images: `name` (default) is the class name, `index` its position in the "
        "model's class list, as in ImageNet-V2",
    )
    verb.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for scores, results.json and report.html; the result of another test in it is not replaced",
    )
    verb.add_argument("--json", action="store_true", help="print the full result as JSON")
    verb.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, such as data.frame_stride=4"
    )


def _test(options: argparse.Namespace) -> None:
    from video_swinv2.distributed.launchers import is_rank_zero
    from video_swinv2.evaluation.overrides import parse_overrides
    from video_swinv2.evaluation.testing import run_tests, summarize_tests
    from video_swinv2.weights.store import read_card

    task = read_card(options.model).dense.get("task")
    if task == "segmentation":
        return _test_segmenter(options)
    if task == "detection":
        return _test_detector(options)
    results = run_tests(
        options.model,
        options.data,
        protocols=options.protocol or "videoswin-4x3",
        split=options.split,
        classes_by=options.classes_by,
        out=options.out,
        overrides=parse_overrides(options.overrides),
    )
    if is_rank_zero():  # all processes of a distributed test reach this line
        # One protocol is printed as its result, several as a dictionary by name.
        printed = results if len(results) > 1 else next(iter(results.values()))
        print(json_text(printed, indent=1) if options.json else summarize_tests(results, options.out))


def _test_segmenter(options: argparse.Namespace) -> None:
    from video_swinv2.distributed.launchers import is_rank_zero
    from video_swinv2.evaluation.overrides import parse_overrides
    from video_swinv2.evaluation.segmentation import run_segmentation_test, summarize_segmentation

    result = run_segmentation_test(
        options.model,
        options.data,
        protocol=options.protocol or "whole",
        split=options.split,
        out=options.out,
        overrides=parse_overrides(options.overrides),
    )
    if is_rank_zero():
        lines = summarize_segmentation(result, options.out)
        print(json_text(result, indent=1) if options.json else terminal_lines(lines))


def _test_detector(options: argparse.Namespace) -> None:
    from video_swinv2.distributed.launchers import is_rank_zero
    from video_swinv2.evaluation.detection import run_detection_test, summarize_detection
    from video_swinv2.evaluation.overrides import parse_overrides

    if options.protocol:
        raise UsageError(
            "--protocol: is not for detectors; detection.test_sides=[640,800] and detection.test_flip=true set their "
            "views"
        )
    overrides = parse_overrides(options.overrides)
    result = run_detection_test(options.model, options.data, split=options.split, out=options.out, overrides=overrides)
    if is_rank_zero():
        lines = summarize_detection(result, options.out)
        print(json_text(result, indent=1) if options.json else terminal_lines(lines))


def _add_probe(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "measure how good frozen features are, with k-NN and a linear classifier"
    example = "video-swinv2 probe runs/pre/model.safetensors data/photos --random-weights --out runs/pre/probe"
    verb = add_verb(verbs, "probe", _probe, text, example)
    verb.add_argument(
        "model", type=Path, metavar="MODEL", help="checkpoint file or Hub-style folder in any supported layout"
    )
    verb.add_argument("data", type=Path, metavar="DATA", help="images or videos with labels")
    verb.add_argument(
        "--method", choices=("knn", "linear", "both"), default="both", help="classifier (default: %(default)s)"
    )
    verb.add_argument("--train-split", metavar="NAME", help="split to fit on (default: train)")
    verb.add_argument(
        "--test-split",
        metavar="NAME",
        help="split to test on (default: val); data without splits is divided per class, by the seed",
    )
    verb.add_argument(
        "--k", type=whole_number(), default=20, metavar="N", help="number of neighbours (default: %(default)s)"
    )
    verb.add_argument(
        "--seeds",
        type=whole_number(most=1000),
        default=3,
        metavar="N",
        help="number of repetitions (default: %(default)s)",
    )
    verb.add_argument(
        "--random-weights", action="store_true", help="also probe the same architecture with random weights"
    )
    verb.add_argument(
        "--out", type=Path, metavar="DIR", help="write probe.json there, and keep the features for the next probe"
    )
    verb.add_argument("--json", action="store_true", help="print the full result as JSON")
    verb.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, such as data.image_size=256"
    )


def _probe(options: argparse.Namespace) -> None:
    from video_swinv2.evaluation.overrides import parse_overrides
    from video_swinv2.evaluation.probe import run_probe, summarize_probe

    overrides = parse_overrides(options.overrides)
    with overrides.session("start the same command again") as world:
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
            overrides=overrides,
            world=world,
        )
    if world.rank == 0:
        print(json_text(result, indent=1) if options.json else summarize_probe(result))


def _add_report(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "rebuild a report from saved scores, or compare several tests"
    verb = add_verb(verbs, "report", _report, text, "video-swinv2 report runs/a/test runs/b/test --out a-against-b")
    verb.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="--out folder of an earlier `test`")
    verb.add_argument(
        "--run",
        dest="run_folder",
        type=Path,
        metavar="DIR",
        help="folder of the training run (default: the folder of the model file)",
    )
    verb.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("comparison"),
        help="folder for the comparison (default: %(default)s)",
    )
    verb.add_argument("--json", action="store_true", help="print the full result as JSON")


def _report(options: argparse.Namespace) -> None:
    from video_swinv2.report.compare import report_tests
    from video_swinv2.report.dense import dense_task

    tasks = {folder: dense_task(folder) for folder in options.folders}
    if dense := [folder for folder, task in tasks.items() if task]:
        if len(options.folders) > 1:
            raise UsageError(
                f"{dense[0]}: a test of {tasks[dense[0]]} cannot be compared; name one folder, for its report"
            )
        if options.run_folder:
            raise UsageError(f"--run {options.run_folder}: is not for a test of {tasks[dense[0]]}; omit it")
        _rebuild_dense_report(dense[0], tasks[dense[0]], options.json)
        return
    result, lines = report_tests(options.folders, out=options.out, run=options.run_folder)
    print(json_text(result, indent=1) if options.json else terminal_lines(lines))


def _rebuild_dense_report(folder: Path, task: str, as_json: bool) -> None:
    from video_swinv2.report.dense import REPORT, RESULTS
    from video_swinv2.report.detection import write_detection_report
    from video_swinv2.report.segmentation import write_segmentation_report

    {"detection": write_detection_report, "segmentation": write_segmentation_report}[task](folder)
    print((folder / RESULTS).read_text(encoding="utf-8") if as_json else for_terminal(str(folder / REPORT)))
