"""The view of two sources of which nobody has kept account what changed: they are compared.

Several threads read both sides, piece by piece, and compare them; in between, the memory that they use stays in the processors'
caches, and reading one piece goes on while another is compared. What is found to differ is kept until the writer of the
difference has come for it, so that nothing is read twice in the usual case.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple, Self

from cowkit.diff.in_order import InOrder
from cowkit.diff.pieces import BLOCK, PIECE, Piece, Range, pieces
from cowkit.disk import Base, Extent, Kind
from cowkit.disk.extent import merged
from cowkit.errors import BaseError

_MOST_WORKERS = 4
_RECENT = 6
"""Pieces that differ and are kept: those of the largest cluster, and one that the search is ahead."""
_COARSE = 16 * BLOCK
_STEPS = 200
"""How often progress is told, about."""
_ZEROES = bytes(PIECE)


class _Memory:
    """Room for both sides of a piece."""

    def __init__(self) -> None:
        self.now, self.base = bytearray(PIECE), bytearray(PIECE)
        self.now_view, self.base_view = memoryview(self.now), memoryview(self.base)


class _Compared(NamedTuple):
    piece: Piece
    differing: list[Extent]
    bytes_read: int
    memory: _Memory | None
    """Both sides, where they differ."""


class _Kept(NamedTuple):
    """A piece that differs, with both sides."""

    piece: Piece
    memory: _Memory


class ForeignView:
    """``now`` and ``base``, compared; a :class:`cowkit.diff.view.View`, which lets go of both when it is closed.

    Neither may change meanwhile: of a live server, whoever asks sees to that.

    :param suspects: where they may differ, in order; everywhere, unless given. It is gone through by another thread.
    :param progress: called with the bytes compared and those there are, about 200 times; what it raises ends the comparison.
    """

    block_size = BLOCK

    def __init__(
        self,
        now: Base,
        base: Base,
        *,
        suspects: Callable[[], Iterable[Range]] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.now = now
        self.base = base
        self.size = now.size
        self.bytes_read = 0
        """From both sides, so far."""
        self._suspects = suspects or (lambda: [(0, now.size)])
        self._progress = progress
        self._told = 0
        self._found: list[Extent] | None = None
        """All that differs, once it is known."""
        self._spare: list[_Memory] = []
        self._recent: deque[_Kept] = deque()
        self._comparing: InOrder[Piece, _Compared] | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def dirty_is_known(self) -> bool:
        """Whether all has been compared, and need not be again to tell what is dirty."""
        return self._found is not None

    @property
    def dirty_bytes(self) -> int:
        """How many bytes differ, in whole blocks; compares all of it, if that has not been done yet."""
        return sum(extent.length for extent in self.dirty_extents())

    def dirty_extents(self) -> Iterator[Extent]:
        """What differs, in order; ``ZERO`` where ``now`` has a hole. Runs are cut at the pieces in which they were compared.

        :raises BaseError: one of the two cannot be read.
        :raises BaseChangedError: ``now`` is not what it was when it was opened.
        """
        if self._found is not None:
            yield from self._found
            return
        found: list[Extent] = []
        workers = min(_MOST_WORKERS, max(2, os.cpu_count() or 1))
        self._comparing = InOrder(self._pieces(), self._compare, workers=workers, ahead=2 * workers)
        for compared in self._comparing:
            self.bytes_read += compared.bytes_read
            if compared.memory is not None:
                self._keep(compared.piece, compared.memory)
            for extent in compared.differing:
                found.append(extent)
                yield extent
            self._tell(compared.piece.end)
        self._comparing.stop()
        self._comparing = None
        with self._naming_now():
            self.now.verify_path()
        self._found = list(merged(found))
        if self._progress is not None:
            self._progress(self.size, self.size)

    @property
    def dirty_runs(self) -> int:
        """How many runs of bytes :meth:`dirty_extents` has found, once it has found all."""
        return len(self._found or ())

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with what ``now`` has.

        :raises BaseError: it cannot be read.
        """
        while buffer and (kept := self._kept(offset)) and not kept.piece.now_is_zero:
            at = offset - kept.piece.offset
            part = kept.memory.now_view[at : min(at + len(buffer), kept.piece.length)]
            buffer[: len(part)] = part
            buffer, offset = buffer[len(part) :], offset + len(part)
        if buffer:
            self._read_now(buffer, offset)
            self.bytes_read += len(buffer)

    def mapped(self, offset: int, end: int) -> Iterator[tuple[int, int, memoryview | None]]:
        """One piece without a mapping: what was read for the comparison is at hand."""
        yield offset, end, None

    def read_base_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with what ``base`` has, and zeroes beyond its end.

        :raises BaseError: it cannot be read.
        """
        while buffer and (kept := self._kept(offset)) and not kept.piece.base_is_zero:
            at = offset - kept.piece.offset
            part = kept.memory.base_view[at : min(at + len(buffer), kept.piece.length)]
            buffer[: len(part)] = part
            buffer, offset = buffer[len(part) :], offset + len(part)
        if buffer:
            self.bytes_read += self._read_base(buffer, offset)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """``now``'s data and holes, where a hole is ``ZERO`` if ``base`` has, or may have, data there.

        :raises BaseError: one of the two does not tell.
        """
        with self._naming_now():
            for start, size, kind in self.now.extents(offset, length):
                if kind is not Kind.HOLE:
                    yield Extent(start, size, Kind.DATA)
                    continue
                inside = max(0, min(size, self.base.size - start))
                for each in self.base.extents(start, inside) if inside else ():
                    yield each._replace(kind=Kind.HOLE if each.kind is Kind.HOLE else Kind.ZERO)
                if inside < size:
                    yield Extent(start + inside, size - inside, Kind.HOLE)

    def close(self) -> None:
        """End a comparison that is under way, and let go of both sides; may be called again."""
        if self._closed:
            return
        self._closed = True
        if self._comparing is not None:
            self.now.interrupt()  # or a server that does not answer would hold this up
            self.base.interrupt()
            self._comparing.stop()
        self._recent.clear()
        self.now.release()
        self.base.release()

    def _pieces(self) -> Iterator[Piece]:
        with self._naming_now():
            yield from pieces(self.now, self.base, self._suspects())

    def _compare(self, piece: Piece) -> _Compared:
        """By one of several threads."""
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = _Memory()
        offset, length, now_is_zero, base_is_zero = piece
        now, base = memory.now_view[:length], memory.base_view[:length]
        read = 0
        if not now_is_zero:
            self._read_now(now, offset)
            read += length
        if not base_is_zero:
            read += self._read_base(base, offset)
        if now_is_zero:
            found = _differing(_ZEROES, base, offset, Kind.ZERO)
        else:
            found = _differing(_ZEROES if base_is_zero else memory.base, now, offset, Kind.DATA)
        if found:
            return _Compared(piece, found, read, memory)
        self._spare.append(memory)
        return _Compared(piece, found, read, None)

    def _read_now(self, buffer: memoryview, offset: int) -> None:
        with self._naming_now():
            self.now.read_into(buffer, offset)

    def _read_base(self, buffer: memoryview, offset: int) -> int:
        inside = max(0, min(len(buffer), self.base.size - offset))
        if inside:
            self.base.read_into(buffer[:inside], offset)
        if inside < len(buffer):
            buffer[inside:] = bytes(len(buffer) - inside)
        return inside

    def _keep(self, piece: Piece, memory: _Memory) -> None:
        if len(self._recent) == _RECENT:
            self._spare.append(self._recent.popleft().memory)
        self._recent.append(_Kept(piece, memory))

    def _kept(self, offset: int) -> _Kept | None:
        """The piece that ``offset`` lies in, if it is still there."""
        for kept in self._recent:
            if kept.piece.offset <= offset < kept.piece.end:
                return kept
        return None

    def _tell(self, done: int) -> None:
        if self._progress is not None and (done - self._told) * _STEPS >= self.size:
            self._told = done
            self._progress(done, self.size)

    @contextmanager
    def _naming_now(self) -> Iterator[None]:
        """What is opened like a base calls itself one."""
        try:
            yield
        except BaseError as error:
            raise as_source(error, self.now.given) from error


def as_source(error: BaseError, given: str | None) -> BaseError:
    """The same error, of what is compared with a base and not of a base."""
    text = str(error).replace(f"base {given}", f"source {given}").replace("--format ", "--from-format ")
    return type(error)(text)


def _differing(one: bytes | bytearray, other: memoryview, offset: int, kind: Kind) -> list[Extent]:
    """The runs of blocks in which ``other`` differs from the beginning of ``one``; both lie at ``offset`` of the disk.

    ``startswith`` ends in memcmp(3) and copies nothing: see :mod:`cowkit.diff.changed`.
    """
    if one.startswith(other):
        return []
    found: list[Extent] = []
    begin = end = -1
    length = len(other)
    for coarse in range(0, length, _COARSE):
        stop = min(coarse + _COARSE, length)
        if one.startswith(other[coarse:stop], coarse):
            continue
        for at in range(coarse, stop, BLOCK):
            last = min(at + BLOCK, length)
            if one.startswith(other[at:last], at):
                continue
            if at != end:
                if begin >= 0:
                    found.append(Extent(offset + begin, end - begin, kind))
                begin = at
            end = last
    found.append(Extent(offset + begin, end - begin, kind))
    return found
