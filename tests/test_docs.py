"""The documentation is true: commands parse, configuration keys and linked files exist, the Python runs."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_prep.cli import main as prepare_main
from data_prep.cli import make_parser as data_prep_parser
from tests.conftest import REPOSITORY
from video_swinv2.cli import make_parser as toolkit_parser
from video_swinv2.command import parse_arguments
from video_swinv2.config import known_keys
from video_swinv2.evaluation.overrides import KEYS as TEST_KEYS
from video_swinv2.evaluation.overrides import TestOverrides
from video_swinv2.evaluation.testing import run_test

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
RECIPES = sorted((REPOSITORY / "configs").rglob("*.yaml"))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of every command of ours in a shell text: continued lines joined, comments and launchers removed."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).replace("...", "").strip().rstrip(";")
        start = re.search(
            r"(?:-m |--module |^|'|srun .*?)(video-swinv2|video_swinv2|python -m data_prep|data_prep)\s+(?=\S)", line
        )
        if start is None or "sbatch configs" in line:
            continue
        program = "data_prep" if "data_prep" in start[1] else "video-swinv2"
        found.append(
            [
                program,
                *shlex.split(line[start.end() :].rstrip("'").replace("$SLURM_CPUS_PER_TASK", "8").replace("$", "")),
            ]
        )
    return found


def documented() -> list[tuple[str, list[str]]]:
    """Every command of the pages and of the recipes' headers, each with where it stands."""
    found = [
        (str(page.relative_to(REPOSITORY)), words)
        for page in PAGES
        for block in blocks(page, "bash")
        for words in commands(block)
    ]
    for recipe in RECIPES:
        header = re.sub(r"\n#\s{2,}", " ", recipe.read_text(encoding="utf-8"))
        for line in re.findall(r"^# (?:command|then|before): (.*)$", header, re.MULTILINE):
            found += [(str(recipe.relative_to(REPOSITORY)), words) for words in commands(re.sub(r"\(.*", "", line))]
    return found


def test_there_are_commands_to_check() -> None:
    places = {place for place, _ in documented()}
    assert {"README.md", "docs/start.md", "docs/train.md", "docs/howto/slurm.md"} <= places
    assert len(documented()) > 100


