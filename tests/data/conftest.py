"""No data of this machine's own, and no network."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache, empty."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))  # ../shared/data is looked in too
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    monkeypatch.setenv("LIMBECK_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache
