"""A client that is busy with many replies is left to send more requests before the next are answered."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from cowkit.server import gathering
from cowkit.server.gathering import Gathering
from cowkit.server.sending import make_room
from cowkit.server.server import NbdServer
from tests.server.raw_client import READ, TIMEOUT, RawClient, assert_serves, serving, where

BLOCK = 4096
DEPTH = 64
SIZE = DEPTH * BLOCK


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each was to be, in seconds."""
    naps: list[float] = []
    monkeypatch.setattr(gathering, "sleep", naps.append)
    return naps


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        yield one, other


def test_a_client_with_little_to_read_is_not_made_to_wait(
    pair: tuple[socket.socket, socket.socket], naps: list[float]
) -> None:
    for _ in range(8):  # the kernel's reckoning counts twice that
        pair[0].send(bytes(BLOCK))
    assert not Gathering(pair[0]).nap()
    assert naps == []


def test_the_more_it_has_to_read_the_longer_the_nap(
    pair: tuple[socket.socket, socket.socket], naps: list[float]
) -> None:
    for more in (95_000, 20_000):
        pair[0].send(bytes(more))
        assert Gathering(pair[0]).nap()
    short, long = naps
    assert 0 < short < long

    pair[1].recv(115_000, socket.MSG_WAITALL)
    assert not Gathering(pair[0]).nap()


def test_no_nap_is_longer_than_a_tenth_of_a_millisecond_however_much_there_is_to_read(
    pair: tuple[socket.socket, socket.socket], naps: list[float]
) -> None:
    make_room(pair[0])
    with suppress(BlockingIOError):
        while True:
            pair[0].send(bytes(4096))
    assert Gathering(pair[0]).nap()
    assert naps[0] <= 60e-6  # and 50 microseconds of slack


def test_over_tcp_nobody_naps_since_the_kernel_does_not_tell_what_the_client_has_read(naps: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        server, _ = listener.accept()
        with server:
            client.send(bytes(200_000))
            assert not Gathering(server).nap() and not Gathering(client).nap()
    assert naps == []


def test_a_socket_that_was_closed_meanwhile_is_nobody_to_wait_for(
    pair: tuple[socket.socket, socket.socket], naps: list[float]
) -> None:
    waiting = Gathering(pair[0])
    pair[0].close()
    assert not waiting.nap()
    assert naps == []


@pytest.fixture
def server() -> Iterator[NbdServer]:
    with serving(SIZE) as server:
        yield server


@pytest.fixture
def deep(server: NbdServer) -> Iterator[RawClient]:
    """A client with ``DEPTH`` replies to read, which the server has sent all at once."""
    with RawClient(where(server)).negotiate("simple") as client:
        client.send(b"".join(client.request(READ, index * BLOCK, BLOCK)[1] for index in range(DEPTH)))
        client.sock.recv(1, socket.MSG_PEEK)
        yield client


class Nap:
    """Stands in for sleeping: something happens meanwhile, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object] = lambda: None) -> None:
        self.happens = happens
        self.times = 0
        self.over = threading.Event()
        monkeypatch.setattr(gathering, "sleep", self)

    def __call__(self, seconds: float) -> None:
        self.times += 1
        if self.times == 1:
            self.happens()
            self.over.set()


def test_what_comes_during_a_nap_is_answered_with_what_was_there(
    deep: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = (deep.request(READ, index * BLOCK, BLOCK)[1] for index in range(4))
    nap = Nap(monkeypatch, lambda: deep.send(b"".join(others)))
    deep.send(first)
    assert nap.over.wait(TIMEOUT)
    assert all(deep.reply().data == bytes(BLOCK) for _ in range(DEPTH + 4))
    assert nap.times == 1  # so few requests by themselves would be worth another


def test_a_nap_in_which_nothing_comes_holds_no_reply_back(deep: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    nap = Nap(monkeypatch)
    _, request = deep.request(READ, 0, BLOCK)
    deep.send(request)
    assert nap.over.wait(TIMEOUT)
    assert all(deep.reply().data == bytes(BLOCK) for _ in range(DEPTH + 1))


def test_a_client_that_leaves_during_a_nap_ends_its_connection_and_no_other(
    server: NbdServer, deep: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    nap = Nap(monkeypatch, deep.close)
    _, request = deep.request(READ, 0, BLOCK)
    deep.send(request)
    assert nap.over.wait(TIMEOUT)
    assert_serves(server)


def test_requests_that_come_together_are_answered_at_once(deep: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    nap = Nap(monkeypatch)
    deep.send(b"".join(deep.request(READ, index * BLOCK, BLOCK)[1] for index in range(8)))
    assert all(deep.reply().data == bytes(BLOCK) for _ in range(DEPTH + 8))
    assert nap.times == 0
