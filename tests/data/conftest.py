"""Fixtures of the tests of data/: a cache folder of their own."""

import pytest

from video_swinv2.data import index


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Indexes are kept here, and trusted at once although the files of a test have always changed just now."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(index, "SETTLED_SECONDS", 0.0)
    return folder
