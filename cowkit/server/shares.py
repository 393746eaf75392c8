"""Whose overlay: one disk for all clients, one for each export name, or one for each connection.

Design note. Negotiation sees descriptions only (exports.py). Nothing is opened or allocated for a client before it has chosen:
entering :meth:`Shares.opened` is what makes a disk, where one has to be made. Every disk made here begins as the base is (or
as the server's disk began, where that was not the base), and holds the one open base that the server's disk has.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Literal, get_args

from cowkit.disk import Base, Disk
from cowkit.disk.view_base import ViewBase
from cowkit.errors import BaseChangedError, CheckpointError, ProtocolError, UsageError
from cowkit.server import wire
from cowkit.server.block_status import WHOLE_OVERLAY, contexts_of
from cowkit.server.exports import Export
from cowkit.server.options import OptionRefused
from cowkit.server.requests import MAXIMUM_PAYLOAD
from cowkit.server.wire import Reply, TransmissionFlag

Share = Literal["all", "export", "connection"]
"""Who shares a disk: ``"all"`` clients of a server, those of an ``"export"`` name, or nobody: each ``"connection"`` has its own."""

DEFAULT_MAX_EXPORTS = 64
"""How many disks there may be with ``"export"``."""

_READING = TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA | TransmissionFlag.SEND_CACHE
_WRITING = TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO

_CONTEXTS_AT_FIRST = (wire.BASE_ALLOCATION, wire.ALLOCATION_DEPTH, wire.DIRTY_BITMAP + WHOLE_OVERLAY)
"""Of a disk that has no checkpoints, since it is still to be made."""


class Shares(ABC):
    """The exports of a server (see :class:`cowkit.server.exports.Exports`) and the disks behind them.

    :param disk: the server's disk; where clients have disks of their own, these are made like it.
    :param name: what clients may ask for; whoever asks for no name gets this one.
    :param read_only: refuse what would change a disk.
    """

    multi_conn = True
    """Whether what one connection wrote is what the others of the same export read."""

    def __init__(self, disk: Disk, name: str, description: str, *, read_only: bool) -> None:
        self._disk = disk
        self._name = name
        self._description = description
        self._flags = _READING | (TransmissionFlag.READ_ONLY if read_only else _WRITING)
        if self.multi_conn:
            self._flags |= TransmissionFlag.CAN_MULTI_CONN
        self._lock = threading.Lock()
        self.describe("", None)  # a name that cannot be is said here, not to the first client

    def describe(self, name: str, disk: Disk | None) -> Export:
        """The export of that name as it is offered now: the contexts change with the disk's checkpoints."""
        return Export(
            name=name or self._name,
            description=self._description,
            size=self._disk.size,
            flags=self._flags,
            preferred_block=max(self._disk.block_size, 4096),
            maximum_payload=MAXIMUM_PAYLOAD,
            contexts=contexts_of(disk) if disk is not None else _CONTEXTS_AT_FIRST,
        )

    def list(self) -> Sequence[tuple[str, str]]:
        """See :meth:`cowkit.server.exports.Exports.list`."""
        return [(self._name, self._description)]

    def find(self, name: str) -> Export | None:
        """See :meth:`cowkit.server.exports.Exports.find`."""
        return self.describe(self._name, None) if name in ("", self._name) else None

    @property
    @abstractmethod
    def written_bytes(self) -> int:
        """How many bytes clients wrote or zeroed, in whole blocks, on all disks, also on those that are gone.

        What the server's disk began with, where it goes on from an earlier difference, is nobody's of them.
        """

    def opened(self, chosen: Export) -> AbstractContextManager[Disk]:
        """The disk of an export that a client has chosen, for as long as the client stays.

        :raises ProtocolError: it cannot be had any more.
        :raises CowkitError: it cannot be made.
        """
        return self._opened(chosen.name)

    @abstractmethod
    def _opened(self, name: str) -> AbstractContextManager[Disk]: ...

    def _make(self) -> Disk:
        overlay = self._disk.overlay
        beginning = self._disk.beginning
        base: Base
        if beginning is None or beginning not in self._disk.checkpoints:
            base = self._disk.base.hold()
        else:
            base = ViewBase(self._disk.freeze(beginning), f"checkpoint {beginning.name!r} of {self._disk.base.given}")
        try:
            return Disk(
                base,
                block_size=self._disk.block_size,
                size=self._disk.size,
                tmpdir=overlay.directory,
                cow_on_read=overlay.cow_on_read,
                cow_on_cache=overlay.cow_on_cache,
            )
        except BaseException:
            base.release()
            raise

    def close(self) -> None:
        """Close the disks that were made here. All clients have left."""
        return


