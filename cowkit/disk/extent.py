"""An extent: a run of bytes of a disk that are in one state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """The state of an extent.

    For dirty extents: ``DATA`` (a layer holds it) or ``ZERO`` (zeroed or trimmed).
    For the extents of a base or of a whole disk also ``HOLE`` (nothing is allocated there, it reads as zeroes).
    """

    DATA = "data"
    ZERO = "zero"
    HOLE = "hole"


class Extent(NamedTuple):
    """A run of ``length`` bytes from ``offset`` on, all of one ``kind``. Never empty."""

    offset: int
    length: int
    kind: Kind

    @property
    def end(self) -> int:
        """The offset of the first byte behind the run."""
        return self.offset + self.length


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same bytes with neighbours of one kind joined; ``extents`` are in order and do not overlap."""
    run: Extent | None = None
    for extent in extents:
        if run is not None and run.kind is extent.kind and run.end == extent.offset:
            run = Extent(run.offset, run.length + extent.length, run.kind)
            continue
        if run is not None:
            yield run
        run = extent
    if run is not None:
        yield run
