from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bases import helpers


@pytest.fixture(scope="session")
def content() -> bytes:
    return helpers.content_of(3 * helpers.MIB + 512)


@pytest.fixture
def raw(tmp_path: Path, content: bytes) -> Path:
    """The content as a raw disk, sparse where it is zero."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(len(content))
        for at in range(0, len(content), 4096):
            if any(content[at : at + 4096]):
                file.seek(at)
                file.write(content[at : at + 4096])
    return path


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Nothing is open or running after the test that was not before."""
    before = helpers.descriptors(), helpers.children(), helpers.own_threads()
    yield
    assert (helpers.descriptors(), helpers.children(), helpers.own_threads()) == before
