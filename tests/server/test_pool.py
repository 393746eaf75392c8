"""Several busy connections share one thread, and notice nothing of it."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowkit import CowDisk
from cowkit.server import pool
from cowkit.server.server import NbdServer
from tests.server.raw_client import DISC, READ, TRIM, WRITE, RawClient, open_files, serving, where

SIZE = 32 << 20
CLIENTS = 4

pytestmark = pytest.mark.skipif(not pool._INTERPRETER_IS_SHARED, reason="each thread has the interpreter to itself")


@pytest.fixture
def server() -> Iterator[NbdServer]:
    with serving(SIZE) as server:
        yield server


def members() -> int:
    return len(pool._pool._members)


def busy_by_turns(clients: list[RawClient]) -> None:
    """Until all of them are in the pool: each one's request comes after another one's."""
    for _ in range(40 * pool._APART):  # on a busy machine turns take long, and who took long stays apart for a while
        for client in clients:
            client.read(512, 0)
        if members() == len(clients):
            return
    raise AssertionError(f"{members()} of {len(clients)} are in the pool")


@pytest.fixture
def clients(server: NbdServer) -> Iterator[list[RawClient]]:
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(where(server))).negotiate("structured") for _ in range(CLIENTS)]
        busy_by_turns(clients)
        yield clients


def test_a_connection_that_is_busy_alone_stays_by_itself(server: NbdServer) -> None:
    with RawClient(where(server)) as client, RawClient(where(server)) as idle:
        idle.negotiate()
        client.negotiate()
        for _ in range(100):
            client.read(512, 0)
        assert members() == 0


def test_without_a_descriptor_for_the_pool_each_stays_by_itself(
    server: NbdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> object:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("select.epoll", refused)
    with RawClient(where(server)) as one, RawClient(where(server)) as two:
        one.negotiate()
        two.negotiate()
        for _ in range(4 * pool._CROWDED):
            assert one.read(512, 0) == two.read(512, 0)
        assert members() == 0


def test_all_see_the_same_disk(clients: list[RawClient]) -> None:
    for number, client in enumerate(clients):
        client.write(bytes([number + 1]) * 5000, number * 5000)
    expected = b"".join(bytes([number + 1]) * 5000 for number in range(CLIENTS))
    assert [client.read(len(expected), 0) for client in clients] == [expected] * CLIENTS


def test_whoever_leads_may_leave_and_the_others_are_served(clients: list[RawClient]) -> None:
    for number in range(CLIENTS):  # in the order in which they joined, or any other: one of them led
        clients[number].send(clients[number].header(DISC))
        assert clients[number].at_end()
        for client in clients[number + 1 :]:
            assert client.read(512, 0) == bytes(512)
    assert members() == 0


def test_a_client_that_takes_no_replies_holds_up_nobody(clients: list[RawClient]) -> None:
    stalled, *others = clients
    request = stalled.request(READ, 0, 16 << 20)[1]
    stalled.send(request)
    for _ in range(3):
        assert [client.read(512, 4096) for client in others] == [bytes(512)] * len(others)
    assert stalled.reply().data == bytes(16 << 20)


def test_a_request_of_which_half_has_come_holds_up_nobody(clients: list[RawClient]) -> None:
    slow, *others = clients
    for length in (4096, 1 << 20, 5 << 20):  # small, long, and longer than the buffer
        data = random.Random(length).randbytes(length)
        request = slow.request(WRITE, 0, data=data)[1]
        slow.send(request[: len(request) // 2])
        assert [client.read(512, 16 << 20) for client in others] == [bytes(512)] * len(others)
        slow.send(request[len(request) // 2 :])
        assert slow.reply().error == 0
        assert others[0].read(length, 0) == data


def test_whoever_breaks_the_protocol_ends_alone(server: NbdServer, clients: list[RawClient]) -> None:
    bad, *others = clients
    bad.send(b"\xff" * 28)
    assert bad.at_end()
    assert [client.read(512, 0) for client in others] == [bytes(512)] * len(others)


def test_what_had_to_leave_comes_back_in_time(clients: list[RawClient]) -> None:
    clients[0].send(clients[0].request(READ, 0, 16 << 20)[1])
    clients[1].read(512, 0)
    clients[0].reply()
    busy_by_turns(clients)


@pytest.mark.parametrize(
    ("turns", "stays"),
    [
        ([30], False),  # a disk that has to be waited for
        ([8, 8, 8], False),
        ([4], True),  # the system gave the processor to somebody else
        (([4] + [0] * 30) * 20, True),
        (([4] + [0] * 5) * 20, False),
    ],
)
def test_who_took_long_leaves_unless_that_was_rare(
    turns: list[int], *, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0

    def steps() -> pool.Steps:
        nonlocal now
        yield pool.Need.BYTES
        for milliseconds in turns:
            now += milliseconds * 1_000_000
            yield pool.Need.BYTES

    monkeypatch.setattr(pool, "perf_counter_ns", lambda: now)
    left, right = socket.socketpair()
    with left, right:
        work = steps()
        next(work)
        member = pool.Member(left, work)
        assert all(member.take_turn() for _ in turns) == stays


def test_checkpoints_and_rollbacks_reach_whom_the_pool_serves() -> None:
    with CowDisk(size=SIZE) as disk, ExitStack() as stack:
        clients = [stack.enter_context(RawClient(disk.socket)).negotiate("simple") for _ in range(CLIENTS)]
        busy_by_turns(clients)
        clients[0].write(b"old", 0)
        point = disk.checkpoint()
        clients[1].write(b"new", 0)
        disk.rollback(point)
        assert [client.read(3, 0) for client in clients] == [b"old"] * CLIENTS


def test_connections_of_several_disks_share_it_and_each_ends_with_its_own() -> None:
    before, threads = open_files(), threading.active_count()
    with ExitStack() as stack:
        disks = [CowDisk(size=SIZE) for _ in range(CLIENTS)]
        clients = [stack.enter_context(RawClient(disk.socket)).negotiate() for disk in disks]
        busy_by_turns(clients)
        for number, disk in enumerate(disks):
            clients[number].write(b"%d" % number, 0)
            assert disk.pread(1, 0) == b"%d" % number
            disk.close()
            assert clients[number].at_end()
            for client in clients[number + 1 :]:
                assert client.read(512, 4096) == bytes(512)
    assert members() == 0
    assert threading.active_count() == threads
    assert open_files() == before


def test_a_forked_child_begins_without_the_pool(clients: list[RawClient]) -> None:
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        code = 1
        try:
            with CowDisk(size=SIZE) as disk, RawClient(disk.socket) as one, RawClient(disk.socket) as other:
                busy_by_turns([one.negotiate(), other.negotiate()])
                code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert [client.read(512, 0) for client in clients] == [bytes(512)] * CLIENTS


def test_a_disk_whose_base_is_another_disk_of_the_process_is_never_in_it() -> None:
    with CowDisk(size=SIZE) as below, ExitStack() as stack:
        below.pwrite(b"below", 4096)
        disk = stack.enter_context(CowDisk(below.uri))
        clients = [stack.enter_context(RawClient(disk.socket)).negotiate() for _ in range(CLIENTS)]
        for _ in range(4 * pool._CROWDED):
            assert [client.read(5, 4096) for client in clients] == [b"below"] * CLIENTS
        assert members() == 0


def test_a_checkpoint_under_way_holds_up_only_its_own_disk() -> None:
    with CowDisk(size=SIZE) as held, CowDisk(size=SIZE) as other, ExitStack() as stack:
        waiting = stack.enter_context(RawClient(held.socket)).negotiate()
        clients = [stack.enter_context(RawClient(other.socket)).negotiate() for _ in range(CLIENTS)]
        busy_by_turns([waiting, *clients])

        def meanwhile() -> None:
            waiting.send(waiting.request(READ, 0, 512)[1])
            for _ in range(3):
                assert [client.read(512, 0) for client in clients] == [bytes(512)] * CLIENTS

        held.engine.gate.shut(meanwhile)
        assert waiting.reply().data == bytes(512)


OPERATION = st.tuples(
    st.integers(0, CLIENTS - 1), st.sampled_from([READ, WRITE, TRIM]), st.integers(0, 40_000), st.integers(1, 20_000)
)


@settings(max_examples=30, deadline=None)
@given(st.lists(OPERATION, max_size=40), st.integers(0, 2**32))
def test_any_requests_of_any_of_them_act_like_those_on_one_array(
    operations: list[tuple[int, int, int, int]], seed: int
) -> None:
    with serving(64 << 10) as server, ExitStack() as stack:
        clients = [stack.enter_context(RawClient(where(server))).negotiate() for _ in range(CLIENTS)]
        busy_by_turns(clients)
        model, chance = bytearray(64 << 10), random.Random(seed)
        for number, command, offset, length in operations:
            client = clients[number]
            if command == READ:
                assert client.read(length, offset) == model[offset : offset + length]
            elif command == WRITE:
                data = chance.randbytes(length)
                client.write(data, offset)
                model[offset : offset + length] = data
            else:
                assert client.do(TRIM, offset, length).error == 0
                model[offset : offset + length] = bytes(length)
        assert clients[0].read(len(model), 0) == model


def test_a_pair_of_connected_sockets_is_no_reason_to_poll_forever(server: NbdServer) -> None:
    """A client that ends its half only, and leaves its requests to be answered."""
    with RawClient(where(server)) as client:
        client.negotiate()
        client.send(client.request(READ, 0, 4096)[1])
        client.sock.shutdown(socket.SHUT_WR)
        assert client.reply().data == bytes(4096)
        assert client.at_end()
