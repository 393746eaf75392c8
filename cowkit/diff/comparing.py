"""Where two readers of one disk do not agree: the extents, to the sector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain as both

from cowkit.disk.extent import Extent, Kind

SECTOR = 512
_PIECE = 1 << 20

Pread = Callable[[int, int], bytes]
"""``pread(length, offset)``: that many bytes, with zeroes behind the end of what is read."""


def ranges(*extents: Iterable[Extent], kinds: tuple[Kind, ...] = (Kind.DATA, Kind.ZERO)) -> Iterator[tuple[int, int]]:
    """The ranges that any of ``extents`` has as one of ``kinds``: from where to where, in order, joined."""
    start = end = -1
    for extent in sorted(both(*extents)):
        if extent.kind not in kinds:
            continue
        if extent.offset > end:
            if end > start:
                yield start, end
            start, end = extent.offset, extent.end
        else:
            end = max(end, extent.end)
    if end > start:
        yield start, end


def differing(
    one: Pread, other: Pread, where: Iterable[tuple[int, int]], advance: Callable[[int], None]
) -> Iterator[tuple[int, int]]:
    """Offset and length of each run of sectors within the ranges ``where`` in which the two differ.

    :param advance: called with the number of bytes that were compared.
    """
    start = end = -1
    for first, last in where:
        for offset in range(first, last, _PIECE):
            length = min(_PIECE, last - offset)
            a, b = one(length, offset), other(length, offset)
            for begin, stop in _sectors(a, b, offset) if a != b else ():
                if begin != end:
                    if end > start:
                        yield start, end - start
                    start = begin
                end = stop
            advance(length)
    if end > start:
        yield start, end - start


def _sectors(a: bytes, b: bytes, offset: int) -> Iterator[tuple[int, int]]:
    for at in range(0, len(a), SECTOR):
        if a[at : at + SECTOR] != b[at : at + SECTOR]:
            yield offset + at, offset + min(at + SECTOR, len(a))


def padded(read_into: Callable[[memoryview, int], None], size: int) -> Pread:
    """A reader of ``size`` bytes as one that reads zeroes behind them."""

    def pread(length: int, offset: int) -> bytes:
        buffer = bytearray(length)
        inside = max(0, min(length, size - offset))
        if inside:
            read_into(memoryview(buffer)[:inside], offset)
        return bytes(buffer)

    return pread
