"""libnbd on the other end of a socket pair."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cowkit.server.exports import Export
from cowkit.server.negotiation import Negotiation, State
from cowkit.server.wire import TransmissionFlag
from tests.server.negotiating import Offer

pytestmark = pytest.mark.requires(modules=["nbd"])

DISK = Export(
    name="disk",
    description="a disk",
    size=123456789,
    flags=TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_TRIM | TransmissionFlag.CAN_MULTI_CONN,
    preferred_block=65536,
    maximum_payload=2**26,
    contexts=("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:cow"),
)
ALIGNED = Export(name="aligned", size=8192, minimum_block=4096)


class Served:
    """A negotiation served by a thread, and libnbd connected to it."""

    def __init__(self) -> None:
        import nbd

        self.negotiation = Negotiation(Offer(DISK, ALIGNED, default=DISK))
        ours, theirs = socket.socketpair()
        self._ours = ours
        self._theirs = theirs
        self.handle = nbd.NBD()
        self.handle.set_opt_mode(True)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def connect(self) -> Any:
        self.handle.connect_socket(self._theirs.detach())  # which libnbd closes
        return self.handle

    def _serve(self) -> None:
        self._ours.sendall(self.negotiation.greeting())
        while self.negotiation.state is State.NEGOTIATING:
            if data := self._ours.recv(65536):
                self.negotiation.receive(data)
            else:
                self.negotiation.receive_eof()
            if output := self.negotiation.take_output():
                with contextlib.suppress(BrokenPipeError):  # libnbd does not wait for the answer to ABORT
                    self._ours.sendall(output)

    def finish(self) -> Negotiation:
        """What came of it, once it is over."""
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.negotiation

    def close(self) -> None:
        # libnbd's handle closes its end when nobody refers to it any more, which a failed test does: so end it from here.
        self._ours.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        self._ours.close()
        self._theirs.close()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    try:
        yield served
    finally:
        served.close()


def test_libnbd_lists_the_exports(served: Served) -> None:
    exports: list[tuple[str, str]] = []

    def found(name: str, description: str) -> int:
        exports.append((name, description))
        return 0

    assert served.connect().opt_list(found) == 2
    assert exports == [("disk", "a disk"), ("aligned", "")]


def test_libnbd_learns_all_about_an_export_without_choosing_it(served: Served) -> None:
    handle = served.connect()
    handle.set_full_info(True)
    handle.opt_info()
    assert handle.get_size() == 123456789
    assert handle.get_canonical_export_name() == "disk"
    assert handle.get_export_description() == "a disk"
    assert [handle.get_block_size(which) for which in range(3)] == [1, 65536, 2**26]
    assert handle.can_flush() and handle.can_trim() and handle.can_multi_conn() and handle.can_df()
    assert not handle.is_read_only() and not handle.can_fua() and not handle.can_zero()
    handle.set_export_name("aligned")
    handle.opt_info()
    assert (handle.get_size(), handle.get_block_size(0)) == (8192, 4096)
    handle.opt_abort()
    negotiation = served.finish()
    assert negotiation.ended is not None and negotiation.ended.clean


@pytest.mark.parametrize(
    ("query", "found"),
    [(None, DISK.contexts), ("base:", DISK.contexts[:1]), ("qemu:", DISK.contexts[1:]), ("x-mine:", ())],
)
def test_libnbd_lists_the_contexts(served: Served, query: str | None, found: tuple[str, ...]) -> None:
    handle = served.connect()
    if query is not None:
        handle.add_meta_context(query)
    contexts: list[str] = []

    def listed(name: str) -> int:
        contexts.append(name)
        return 0

    assert handle.opt_list_meta_context(listed) == len(found)
    assert contexts == list(found)


def test_libnbd_chooses_with_structured_replies_and_contexts(served: Served) -> None:
    handle = served.connect()
    for context in ("qemu:dirty-bitmap:cow", "base:allocation", "nobody:knows"):
        handle.add_meta_context(context)
    handle.set_export_name("disk")
    handle.opt_go()
    assert handle.get_structured_replies_negotiated()
    assert handle.can_meta_context("base:allocation") and handle.can_meta_context("qemu:dirty-bitmap:cow")
    assert not handle.can_meta_context("qemu:allocation-depth") and not handle.can_meta_context("nobody:knows")
    negotiation = served.finish()
    assert negotiation.chosen is not None
    assert negotiation.chosen.export is DISK
    assert negotiation.chosen.structured
    assert [name for _, name in negotiation.chosen.contexts] == ["base:allocation", "qemu:dirty-bitmap:cow"]


def test_libnbd_is_told_about_an_unknown_export_and_may_try_another(served: Served) -> None:
    import nbd

    handle = served.connect()
    handle.set_export_name("nobody")
    with pytest.raises(nbd.Error):
        handle.opt_go()
    handle.set_export_name("disk")
    handle.opt_go()
    assert served.finish().chosen is not None
