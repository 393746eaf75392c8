"""What tests of the process that counts share."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from cowkit.server import awake, counting
from tests.server.waiting import until


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in `cowkit serve`, where no cgroup has a quota."""
    monkeypatch.delenv("COWKIT_EAGER", raising=False)
    monkeypatch.setattr(awake, "is_rationed", lambda: False)
    counting.allow()
    yield
    counting.allow(yes=False)
    until(lambda: not awake._one.locked())


@pytest.fixture
def pair() -> Iterator[socket.socket]:
    """One end of a connection to ourselves."""
    here, there = socket.socketpair()
    with here, there:
        yield here
