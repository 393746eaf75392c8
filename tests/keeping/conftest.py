"""A runtime directory of each test's own, in which nothing may be left."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bases.conftest import no_leaks

__all__ = ["no_leaks", "runtime"]


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="cowkit-test-") as made:
        place = Path(made) / "run"
        monkeypatch.setenv("COWKIT_RUNTIME_DIR", str(place))
        yield place
        assert not place.exists() or list(place.iterdir()) == [], "nothing is left behind"
