"""What pyproject.toml says against what is there: a package left out of it would be missing in the wheel only."""

import re
import sys

import pytest

from tests.conftest import REPOSITORY
from video_swinv2.tools.demo import recipe


def project():
    if sys.version_info < (3, 11):
        pytest.skip("reading TOML needs Python 3.11")
    import tomllib

    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_every_package_is_listed():
    folders = {
        path.parent for room in ("video_swinv2", "data_prep") for path in (REPOSITORY / room).rglob("__init__.py")
    }
    there = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
    assert set(project()["tool"]["setuptools"]["packages"]) == there | {"video_swinv2.configs"}


def test_every_page_travels_in_the_wheel():
    data = project()["tool"]["setuptools"]["package-data"]
    pages = {path.parent.relative_to(REPOSITORY) for path in REPOSITORY.glob("[dv]*/**/*.j2")}
    assert pages
    assert all("*.j2" in data[".".join(folder.parts)] for folder in pages)


def test_every_dependency_is_pinned():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    extras = project()["project"]["optional-dependencies"].values()
    wanted = project()["project"]["dependencies"] + [text for extra in extras for text in extra]
    names = {re.match(r"[A-Za-z0-9_.-]+", text)[0].lower() for text in wanted}
    assert names - {"video-swinv2"} <= pinned  # an extra may name another of ours


def test_recipes_are_found():
    assert recipe("demo/finetune.yaml").is_file()
