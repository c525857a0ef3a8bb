"""The documentation is true: commands parse, configuration keys and linked files exist, the Python runs."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
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
