"""Kill a preparation many times, and compare the result with that of an undisturbed run.

python -m tests.data_prep.kill SRC OUT --kills 40 --short-side 128

Every other kill hits the whole process group, otherwise only the parent; one in four comes during start-up, otherwise
at a random moment of the work, such that all runs together take about as long as the undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.state import PreparationState
from video_swinv2.files import sha256

PR_SET_CHILD_SUBREAPER = 36
LOOK_EVERY_SECONDS = 0.02
# Columns that differ between two runs with the same result.
OF_THE_RUN = {"id", "attempts", "seconds", "finished_at"}


@dataclass
class Work:
    """The cost of runs: attempts (`tries`) at videos, seconds workers spent on them, CPU seconds in all, starts."""

    tries: int = 0
    clip_seconds: float = 0.0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    starts: int = 0
    kills: dict[str, int] = field(default_factory=lambda: {"whole group": 0, "parent alone": 0})


@dataclass(frozen=True)
class Trial:
    """Both preparations compared; `differences` is empty if the results are the same."""

    calm: Work
    killed: Work
    clips: int
    differences: list[str]

    def excess(self) -> float:
        """Worker seconds, or attempts, relative to the undisturbed run: the larger of the two ratios."""
        of_time = self.killed.clip_seconds / max(self.calm.clip_seconds, 1e-9)
        return max(of_time, self.killed.tries / max(self.calm.tries, 1))

    def as_text(self) -> str:
        """The comparison as a table."""
        rows = [("", "left alone", "killed", "ratio")]
        for name in ("starts", "tries", "clip_seconds", "cpu_seconds", "wall_seconds"):
            one, other = getattr(self.calm, name), getattr(self.killed, name)
            rows.append((name.replace("_", " "), f"{one:.5g}", f"{other:.5g}", f"{other / max(one, 1e-9):.2f}"))
        lines = [f"{row[0]:14}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows]
        kills = ", ".join(f"{count} {what}" for what, count in self.killed.kills.items())
        same = "; ".join(self.differences[:5]) if self.differences else "the same in every file and row"
        return "\n".join([*lines, f"{self.clips} clips, kills: {kills}", f"compared: {same}"])


def trial(source: Path, out: Path, options: Sequence[str], *, kills: int, seed: int) -> Trial:
    """Prepare `source` in OUT/calm undisturbed and in OUT/killed with `kills` kills, and compare."""
    if sys.platform == "linux":  # adopt the orphans of a killed parent, so that their cost is counted
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    rng = random.Random(seed)
    command = [sys.executable, "-m", "data_prep", "prepare", str(source)]
    tail = ["--name", "killed", "--max-fail-rate", "1", *options]
    calm, killed = Work(), Work()
    start_seconds, whole_seconds = _undisturbed([*command, str(out / "calm"), *tail], out / "calm", calm)
    share = 2 * (whole_seconds - start_seconds) / kills
    finished, attempt = False, 0
    while sum(killed.kills.values()) < kills:
        attempt += 1
        # Once everything is done there is no work left to interrupt.
        limit = rng.uniform(0, start_seconds) if finished or attempt % 4 == 0 else None
        after, group = rng.uniform(0, share), attempt % 2 == 0
        if _disturbed([*command, str(out / "killed"), *tail], out / "killed", killed, limit, after, group=group):
            killed.kills["whole group" if group else "parent alone"] += 1
        else:
            finished = True
    _undisturbed([*command, str(out / "killed"), *tail], out / "killed", killed)
    for work, folder in ((calm, out / "calm"), (killed, out / "killed")):
        with PreparationState(folder) as state:
            rows = list(state.rows())
        work.tries += sum(row["attempts"] for row in rows)
        work.clip_seconds += sum(row["seconds"] or 0.0 for row in rows)
    return Trial(calm, killed, len(rows), differences(out / "calm", out / "killed"))


def differences(one: Path, other: Path) -> list[str]:
    """How two preparations differ, apart from when and how they were run: contents of files, rows, stray files."""
    found = []
    files, others = (_files(folder) for folder in (one, other))
    found += [f"{name}: in one alone" for name in sorted(set(files) ^ set(others))]
    found += [f"{name}: other bytes" for name in sorted(set(files) & set(others)) if files[name] != others[name]]
    rows, other_rows = (_rows(folder) for folder in (one, other))
    found += [
        f"row {name}: differs" for name in sorted(set(rows) | set(other_rows)) if rows.get(name) != other_rows.get(name)
    ]
    found += [f"{path}: a stray file" for path in other.rglob("*") if ".part" in path.name or ".preflight" in path.name]
    return found


def _files(folder: Path) -> dict[str, str]:
    known = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: sha256(path) for name, path in known.items() if not name.startswith("prep.sqlite")}


def _rows(folder: Path) -> dict[str, dict[str, object]]:
    with PreparationState(folder) as state:
        return {
            f"{row['split']} {row['name']}": {key: row[key] for key in row.keys() if key not in OF_THE_RUN}  # noqa: SIM118 - a Row iterates its values
            for row in state.rows()
        }


def _undisturbed(command: Sequence[str], out: Path, work: Work) -> tuple[float, float]:
    """(seconds until the first video is being written, total seconds) of a complete run."""
    started, first = time.monotonic(), None
    with _launched(command, work) as (process, log):
        while process.poll() is None:
            if first is None and _half_files(out):
                first = time.monotonic() - started
            time.sleep(LOOK_EVERY_SECONDS)
        whole = time.monotonic() - started
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{command} ended with {process.returncode}: {log.read().decode()[-500:]}")
    return first or whole, whole


def _disturbed(
    command: Sequence[str], out: Path, work: Work, limit: float | None, after: float, *, group: bool
) -> bool:
    """One run, killed `limit` seconds after its start, or `after` its first video; False if it finished first."""
    since: dict[str, float] = {}
    with _launched(command, work) as (process, _):
        started, first = time.monotonic(), None
        while process.poll() is None:
            now = time.monotonic()
            since = {name: since.get(name, now) for name in _half_files(out)}
            first = now if first is None and since else first
            if (limit is not None and now - started > limit) or (limit is None and first and now - first > after):
                with contextlib.suppress(ProcessLookupError):
                    (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
                process.wait()
                work.tries += len(since)
                work.clip_seconds += sum(now - when for when in since.values())
                return True
            time.sleep(LOOK_EVERY_SECONDS)
    return False


@contextlib.contextmanager
def _launched(command: Sequence[str], work: Work):  # type: ignore[no-untyped-def]  # a pair of Popen and file
    """The command in its own process group; its cost, and that of everything it leaves behind, is added to `work`."""
    before, started = os.times(), time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)
        yield process, log
        with contextlib.suppress(ChildProcessError):
            while True:  # orphans: the kernel kills the workers of a parent that was killed
                os.waitpid(-1, 0)
    after = os.times()
    work.cpu_seconds += after.children_user + after.children_system - before.children_user - before.children_system
    work.wall_seconds += time.monotonic() - started
    work.starts += 1


def _half_files(out: Path) -> list[str]:
    return [
        os.path.join(parent, name)
        for parent, _, names in os.walk(out / "videos")
        for name in names
        if name.endswith(".part")
    ]


def main() -> int:
    """Run the trial and print the result. Returns 1 if the results differ or too much work was done twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--excess", type=float, default=1.3, help="work allowed, over that of the run left alone")
    options, rest = parser.parse_known_args()
    result = trial(options.source, options.out, rest, kills=options.kills, seed=options.seed)
    print(result.as_text())
    return 1 if result.differences or result.excess() > options.excess else 0


if __name__ == "__main__":
    sys.exit(main())