class OneDisk(Shares):
    """One disk for all."""

    def find(self, name: str) -> Export | None:
        """See :meth:`cowkit.server.exports.Exports.find`."""
        return self.describe(self._name, self._disk) if name in ("", self._name) else None

    @property
    def written_bytes(self) -> int:
        """See :attr:`Shares.written_bytes`."""
        beginning = self._disk.beginning
        if beginning is not None:
            with suppress(CheckpointError):  # after a reset it is gone, and what it had with it
                return sum(extent.length for extent in self._disk.dirty_extents(since=beginning))
        return self._disk.dirty_bytes

    @contextmanager
    def _opened(self, name: str) -> Iterator[Disk]:
        yield self._disk


class DiskPerExport(Shares):
    """One disk for each export name that a client chose, kept until the server ends.

    :param most: how many there may be.
    """

    def __init__(self, disk: Disk, name: str, description: str, *, read_only: bool, most: int) -> None:
        if most < 1:
            raise UsageError(f"a server of {most} exports serves nothing: let there be 1 or more")
        self._most = most
        self._disks: dict[str, Disk] = {}
        super().__init__(disk, name, description, read_only=read_only)

    def list(self) -> Sequence[tuple[str, str]]:
        """The default export, and each one that was chosen."""
        with self._lock:
            names = dict.fromkeys([self._name, *self._disks])
        return [(name, self._description) for name in names]

    def find(self, name: str) -> Export:
        """See :meth:`cowkit.server.exports.Exports.find`; any name will do.

        :raises OptionRefused: it would be one export too many.
        """
        name = name or self._name
        with self._lock:
            disk = self._disks.get(name)
            if disk is None and len(self._disks) >= self._most:
                raise OptionRefused(Reply.ERR_POLICY, self._too_many())
        return self.describe(name, disk)

    def _too_many(self) -> str:
        return f"{self._most} exports are in use, and there may be no more"

    @property
    def written_bytes(self) -> int:
        """See :attr:`Shares.written_bytes`."""
        with self._lock:
            disks = list(self._disks.values())
        return sum(disk.dirty_bytes for disk in disks)

    @contextmanager
    def _opened(self, name: str) -> Iterator[Disk]:
        with self._lock:
            disk = self._disks.get(name)
            if disk is None:
                if len(self._disks) >= self._most:
                    raise ProtocolError(self._too_many())  # others were quicker
                disk = self._disks[name] = self._make()
        yield disk

    def close(self) -> None:
        """See :meth:`Shares.close`."""
        for disk in self._disks.values():
            _close(disk)


class DiskPerConnection(Shares):
    """A disk for each connection, gone when it leaves."""

    multi_conn = False

    def __init__(self, disk: Disk, name: str, description: str, *, read_only: bool) -> None:
        self._disks: set[Disk] = set()
        self._written_before = 0
        super().__init__(disk, name, description, read_only=read_only)

    @property
    def written_bytes(self) -> int:
        """See :attr:`Shares.written_bytes`."""
        with self._lock:
            return self._written_before + sum(disk.dirty_bytes for disk in self._disks)

    @contextmanager
    def _opened(self, name: str) -> Iterator[Disk]:
        disk = self._make()
        with self._lock:
            self._disks.add(disk)
        try:
            yield disk
        finally:
            with self._lock:
                self._disks.remove(disk)
                self._written_before += disk.dirty_bytes
            _close(disk)


def _close(disk: Disk) -> None:
    with suppress(BaseChangedError):  # the server's own disk has the same base, and says so when it is closed
        disk.close()


def share_disk(
    disk: Disk,
    share: Share,
    *,
    name: str = "",
    description: str = "",
    read_only: bool = False,
    max_exports: int | None = None,
) -> Shares:
    """The exports of a server of ``disk``.

    :param max_exports: with ``"export"``: how many there may be; 64, unless given.
    :raises UsageError: an argument makes no sense, or goes with another ``share``.
    """
    if share not in get_args(Share):
        raise UsageError(f"share is one of {', '.join(get_args(Share))}, not {share!r}")
    if share == "export":
        most = DEFAULT_MAX_EXPORTS if max_exports is None else max_exports
        return DiskPerExport(disk, name, description, read_only=read_only, most=most)
    if max_exports is not None:
        raise UsageError(
            f"a limit of {max_exports} exports goes with a disk for each export name (share 'export') alone"
        )
    kind = OneDisk if share == "all" else DiskPerConnection
    return kind(disk, name, description, read_only=read_only)
