"""The public names of the package: found by `dir` and `help`, and imported only when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import video_swinv2 as vs
from tests.conftest import REPOSITORY


def test_public_names_are_found_and_documented() -> None:
    assert set(vs.__all__) <= set(dir(vs))
    page = (REPOSITORY / "docs" / "api.md").read_text()
    for name in vs.__all__:
        assert getattr(vs, name).__doc__, name
        assert f".{name}\n" in page, f"docs/api.md does not have {name}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vs.nothing  # noqa: B018


def test_looking_at_the_names_imports_nothing() -> None:
    """`import video_swinv2` and `dir` do not wait for torch, and `help` shows the public names."""
    script = """
import sys, video_swinv2
assert "VideoDataset" in dir(video_swinv2)
assert "torch" not in sys.modules
import pydoc
text = pydoc.plain(pydoc.render_doc(video_swinv2))
for name in video_swinv2.__all__:
    print(name in text, name)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(vs.__all__)
    assert all(line.startswith("True") for line in lines), done.stdout
