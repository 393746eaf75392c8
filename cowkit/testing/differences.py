"""Finds where two contents differ."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from cowkit.disk import Base

_PIECE = 1 << 20
_GOES_ON = 1 << 30
"""How much is compared behind the first difference: enough to tell how much differs, and no more than a second or so."""
_NAMED = 6
_RUN = re.compile(rb"[^\0]+(?:\0{1,15}[^\0]+)*")
"""Bytes that differ; equal ones between them count as theirs if they are few, since two random bytes may be equal by chance."""


class Differences(NamedTuple):
    """Where two contents differ."""

    extents: list[tuple[int, int]]
    """Offset and length of the first few."""
    counts: list[int]
    """How many bytes differ in each of those."""
    total: int
    """How many extents there are."""
    differing: int
    """How many bytes in them differ."""
    looked_to: int | None
    """Where looking ended, since enough was found; None: at the end."""

    @property
    def first(self) -> int:
        """The offset of the first byte that differs."""
        return self.extents[0][0]


def find_differences(one: Base, other: Base, ranges: Iterable[tuple[int, int]]) -> Differences | None:
    """Where they differ within ``ranges`` of ``(start, end)``, which are in order; None: nowhere."""
    left, right = bytearray(_PIECE), bytearray(_PIECE)
    left_view, right_view = memoryview(left), memoryview(right)
    extents: list[tuple[int, int]] = []
    counts: list[int] = []
    count = differing = read = 0
    previous = -1
    for start, end in ranges:
        for offset in range(start, end, _PIECE):
            length = min(_PIECE, end - offset)
            one.read_into(left_view[:length], offset)
            other.read_into(right_view[:length], offset)
            if left.startswith(right_view[:length]):
                read += length if count else 0
            else:
                read += length
                apart = _apart(left_view[:length], right_view[:length])
                differing += length - apart.count(0)
                for run in _RUN.finditer(apart):
                    first, last = offset + run.start(), offset + run.end()
                    if first - previous < 16 and count:
                        if count <= len(extents):
                            extents[-1] = (extents[-1][0], last - extents[-1][0])
                            counts[-1] += len(run[0]) - run[0].count(0)
                    else:
                        count += 1
                        if len(extents) < _NAMED:
                            extents.append((first, last - first))
                            counts.append(len(run[0]) - run[0].count(0))
                    previous = last
            if read > _GOES_ON:
                return Differences(extents, counts, count, differing, offset + length)
    return Differences(extents, counts, count, differing, None) if count else None


def _apart(one: memoryview, other: memoryview) -> bytes:
    """Zero where they are equal; big integers do it at C speed."""
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")
