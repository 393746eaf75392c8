"""Random requests, pipelined in random batches over several connections of several dialects, against an array of bytes.

In each round every connection gets a region of its own and sends a whole batch before it reads a reply; regions begin and
end within blocks, and go round. A READ in a batch may show any of the states that its batch goes through, byte by byte,
since the client did not wait; whatever was answered in an earlier round is certain.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from cowkit.disk import FileBase
from cowkit.server.server import NbdServer
from tests.server.raw_client import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DIALECTS,
    EINVAL,
    ENOSPC,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    serving,
    where,
)

REGION = 37_123
REGIONS = 4
SIZE = REGION * REGIONS
CONTEXTS = ("base:allocation", "qemu:dirty-bitmap:cow", "qemu:allocation-depth")


class Op(NamedTuple):
    command: int
    start: int
    length: int
    flags: int
    fill: int


def _ops() -> st.SearchStrategy[Op]:
    places = st.one_of(st.integers(0, REGION - 1), st.integers(0, 8).map(lambda block: min(block * 4096, REGION - 1)))
    lengths = st.one_of(st.integers(1, 20), st.sampled_from([512, 4096, 8192, 20_000, REGION]), st.integers(1, REGION))

    def ops(command: int, flags: list[int]) -> st.SearchStrategy[Op]:
        return st.builds(Op, st.just(command), places, lengths, st.sampled_from(flags), st.integers(1, 255))

    return st.one_of(
        ops(READ, [0, 0, DF, FUA]),
        ops(WRITE, [0, FUA]),
        ops(WRITE, [0]),
        ops(TRIM, [0, FUA]),
        ops(WRITE_ZEROES, [0, NO_HOLE, FUA]),
        ops(CACHE, [0]),
        ops(FLUSH, [0]),
        ops(BLOCK_STATUS, [0, REQ_ONE]),
        ops(99, [0]),
    )


_rounds = st.lists(
    st.tuples(
        st.lists(st.lists(_ops(), max_size=12), min_size=1, max_size=4),
        st.sampled_from(["", "", "point", "back", "view"]),
    ),
    min_size=1,
    max_size=8,
)


@contextmanager
def _on_a_file() -> Iterator[tuple[NbdServer, bytes]]:
    content = bytes(range(1, 254)) * (SIZE // 253) + b"." * (SIZE % 253)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "base.img")
        path.write_bytes(content)
        with serving(FileBase(path)) as server:
            yield server, content


def _expected_error(op: Op, client: RawClient) -> int:
    if op.command == 99 or (op.flags & DF and not client.structured):
        return EINVAL
    if op.command == BLOCK_STATUS and not client.structured:
        return EINVAL
    if op.start + op.length > REGION and op.start % 5 == 0 and op.command not in (FLUSH, 99):
        return ENOSPC if op.command in (WRITE, WRITE_ZEROES) else EINVAL  # it is sent to lie beyond the end of the disk
    return 0


@given(rounds=_rounds)
@settings(max_examples=40, deadline=None)
def test_random_pipelined_requests_read_what_an_array_of_bytes_would(
    rounds: list[tuple[list[list[Op]], str]],
) -> None:
    with _on_a_file() as (server, content), ExitStack() as stack:
        model = bytearray(content)
        kept: bytes | None = None
        clients = []
        for number in range(4):
            dialect = DIALECTS[number % 3]
            client = stack.enter_context(RawClient(where(server)))
            clients.append(client.negotiate(dialect, *([] if dialect == "simple" else CONTEXTS)))
        for turn, (batches, between) in enumerate(rounds):
            sent = []
            for number, batch in enumerate(batches):
                origin = (number + turn) % REGIONS * REGION
                sent.append((clients[number], origin, [*_send(clients[number], origin, batch)]))
            for client, origin, requests in sent:
                _check(client, origin, requests, model)
            assert clients[turn % 4].read(SIZE, 0) == model
            if between == "point":
                kept = bytes(model)
                server.disk.checkpoint(f"at-{turn}")
            elif between == "back" and kept is not None:
                server.disk.rollback(server.disk.checkpoints[-1])
                model[:] = kept
            elif between == "view":
                with server.disk.freeze() as view:
                    assert view.pread(SIZE, 0) == model
        for client in clients:
            assert client.read(SIZE, 0) == model


def _send(client: RawClient, origin: int, batch: list[Op]) -> Iterator[tuple[int, Op]]:
    """Send the batch at once; the cookies."""
    together = b""
    for op in batch:
        beyond = _expected_error(op, client) and op.command not in (FLUSH, 99)
        if not beyond:
            op = op._replace(length=min(op.length, REGION - op.start))
        offset = SIZE - 1 if beyond else origin + op.start
        length = max(op.length, 2) if beyond else op.length
        data = bytes([op.fill]) * length if op.command == WRITE else b""
        cookie, request = client.request(op.command, offset, 0 if op.command == FLUSH else length, data, flags=op.flags)
        together += request
        yield cookie, op
    client.send(together)


def _check(client: RawClient, origin: int, requests: list[tuple[int, Op]], model: bytearray) -> None:
    """Take the replies, and bring the model to what they acknowledge."""
    states = [bytes(model[origin : origin + REGION])]
    state = bytearray(states[0])
    for _, op in requests:
        if not _expected_error(op, client) and op.command in (WRITE, TRIM, WRITE_ZEROES):
            state[op.start : op.start + op.length] = bytes([op.fill if op.command == WRITE else 0]) * op.length
            states.append(bytes(state))
    for cookie, op in requests:
        reply = client.reply()
        assert reply.cookie == cookie
        assert reply.error == _expected_error(op, client), (op, reply.message)
        if reply.error == 0 and op.command == READ:
            possible = [each[op.start : op.start + op.length] for each in states]
            if reply.data not in possible:
                assert all(byte in among for byte, *among in zip(reply.data, *possible, strict=True))
        elif reply.error == 0 and op.command == BLOCK_STATUS:
            assert len(reply.status) == 3
            for found in reply.status.values():
                total = sum(length for length, _ in found)
                assert (0 < total <= op.length and len(found) == 1) if op.flags & REQ_ONE else total == op.length
    model[origin : origin + REGION] = state