@pytest.mark.parametrize(("place", "words"), documented(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_documented_command_parses(place: str, words: list[str]) -> None:
    program, *arguments = words
    parser = data_prep_parser() if program == "data_prep" else toolkit_parser()
    if "--help" in arguments:
        return
    complaint = io.StringIO()
    options = None
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(complaint):
        options = parse_arguments(parser, arguments)
    assert options is not None, f"{place}: {' '.join(words)}\n{complaint.getvalue()}"
    keys = set(known_keys())
    for override in getattr(options, "overrides", []):
        key = override.partition("=")[0]
        if options.verb in ("test", "probe"):
            assert key in TEST_KEYS, f"{place}: {key} is no setting of a test"
        else:
            assert key in keys, f"{place}: {key} is no key of the configuration"
    config = getattr(options, "config", None)
    if config is not None and str(config).startswith("configs/"):
        assert (REPOSITORY / config).is_file(), f"{place}: {config} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
    for path in re.findall(r"`((?:configs|tests|docs|data_prep|video_swinv2)/[\w./-]+\.(?:py|md|yaml|sh))", text):
        assert (REPOSITORY / path).exists(), f"{page.name}: {path}"


def test_every_page_is_on_the_site() -> None:
    text = re.sub(r"!!python/name:\S+", "''", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(nav: object) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        parts = nav.values() if isinstance(nav, dict) else nav
        return [page for part in parts for page in pages(part)]  # type: ignore[attr-defined]

    listed = set(pages(yaml.safe_load(text)["nav"]))
    assert listed == {str(page.relative_to(REPOSITORY / "docs")) for page in PAGES if "docs" in page.parts}


def test_the_library_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its shell command and its Python as they stand, and `test` finds the accuracy that the page computes."""
    page = REPOSITORY / "docs" / "library.md"
    monkeypatch.chdir(tmp_path)
    (command,) = (words for block in blocks(page, "bash") for words in commands(block))
    assert prepare_main(command[1:]) == 0
    script = "\n".join(blocks(page, "python"))
    exec(compile(script, str(page), "exec"), {"__name__": "library"})
    printed = capsys.readouterr().out
    assert re.search(r"last loss \d+\.\d{3} after 8 steps", printed)
    accuracy = re.search(r"4x3 top-1: (.+) % \[(.+), (.+)\] of 16 videos", printed)
    assert accuracy is not None
    assert "kernel" not in printed
    assert "[32, 64, 128, 256] [4, 8, 16, 32]" in printed
    overrides = TestOverrides(workers=0)
    result = run_test(
        Path("motions"),
        Path("data/motions"),
        protocol="videoswin-4x3",
        split="test",
        out=Path("t"),
        overrides=overrides,
    )
    found = [result["top1"], *result["top1_interval"]]
    assert [float(number) for number in accuracy.groups()] == pytest.approx([100 * share for share in found], abs=0.005)


def masked(line: str) -> str:
    """A line of output without fingerprints and numbers, which differ between machines, and without extra spaces."""
    return re.sub(r"\b[0-9a-f]{12}\b|\d+([.]\d+)?", "#", " ".join(line.split()))


def write_own_clips(folder: Path) -> None:
    """What the page on own videos starts with: four people who do three things twice, and a file that says who."""
    command = ["synth", str(folder / "made"), "--train", "8", "--val", "0", "--test", "0", "--size", "64"]
    assert prepare_main(command) == 0
    rows = ["path,group"]
    for label, motion in {"cutting": "down", "pouring": "clockwise", "stirring": "left"}.items():
        (folder / "clips" / label).mkdir(parents=True)
        for number, clip in enumerate(sorted((folder / "made" / "videos" / "train" / motion).iterdir())):
            person = ("anna", "ben", "cem", "dora")[number // 2]
            path = f"{label}/{person}_{number % 2 + 1}.mp4"
            clip.rename(folder / "clips" / path)
            rows.append(f"{path},{person}")
    (folder / "groups.csv").write_text("\n".join(rows) + "\n")
    shutil.rmtree(folder / "made")


def test_the_page_on_own_videos_runs(tmp_path: Path) -> None:
    """Each of its commands in its order, in a folder with nothing but clips and groups, does what the page says.

    The one thing replaced is the port, which may be in use here.
    """
    page = REPOSITORY / "docs" / "howto" / "own-data.md"
    write_own_clips(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    printed: list[str] = []
    served: list[subprocess.Popen[str]] = []

    def start(line: str) -> subprocess.Popen[str]:
        command = ["bash", "-c", f"exec {line.replace('8000', port)}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)  # type: ignore[call-overload, no-any-return]

    try:
        for line in "".join(blocks(page, "bash")).splitlines():
            process = start(line)
            assert process.stdout is not None
            if line.startswith("video-swinv2 serve "):
                served.append(process)
                while not printed[-1].startswith("serving on "):
                    printed.append(process.stdout.readline().rstrip("\n"))
                    assert process.poll() is None, printed[-5:]
                continue
            output, errors = process.communicate(timeout=600)
            printed += [*errors.splitlines(), *output.splitlines()]
            assert process.returncode == 0, f"{line}\n{output}{errors}"
        answer = json.loads(printed[-1])
    finally:
        for process in served:
            process.terminate()
            process.communicate(timeout=60)

    shown = "".join(blocks(page, "text")).splitlines()
    found = set(map(masked, printed))
    assert [line for line in shown if masked(line.replace("8000", port)) not in found] == [], "\n".join(printed)
    promised = re.findall(r"`((?:data/clips|runs/clips|compare)/[\w./-]+|clips[.]yaml)`", page.read_text())
    assert len(set(promised)) > 8
    assert [path for path in promised if not (tmp_path / path).exists()] == []
    groups = {
        split: {row["group"] for row in csv.DictReader((tmp_path / "data" / "clips" / f"{split}.csv").open())}
        for split in ("train", "val", "test")
    }
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == 4
    assert {each["name"] for each in answer["answers"]} == {"cutting", "pouring", "stirring"}
