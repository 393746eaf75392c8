"""The two states of a view, each as something with a size that can be read, and the partitions that they have."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cowkit.bases.partitions import Partition, has_table, read_partitions
from cowkit.diff.answers.report import TableState
from cowkit.errors import BaseOpenError

if TYPE_CHECKING:
    from cowkit.bases.partitions import Table
    from cowkit.diff.view import View


class Now:
    """The state of ``view`` now."""

    def __init__(self, view: View) -> None:
        self.given: str | None = "the disk"
        self.size = view.size
        self._view = view

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on, all of them within ``size``."""
        buffer = bytearray(length)
        self._view.read_into(memoryview(buffer), offset)
        return bytes(buffer)


class Partitions(NamedTuple):
    """What a disk is divided into."""

    now: tuple[Partition, ...]
    """Those of the table that is there now, without extended ones, cut at the end of the disk, in the order of the disk."""
    before: tuple[Partition, ...]
    table: TableState


def partitions_of(view: View) -> Partitions:
    """The partitions of both states of ``view``."""
    now, damaged = _partitions(Now(view))
    before, _ = _partitions(view.base)
    state: TableState
    if damaged:
        state = "damaged"
    elif now == before:
        state = "same" if now else "none"
    else:
        state = "changed" if now and before else "added" if now else "removed"
    return Partitions(now, before, state)


def divided_as(disk: Table | None) -> Partitions:
    """The partitions of one state alone; None: one that cannot be read."""
    now, damaged = _partitions(disk) if disk is not None else ((), False)
    return Partitions(now, now, "damaged" if damaged else "same" if now else "none")


def _partitions(disk: Table) -> tuple[tuple[Partition, ...], bool]:
    """The partitions, and whether there is a table that cannot be read."""
    try:
        found = read_partitions(disk)
    except BaseOpenError:
        return (), has_table(disk)
    inside = (
        each._replace(size=min(each.size, disk.size - each.offset))
        for each in found
        if not each.extended and each.offset < disk.size
    )
    return tuple(sorted(inside, key=lambda each: (each.offset, each.number))), False
