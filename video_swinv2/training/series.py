"""Several runs of one configuration, one after the other: with other seeds, or on the folds of a data set.

Each run has a folder of its own below the configuration's `out`, and `series.json` there has the figures of those that
have finished. The same command resumes the series: a run that has finished only says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from video_swinv2.config import Config
from video_swinv2.distributed.collectives import print_on_rank_zero
from video_swinv2.distributed.world import join_world, leave_world
from video_swinv2.errors import UsageError
from video_swinv2.escaping import for_terminal, terminal_lines
from video_swinv2.files import write_json
from video_swinv2.records import Record, read_record
from video_swinv2.report.training_run import SERIES_FILE, Series, SeriesRun, metric_text
from video_swinv2.training.loop import run
from video_swinv2.training.metrics import read_metrics
from video_swinv2.training.start import PlanMicroBatch
from video_swinv2.training.tasks.base import MakeTask


class _Finished(Record, extra="ignore"):
    """What a series needs of the run.json of a run that has finished."""

    best: float | None
    best_metric: str
    best_step: int


def with_seeds(config: Config, seeds: Sequence[int]) -> dict[str, Config]:
    """The configurations of a series, by the names of their folders: one for each seed."""
    if len(set(seeds)) < len(seeds):
        raise UsageError("--seeds: names a seed twice; give each once")
    return {f"seed-{seed}": _in_folder(dataclasses.replace(config, seed=seed), f"seed-{seed}") for seed in seeds}


def with_folds(config: Config, folds: int) -> dict[str, Config]:
    """The configurations of a series, by the names of their folders: one for each fold of the data set.

    Fold K of a data set is its list fold-K.csv, which `data_prep split --folds` writes. Raises UsageError if the data
    set is not divided into so many.
    """
    source = Path(config.data.source[0])
    found = len(list(source.glob("fold-*.csv")))
    names = [f"fold-{fold}" for fold in range(folds)]
    if found != folds or not all((source / f"{name}.csv").is_file() for name in names):
        raise UsageError(
            f"--folds: {source} has {found} lists of folds, not {folds}; run `python -m data_prep split {source} "
            f"--folds {folds}`, or give the number it has"
        )
    configs = {}
    for name in names:
        data = dataclasses.replace(config.data, source=(str(source / f"{name}.csv"),))
        configs[name] = _in_folder(dataclasses.replace(config, data=data), name)
    return configs


def _in_folder(config: Config, name: str) -> Config:
    return dataclasses.replace(config, out=str(Path(config.out) / name))


def run_series(
    configs: Mapping[str, Config],
    make_task: MakeTask,
    plan_micro_batch: PlanMicroBatch | None = None,
    *,
    accept_changes: bool = False,
) -> None:
    """Do the runs of `with_seeds` or `with_folds` in order, and print mean and spread of their validations.

    plan_micro_batch, accept_changes: those of `training.loop.run`.

    Raises what `training.loop.run` raises. A stopped run ends the series, until the same command is started again.
    """
    first = next(iter(configs.values()))
    # Joined once for all runs: processes that have left a group cannot rely on the launcher to meet again.
    world = join_world(first.engine.device, first.engine.meeting_seconds)
    try:
        finished: list[SeriesRun] = []
        for number, (name, config) in enumerate(configs.items(), start=1):
            print_on_rank_zero(world, for_terminal(f"run {number} of {len(configs)}: {config.out}"))
            folder = run(config, make_task, plan_micro_batch, accept_changes=accept_changes)
            if world.rank == 0:
                record = read_record(folder / "run.json", _Finished)
                finished += _figures(name, folder, record)
                _write_series(folder.parent, record.best_metric, finished)
    finally:
        if world.size == 1:  # with several, an error has ended all processes, or the others may wait for this one
            leave_world()
    leave_world()


def _figures(name: str, folder: Path, record: _Finished) -> list[SeriesRun]:
    """The figures of a run that has finished; none without a validation split."""
    measured = [line[record.best_metric] for line in read_metrics(folder) if record.best_metric in line]
    if record.best is None or not measured:
        return []
    return [SeriesRun(name=name, best=record.best, best_step=record.best_step, last=measured[-1])]


def _write_series(out: Path, metric: str, finished: Sequence[SeriesRun]) -> None:
    """Write series.json and print the runs that have finished, with mean and spread."""
    if not finished:
        return
    series = Series(metric=metric, runs=list(finished))
    write_json(out / SERIES_FILE, series.model_dump())
    rows = [
        f"  {each.name:10s}best {metric_text(metric, each.best)} at step {each.best_step}, "
        f"last {metric_text(metric, each.last)}"
        for each in finished
    ]
    print(terminal_lines([f"{out}: {series.summary()}", *rows]))
