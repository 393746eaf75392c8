"""Reads the persistent bitmaps of an image (sections "Bitmaps extension" to "Bitmap Data")."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cowkit.diff.qcow2.layout import (
    ALL_SET,
    DIRECTORY_ENTRY,
    ENTRY,
    LONGEST_BITMAP_NAME,
    OFFSET_MASK,
    Bitmaps,
    Geometry,
    up,
)
from cowkit.disk.extent import Extent, Kind
from cowkit.errors import ImageError

Read = Callable[[int, int, str], bytes]
"""``read(length, offset, what)``: whole clusters of the file, or what is left of it, checked to be there."""

_MOST = 65535
"""Bitmaps of an image, to QEMU."""
_LARGEST_DIRECTORY = 64 << 20
_LARGEST_TABLE = (512 << 20) // 4096 * ENTRY.size
_RUN = re.compile("1+")
_GRANULARITY_BITS = range(9, 32)


class StoredBitmap(NamedTuple):
    """A bitmap: the offset of each cluster of its bits, 0 for one that is all clear and 1 for one that is all set."""

    table: tuple[int, ...]
    granularity: int
    cluster_size: int
    clusters: tuple[int, ...]
    """Where all that it takes of the file is, its table included."""

    def extents(self, size: int, read: Read) -> Iterator[Extent]:
        """What is set, for a disk of ``size`` bytes; neighbours may be separate."""
        reach = self.cluster_size * 8 * self.granularity
        for index, entry in enumerate(self.table):
            start = index * reach
            if entry == ALL_SET:
                yield Extent(start, min(reach, size - start), Kind.DATA)
            elif entry:
                # As text, the first bit first: a pattern finds runs in it at C speed.
                bits = f"{int.from_bytes(read(self.cluster_size, entry, 'a bitmap'), 'little'):b}"[::-1]
                for run in _RUN.finditer(bits):
                    first = start + run.start() * self.granularity
                    last = min(start + run.end() * self.granularity, size)
                    if first < last:
                        yield Extent(first, last - first, Kind.DATA)


def read_bitmaps(
    where: Bitmaps | None, shape: Geometry, read: Read, bad: Callable[[str], ImageError]
) -> dict[str, StoredBitmap]:
    """The bitmaps of an image, by their names.

    :param bad: makes the error of what it is told.
    :raises ImageError: they are damaged.
    """
    found: dict[str, StoredBitmap] = {}
    if where is None:
        return found
    if (
        not 0 < where.number <= _MOST
        or not where.number * DIRECTORY_ENTRY.size <= where.directory_size <= _LARGEST_DIRECTORY
    ):
        raise bad(f"it has {where.number} bitmaps in a directory of {where.directory_size} bytes")
    directory = read(where.directory_size, where.directory_offset, "the directory of bitmaps")
    at = 0
    for index in range(where.number):
        if at + DIRECTORY_ENTRY.size > len(directory):
            raise bad(f"its directory of bitmaps ends before bitmap {index}")
        offset, entries, _, _, bits, name_size, extra = DIRECTORY_ENTRY.unpack_from(directory, at)
        name_at = at + DIRECTORY_ENTRY.size + extra
        name = directory[name_at : name_at + name_size]
        at = up(name_at + name_size, 8)
        if len(name) < name_size or not 0 < name_size <= LONGEST_BITMAP_NAME or bits not in _GRANULARITY_BITS:
            raise bad(f"bitmap {index} has a name of {name_size} bytes and a granularity of 2**{bits}")
        if entries * ENTRY.size > _LARGEST_TABLE or entries != -(-shape.size // (shape.cluster_size * 8 << bits)):
            raise bad(f"bitmap {index} has a table of {entries} entries")
        raw = read(entries * ENTRY.size, offset, f"the table of bitmap {index}") if entries else b""
        table = tuple(entry for (entry,) in ENTRY.iter_unpack(raw))
        for entry in table:
            if entry & OFFSET_MASK != entry and entry != ALL_SET:
                raise bad(f"the table of bitmap {index} has the entry {entry:#x}")
        own = range(offset, offset + up(len(raw), shape.cluster_size), shape.cluster_size)
        clusters = (*own, *(entry for entry in table if entry > ALL_SET))
        for cluster in clusters:
            read(1, cluster, f"bitmap {index}")
        found[name.decode("utf-8", "surrogateescape")] = StoredBitmap(table, 1 << bits, shape.cluster_size, clusters)
    return found
