"""Fixtures shared by the tests of downloading."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from data_prep import fetch as fetching
from tests.data_prep.mirror import Server, serving


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetching, "FIRST_PAUSE_SECONDS", 0.001)
    with serving() as server:
        yield server
