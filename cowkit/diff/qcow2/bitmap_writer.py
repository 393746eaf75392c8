"""Writes the map of what is dirty into an image as a persistent bitmap, as QEMU keeps its dirty bitmaps.

`qemu-img bitmap`, `qemu-nbd -B` and backup programs know it under its name. A part of it that is all clean or all dirty
takes no room but its table entry (sections "Bitmaps extension" to "Bitmap Data").
"""

from __future__ import annotations

from collections.abc import Iterable

from cowkit.diff.qcow2.layout import ALL_SET, DIRECTORY_ENTRY, ENTRY, LONGEST_BITMAP_NAME, Bitmaps, up
from cowkit.diff.qcow2.writer import Qcow2Writer
from cowkit.disk.extent import Extent
from cowkit.errors import UsageError

_DIRTY_TRACKING = 1
_LARGEST_DATA = 512 << 20
"""Bytes of a bitmap's data, to QEMU (BME_MAX_PHYS_SIZE)."""
_FINEST_BITS = 9
"""QEMU's least granularity is a sector."""


def check_bitmap_name(name: str) -> bytes:
    """``name`` as it stands in an image.

    :raises UsageError: it is empty, too long or contains a NUL.
    """
    raw = name.encode("utf-8", "surrogateescape")
    if not 0 < len(raw) <= LONGEST_BITMAP_NAME or b"\0" in raw:
        raise UsageError(
            f"bitmap name {name[:40]!r} has {len(raw)} bytes: give 1 to {LONGEST_BITMAP_NAME}, none of them NUL"
        )
    return raw


def granularity_for(size: int, block_size: int) -> int:
    """How many bytes a bit stands for: a block, or more where the bitmap would be too large for QEMU."""
    granularity = max(block_size, 1 << _FINEST_BITS)
    while -(-size // granularity) > _LARGEST_DATA * 8:
        granularity *= 2
    return granularity


def add_bitmap(writer: Qcow2Writer, name: str, dirty: Iterable[Extent], granularity: int) -> Bitmaps:
    """Write a bitmap of ``dirty`` to the image, and say where it is.

    :param granularity: bytes that a bit stands for; a power of two from 512.
    :raises UsageError: the name makes no sense.
    """
    raw = check_bitmap_name(name)
    cluster = writer.shape.cluster_size
    reach = cluster * 8 * granularity  # bytes of the disk for which a cluster of bits stands
    table = bytearray(-(-writer.shape.size // reach) * ENTRY.size)
    part, bits = -1, bytearray()

    def put() -> None:
        if part < 0:
            return
        whole = -(-(min(writer.shape.size, (part + 1) * reach) - part * reach) // granularity)
        if bits == _ones(whole).ljust(cluster, b"\0"):
            entry = ALL_SET
        else:
            entry = writer.allocate(cluster)
            writer.put(entry, bits)
        ENTRY.pack_into(table, part * ENTRY.size, entry)

    for extent in dirty:
        first, last = extent.offset // granularity, -(-extent.end // granularity)
        while first < last:
            index, at = divmod(first, cluster * 8)
            if index != part:
                put()
                part, bits = index, bytearray(cluster)
            count = min(last - first, cluster * 8 - at)
            _set(bits, at, count)
            first += count
    put()
    offset = writer.put_table(table) if table else 0
    entry = DIRECTORY_ENTRY.pack(
        offset, len(table) // ENTRY.size, 0, _DIRTY_TRACKING, granularity.bit_length() - 1, len(raw), 0
    )
    directory = (entry + raw).ljust(up(len(entry) + len(raw), 8), b"\0")
    place = writer.allocate(up(len(directory), cluster))
    writer.put(place, directory)
    return Bitmaps(1, len(directory), place)


def _ones(count: int) -> bytes:
    """``count`` bits that are set, the first one the lowest of the first byte."""
    return b"\xff" * (count // 8) + (bytes(((1 << count % 8) - 1,)) if count % 8 else b"")


def _set(bits: bytearray, first: int, count: int) -> None:
    """Set ``count`` bits from ``first`` on."""
    start, shift = divmod(first, 8)
    end = first + count
    if start == (end - 1) // 8:
        bits[start] |= (1 << count) - 1 << shift
        return
    bits[start] |= 0xFF << shift & 0xFF
    whole = end // 8
    bits[start + 1 : whole] = b"\xff" * (whole - start - 1)
    if end % 8:
        bits[whole] |= (1 << end % 8) - 1
