"""Scratch copies of a file system's metadata, one for each state, for programs that want a file.

Nothing is mounted and root is not needed. Where the base is a raw file with an ext file system, e2image copies its metadata
alone, and what a state changed goes on top: so it costs the metadata and what is dirty, not what the disk holds. Of other
bases, all data of the file system are copied. The copies are sparse unlinked files: whatever happens, none is left behind.
guestfish alone needs files with names, which it loses as soon as it has opened them.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import IO, TYPE_CHECKING, NamedTuple

from cowkit.disk.base import Base, FileBase
from cowkit.disk.extent import Extent, Kind
from cowkit.disk.layer import default_directory
from cowkit.disk.view_base import ViewBase
from cowkit.programs import find_program

if TYPE_CHECKING:
    from cowkit.diff.view import View

_PIECE = 1 << 20
_IDENTITY = ((1024 + 0x68, 16), (1024 + 0x108, 4))
"""Of an ext file system: its UUID, and when it was made."""

ReadInto = Callable[[memoryview, int], None]


class Place(NamedTuple):
    """A part of a disk, in bytes."""

    offset: int
    size: int


class State(NamedTuple):
    """One of the two states of a view."""

    read_into: ReadInto
    """Fills a buffer from an offset of the disk on."""
    data: Callable[[int, int], Iterator[Extent]]
    """The range as data and what reads as zeroes."""
    base: Base | None
    """The file that the state stands on, where ext metadata can be copied from."""
    dirty: tuple[Callable[[], Iterator[Extent]], ...]
    """What was changed on top of that: the extents of each step, the last one last."""


def states_of(view: View) -> tuple[State, State]:
    """The states of ``view`` before and now."""
    base: Base = view.base
    steps: list[Callable[[], Iterator[Extent]]] = []
    while isinstance(base, ViewBase):
        steps.insert(0, base.shown.dirty_extents)
        base = base.shown.base
    bottom = base if isinstance(base, FileBase) else None
    size = view.size

    def data_before(offset: int, length: int) -> Iterator[Extent]:
        inside = max(0, min(length, view.base.size - offset))
        return view.base.extents(offset, inside) if inside else iter(())

    def data_now(offset: int, length: int) -> Iterator[Extent]:
        return view.extents(offset, max(0, min(length, size - offset)))

    before = State(view.read_base_into, data_before, bottom, tuple(steps))
    now = State(view.read_into, data_now, bottom, (*steps, view.dirty_extents))
    return before, now


def metadata_copy(state: State, place: Place) -> IO[bytes]:
    """A file with the metadata, and perhaps more, of the ext file system at ``place`` in ``state``; the caller closes it.

    :raises OSError: there is no room for it.
    """
    scratch = tempfile.TemporaryFile(dir=default_directory(), prefix="cowkit-files-")  # noqa: SIM115 - the caller's
    try:
        if not _copy_metadata(state, place, scratch):
            scratch.truncate(0)
            _put(state, place, state.data(place.offset, place.size), scratch)
        scratch.truncate(place.size)
        scratch.flush()
    except BaseException:
        scratch.close()
        raise
    return scratch


def data_copy(state: State, place: Place, opened: ExitStack) -> str:
    """The path of a file with all data of what is at ``place`` in ``state``; it is removed when ``opened`` is closed.

    :raises OSError: there is no room for it.
    """
    fd, path = tempfile.mkstemp(dir=default_directory(), prefix="cowkit-files-")
    opened.callback(remove, path)
    with os.fdopen(fd, "r+b") as copy:
        _put(state, place, state.data(place.offset, place.size), copy)
        copy.truncate(place.size)
    return path


def remove(path: str) -> None:
    """Remove a copy, unless that is done."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def _copy_metadata(state: State, place: Place, scratch: IO[bytes]) -> bool:
    """Copy what e2image takes for metadata in the base, and what was changed since; whether that can be relied on."""
    program = find_program("e2image")
    base = state.base
    if base is None or base.path is None or program is None or base.size < place.offset + place.size:
        return False
    if _identity(base.read_into, place) != _identity(state.read_into, place):
        return False  # the file system is another one than the base's
    fd = scratch.fileno()
    command = [program, "-r", "-o", str(place.offset), base.path, f"/proc/self/fd/{fd}"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[fd],
        check=False,
    )
    if done.returncode:
        return False
    for step in state.dirty:
        _put(state, place, step(), scratch)
    return True


def _identity(read_into: ReadInto, place: Place) -> bytes:
    found = b""
    for offset, length in _IDENTITY:
        buffer = bytearray(length)
        if offset + length <= place.size:
            read_into(memoryview(buffer), place.offset + offset)
        found += buffer
    return found


def _put(state: State, place: Place, extents: Iterator[Extent], scratch: IO[bytes]) -> None:
    """Write what ``state`` has in ``extents`` to ``scratch``; holes stay holes there, if nothing else is there."""
    fd = scratch.fileno()
    buffer = memoryview(bytearray(_PIECE))
    zeroes = bytes(_PIECE)
    written = os.fstat(fd).st_size
    end_of_place = place.offset + place.size
    for extent in extents:
        at, end = max(extent.offset, place.offset), min(extent.end, end_of_place)
        if extent.kind is not Kind.DATA:
            end = min(end, place.offset + written)  # beyond it nothing is there
        while at < end:
            piece = buffer[: min(_PIECE, end - at)]
            if extent.kind is Kind.DATA:
                state.read_into(piece, at)
                data: memoryview | bytes = piece
            else:
                data = zeroes[: len(piece)]
            rest = memoryview(data)
            where = at - place.offset
            while rest:
                count = os.pwrite(fd, rest, where)
                rest, where = rest[count:], where + count
            at += len(piece)
