"""Fuzzer: damages sound files in seeded ways and lets everything that reads files read them. Run by `make fuzz`.

    python -m tests.hostile.fuzz --minutes 30                   # other mutants each time
    python -m tests.hostile.fuzz --mutants 5000 --kind video    # the same mutants each time
    python -m tests.hostile.fuzz --only video:1234              # one mutant again, with its traceback

A mutant is a function of its kind and number alone. It may be read, or refused with one line that names it. Everything
else is a fault: another exception, a process that dies or does not answer, more than 2 GiB of memory, a refusal that
does not name the file or takes several lines, and a sound seed that is refused. The files of faults are kept in the
folder `--keep`, and the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.pool import Allow, Lost, run_jobs
from tests.hostile.seeds import mutate, write_seeds
from tests.hostile.targets import TARGETS
from video_swinv2.errors import UserError
from video_swinv2.memory import peak_memory_bytes

MAX_BYTES = 2 * 2**30
# Before a reading counts as hung. The time limits of the reader are half a minute for each of its calls.
HANG_SECONDS = 300.0
SOUND = -1  # in place of the number of a mutant: the seed as it is


@dataclasses.dataclass(frozen=True)
class Trial:
    """One reading of one mutant: the place of the function in TARGETS[kind], and the seed that is mutated."""

    kind: str
    target: int
    seed: Path
    number: int
    folder: Path

    @property
    def name(self) -> str:
        """What happened to which mutant, as in `video:1234 reader`."""
        number = self.seed.name if self.number == SOUND else self.number
        return f"{self.kind}:{number} {TARGETS[self.kind][self.target].__name__}"

    def write(self) -> tuple[Path, str]:
        """Write the mutant into a new folder -> (its path, what was done to the seed)."""
        content, done = self.seed.read_bytes(), "sound"
        if self.number != SOUND:
            content, done = mutate(content, self.kind, self.number)
        folder = Path(tempfile.mkdtemp(prefix=f"{self.kind}-{self.number}-", dir=self.folder))
        # Lists, records and boxes refer to what is beside them.
        if self.kind in ("list", "record", "boxes"):
            shutil.copytree(self.seed.parent, folder, copy_function=os.link, dirs_exist_ok=True)
            (folder / self.seed.name).unlink()
        path = folder / self.seed.name
        path.write_bytes(content)
        return path, done


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a reading ended: `fault` is '' unless it ended in none of the allowed ways."""

    read: bool
    fault: str
    peak_bytes: int


def judge(trial: Trial, allow: Allow) -> Verdict:
    """Executed by a worker: read the mutant and judge how that ended."""
    _reset_peak_memory()
    path, _ = trial.write()
    read, fault = True, ""
    try:
        TARGETS[trial.kind][trial.target](path)
    except UserError as error:
        read = False
        if not re.search(rf"{re.escape(path.name)}|{re.escape(str(path.parent))}", str(error)):
            fault = f"does not name its file: {error}"
        elif "\n" in str(error).strip():
            fault = f"takes several lines: {error}"
        elif trial.number == SOUND:
            fault = f"is refused although nothing was changed: {error}"
    except Exception:
        read, fault = False, traceback.format_exc()
    finally:
        shutil.rmtree(path.parent)
    peak = peak_memory_bytes()
    if not fault and peak > MAX_BYTES:
        fault = f"takes {peak / 2**30:.1f} GiB"
    return Verdict(read, fault, peak)


def trials(kinds: list[str], seeds: dict[str, list[Path]], numbers: Iterator[int], folder: Path) -> Iterator[Trial]:
    """Every reading of every sound seed, then every reading of every mutant, the kinds in turn."""
    for kind in kinds:
        for seed, place in itertools.product(seeds[kind], range(len(TARGETS[kind]))):
            yield Trial(kind, place, seed, SOUND, folder)
    for number in numbers:
        kind = kinds[number % len(kinds)]
        seed = seeds[kind][number // len(kinds) % len(seeds[kind])]
        for place in range(len(TARGETS[kind])):
            yield Trial(kind, place, seed, number, folder)


def main() -> int:
    """Run the fuzzer and print how many readings ended how."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to go on (30)")
    parser.add_argument("--mutants", type=int, help="a fixed number of mutants instead, always the same ones")
    parser.add_argument("--kind", choices=sorted(TARGETS), action="append", help="only this kind of file; repeatable")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="only this mutant")
    parser.add_argument("--first", type=int, help="number of the first mutant (0 with --mutants, else by the clock)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder for the files of faults")
    given = parser.parse_args()
    kinds = given.kind or sorted(TARGETS)
    first = given.first if given.first is not None else 0 if given.mutants or given.only else int(time.time())
    numbers: Iterator[int] = itertools.count(first)
    if given.mutants:
        numbers = iter(range(first, first + given.mutants))
    elif not given.only:
        until = time.monotonic() + 60 * given.minutes
        numbers = itertools.takewhile(lambda _: time.monotonic() < until, numbers)
    if given.only:
        kind, _, number = given.only.partition(":")
        kinds, numbers = [kind], iter([int(number)])
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    seeds = write_seeds(folder / "seeds", kinds)
    print("seeds:", ", ".join(f"{len(paths)} {kind}" for kind, paths in seeds.items()), flush=True)
    read, refused, faults, peak = Counter[str](), Counter[str](), 0, 0
    jobs = trials(kinds, seeds, numbers, folder)
    for trial, verdict in run_jobs(judge, jobs, workers=given.workers, seconds_for=lambda _: HANG_SECONDS):
        what = TARGETS[trial.kind][trial.target].__name__
        if isinstance(verdict, Lost):
            verdict = Verdict(False, f"{verdict.reason}: {verdict.detail}", 0)
        peak = max(peak, verdict.peak_bytes)
        read[what] += verdict.read
        refused[what] += not verdict.read and not verdict.fault
        if verdict.fault:
            faults += 1
            given.keep.mkdir(parents=True, exist_ok=True)
            path, done = trial.write()
            kept = given.keep / f"{trial.name.replace(' ', '-').replace(':', '-')}{path.suffix}"
            shutil.move(path, kept)
            print(f"FAULT {trial.name} ({done}; {kept})\n  {verdict.fault.strip()}", flush=True)
    for what in sorted(read | refused):
        print(f"{what:20} {read[what]:6} read {refused[what]:6} refused")
    print(f"{faults} faults, at most {peak / 2**30:.2f} GiB in a process")
    shutil.rmtree(folder)
    return 1 if faults else 0


def _reset_peak_memory() -> None:
    """Let this process's peak memory begin anew, so that it is that of one reading."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    sys.exit(main())
