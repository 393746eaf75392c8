"""Names the structure that a byte of a disk lies in: of the partition table, or of the file system of its partition.

The formats: UEFI specification 2.10, section 5 (MBR in 5.2, GPT in 5.3).
"""

from __future__ import annotations

import struct

from cowkit.bases.partitions import Partition, read_partitions
from cowkit.disk import Base
from cowkit.disk.sizes import format_size
from cowkit.errors import CowkitError
from cowkit.testing.ext import ExtLayout

_MBR_PARTS = ((440, "boot code"), (446, "disk signature"), (510, ""), (512, "signature 55 aa"))
_GPT_HEADER = struct.Struct("<8s16xQ40xQII")  # signature, own sector, sector of the entries, their number, size of one


def structure_at(content: Base, offset: int) -> str | None:
    """What ``offset`` lies in, in words; None where nothing is known about it. Whatever the disk holds, this raises nothing."""
    try:
        partitions: list[Partition] | None = read_partitions(content)
    except CowkitError:
        partitions = None
    try:
        if partitions is not None:
            table = _in_mbr(offset) if offset < 512 else _in_gpt(content, offset)
            if table is not None:
                return table
            for each in partitions:
                if not each.extended and each.offset <= offset < each.offset + each.size:
                    return _in_partition(content, each, offset)
            if partitions:
                return "no partition"
        layout = ExtLayout.of(content, 0)
        return None if layout is None else layout.describe(offset)
    except (CowkitError, ValueError, struct.error, OverflowError, MemoryError):
        return None


def _in_mbr(offset: int) -> str:
    if 446 <= offset < 510:
        return f"MBR: entry {(offset - 446) // 16 + 1} of the partition table"
    return f"MBR: {next(name for end, name in _MBR_PARTS if offset < end)}"


def _in_gpt(content: Base, offset: int) -> str | None:
    for sector in (512, 4096):
        last = content.size // sector - 1
        for place, which in ((1, "primary"), (last, "backup")):
            if (place + 1) * sector > content.size or place < 1:
                continue
            signature, own, entries, count, size = _GPT_HEADER.unpack(content.pread(_GPT_HEADER.size, place * sector))
            if signature != b"EFI PART" or own != place or not 128 <= size <= 4096 or count > 4096:
                continue
            if place * sector <= offset < (place + 1) * sector:
                return f"GPT: the {which} header"
            if entries * sector <= offset < entries * sector + count * size:
                return f"GPT: entry {(offset - entries * sector) // size + 1} of the {which} table"
    return None


def _in_partition(content: Base, partition: Partition, offset: int) -> str:
    inside = offset - partition.offset
    where = f"partition {partition.number} ({format_size(partition.size)} from byte {partition.offset} on), byte {inside} of it"
    layout = ExtLayout.of(content, partition.offset)
    found = None if layout is None else layout.describe(inside)
    return where if found is None else f"{where}: {found}"
