"""Command-line verbs for training: `pretrain`, `train`, and `plan`, which estimates the cost of either."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from video_swinv2.command import MAX_SEED, Verbs, add_verb, number, whole_number, whole_numbers
from video_swinv2.files import json_text


def add_training_verbs(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add `pretrain`, `train` and `plan`."""
    _add_run(verbs, "pretrain", _pretrain, "pre-train with SimMIM on images, video frames or clips")
    train = _add_run(
        verbs,
        "train",
        _train,
        "train on labelled images or clips: classification, or the task that the configuration names",
    )
    series = train.add_mutually_exclusive_group()
    series.add_argument(
        "--seeds",
        type=whole_numbers(0, MAX_SEED),
        metavar="0,1,2",
        help="one run after the other, with each of these seeds in out/seed-SEED; prints mean and spread",
    )
    series.add_argument(
        "--folds",
        type=whole_number(2),
        metavar="K",
        help="one run after the other, in out/fold-0 and so on, on each of the K folds that `python -m data_prep split "
        "--folds K` has made of the data set; prints mean and spread",
    )
    _add_plan(verbs)


def _add_run(
    verbs: Verbs[argparse.ArgumentParser], name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    example = f"torchrun --nproc_per_node 8 -m video_swinv2 {name} CONFIG.yaml optim.lr=3e-4 out=runs/a"
    verb = add_verb(verbs, name, run, text, example)
    _add_config(verb)
    verb.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on from the run's checkpoint with other settings, even if they affect what the model learns",
    )
    return verb


def _add_config(verb: argparse.ArgumentParser) -> None:
    # Shared by all three verbs, so that `plan` accepts exactly what the training command will be given.
    verb.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; see configs/ for examples")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="override values of the file")


def _pretrain(options: argparse.Namespace) -> None:
    from video_swinv2.config import load_config
    from video_swinv2.plan.plan import plan_micro_batch
    from video_swinv2.training.loop import run
    from video_swinv2.training.tasks.choosing import task_to_pretrain

    config = load_config(options.config, options.overrides)
    planner = functools.partial(plan_micro_batch, pretraining=True)
    run(config, task_to_pretrain(config), planner, accept_changes=options.accept_changes)


def _train(options: argparse.Namespace) -> None:
    from video_swinv2.config import load_config
    from video_swinv2.plan.plan import plan_micro_batch
    from video_swinv2.training.loop import run
    from video_swinv2.training.series import run_series, with_folds, with_seeds
    from video_swinv2.training.tasks.choosing import task_to_train

    config = load_config(options.config, options.overrides)
    make_task = task_to_train(config)
    if options.seeds or options.folds:
        configs = with_seeds(config, options.seeds) if options.seeds else with_folds(config, options.folds)
        run_series(configs, make_task, plan_micro_batch, accept_changes=options.accept_changes)
    else:
        run(config, make_task, plan_micro_batch, accept_changes=options.accept_changes)


def _add_plan(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "estimate memory, compute and number of steps of a training run before starting it"
    example = "video-swinv2 plan CONFIG.yaml engine.zero_stage=3 --processes 8 --memory 80GB"
    verb = add_verb(verbs, "plan", _plan, text, example)
    _add_config(verb)
    verb.add_argument(
        "--processes", type=whole_number(), default=1, metavar="N", help="number of devices (default: %(default)s)"
    )
    verb.add_argument("--pretrain", action="store_true", help="plan `pretrain` instead of `train`")
    verb.add_argument(
        "--samples",
        type=whole_number(most=10**12),
        metavar="N",
        help="training samples, if the data is not on this machine",
    )
    verb.add_argument("--classes", type=whole_number(), metavar="N", help="classes, if the data is not on this machine")
    verb.add_argument(
        "--memory",
        type=_byte_count,
        metavar="80GB",
        help="memory per device (default: that of this machine's device); exit code 1 if the run does not fit",
    )
    verb.add_argument(
        "--tflops",
        type=number(1e-6),
        metavar="N",
        help="sustained training speed of one device; measure it with `bench train`",
    )
    verb.add_argument("--quick", action="store_true", help="skip measuring how fast this machine reads and computes")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _plan(options: argparse.Namespace) -> int:
    """Run `plan`. The exit code is 1 if memory, disk space or data loading workers do not suffice."""
    from video_swinv2.config import load_config
    from video_swinv2.plan.plan import make_plan, shortfalls
    from video_swinv2.plan.step_memory import memory_here
    from video_swinv2.plan.tables import plan_text

    config = load_config(options.config, options.overrides)
    plan = make_plan(
        config,
        processes=options.processes,
        samples=options.samples,
        classes=options.classes,
        pretraining=options.pretrain,
        tflops=options.tflops,
        memory=options.memory,
        measuring=not options.quick,
    )
    memory = memory_here(plan.device, plan.processes) if options.memory is None else options.memory
    problems = shortfalls(plan, config, memory)
    # `asdict` leaves out properties, such as `peak`.
    values = dataclasses.asdict(plan) | {"peak": plan.peak, "memory": memory, "problems": problems}
    print(json_text(values, indent=1) if options.json else plan_text(plan, problems, memory))
    return int(bool(problems))


def _byte_count(text: str) -> int:
    """Parse an amount of memory, such as `80GB` (10^9 bytes each) or `80GiB` (2^30 bytes each), for argparse."""
    for unit, size in (("GiB", 2**30), ("GB", 10**9)):
        if text.endswith(unit):
            try:
                if (memory := int(float(text.removesuffix(unit)) * size)) > 0:
                    return memory
            except (ValueError, OverflowError):  # also nan and inf
                break
    raise argparse.ArgumentTypeError(f"{text[:50]!r} is not an amount of memory such as 80GB or 80GiB")
