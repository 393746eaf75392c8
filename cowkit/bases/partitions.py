"""The partitions of a disk, read from its MBR (with logical partitions) or GPT. Trusts nothing that the table says.

The formats: UEFI specification 2.10, section 5 (GPT, and the MBR's records in 5.2); logical partitions are a chain of
records of the MBR's kind, each saying where its partition is, relative to itself, and where the next record is, relative to
the extended partition.
"""

from __future__ import annotations

import binascii
import struct
from typing import NamedTuple, Protocol

from cowkit.disk.base import Base
from cowkit.disk.sizes import format_size
from cowkit.errors import BaseOpenError, UsageError

_SECTOR = 512
_ENTRY = struct.Struct("<B3xB3xII")  # of the MBR: status, type, first sector, sectors
_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQ")

_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE
_FIRST_LOGICAL = 5
_MOST_LOGICAL = 256
_MOST_ENTRIES_BYTES = 1 << 20
"""Of a GPT: 128 entries of 128 bytes are usual, 16 KiB."""


class Table(Protocol):
    """What may have a partition table: a base, or a disk as it is now."""

    @property
    def given(self) -> str | None:
        """What messages call it."""

    @property
    def size(self) -> int:
        """In bytes."""

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on, all of them within ``size``."""


class Partition(NamedTuple):
    """A partition: where it is, in bytes, and its number as the Linux kernel counts (MBR: logical ones from 5 on)."""

    number: int
    offset: int
    size: int
    extended: bool = False
    """Whether it is an MBR's extended partition: no more than the place where the logical ones are."""


def find_partition(base: Base, number: int) -> Partition:
    """Partition ``number`` of ``base``.

    :raises UsageError: the number is below 1.
    :raises BaseOpenError: the base has no partition table or a damaged one, or no such partition, or it reaches beyond the
        end of the base.
    """
    if number < 1:
        raise UsageError(f"partition {number}: partitions are counted from 1")
    partitions = read_partitions(base)
    known = (
        ", ".join(f"{each.number} ({format_size(each.size)} at byte {each.offset})" for each in partitions) or "none"
    )
    found = next((each for each in partitions if each.number == number), None)
    if found is None:
        raise BaseOpenError(f"base {base.given} has no partition {number}; it has: {known}")
    if found.extended:
        raise BaseOpenError(
            f"partition {number} of base {base.given} is an extended one, which only holds the logical ones from "
            f"{_FIRST_LOGICAL} on; it has: {known}"
        )
    if found.offset + found.size > base.size:
        raise BaseOpenError(
            f"partition {number} of base {base.given} would end at byte {found.offset + found.size}, and the base has only "
            f"{base.size}: the base was cut short, or its partition table is wrong"
        )
    return found


def has_table(base: Table) -> bool:
    """Whether ``base`` begins like one with a partition table, damaged or not."""
    return _mbr_entries(_read(base, _SECTOR, 0)) is not None


def read_partitions(base: Table) -> list[Partition]:
    """All partitions of ``base``, as its table has them; they may overlap or reach beyond its end.

    :raises BaseOpenError: it has no partition table, or a damaged one.
    """
    sector = _read(base, _SECTOR, 0)
    entries = _mbr_entries(sector)
    if entries is None:
        raise BaseOpenError(
            f"base {base.given} has no partition table: neither MBR nor GPT, so there is no partition to choose"
        )
    if any(kind == _PROTECTIVE for kind, _, _ in entries):
        return _read_gpt(base)
    partitions = []
    for number, (kind, first, count) in enumerate(entries, 1):
        if kind and count:
            partitions.append(Partition(number, first * _SECTOR, count * _SECTOR, kind in _EXTENDED))
    for extended in [each for each in partitions if each.extended]:
        partitions += _logical(
            base, extended, _FIRST_LOGICAL + sum(each.number >= _FIRST_LOGICAL for each in partitions)
        )
    return partitions


def _read(base: Table, length: int, offset: int) -> bytes:
    """What there is of the range; nothing of one that begins beyond the end."""
    inside = max(0, min(length, base.size - offset))
    return base.pread(inside, offset) if inside else b""


def _mbr_entries(sector: bytes) -> list[tuple[int, int, int]] | None:
    """Type, first sector and number of sectors of the four entries; None where the sector is no such record."""
    if len(sector) < _SECTOR or sector[510:512] != b"\x55\xaa":
        return None
    raw = [_ENTRY.unpack_from(sector, 446 + 16 * index) for index in range(4)]
    # A file system's boot sector has the same signature, and program code where the entries would be.
    if any(status & 0x7F for status, _, _, _ in raw):
        return None
    return [(kind, first, count) for _, kind, first, count in raw]


def _logical(base: Table, extended: Partition, number: int) -> list[Partition]:
    found: list[Partition] = []
    place = extended.offset
    seen = set[int]()
    while True:
        entries = _mbr_entries(_read(base, _SECTOR, place))
        if place in seen or entries is None or len(seen) >= _MOST_LOGICAL:
            why = "runs in a circle" if place in seen else "breaks off" if entries is None else "is too long"
            raise BaseOpenError(
                f"the partition table of base {base.given} is damaged: the chain of its logical partitions {why} at byte {place}"
            )
        seen.add(place)
        following = None
        for kind, first, count in entries:
            if kind in _EXTENDED and count:
                following = extended.offset + first * _SECTOR
            elif kind and count:
                found.append(Partition(number + len(found), place + first * _SECTOR, count * _SECTOR))
        if following is None:
            return found
        place = following


def _read_gpt(base: Table) -> list[Partition]:
    # A disk of 4096-byte sectors has its GPT at other places; nothing but looking tells which kind a file is.
    for sector in (512, 4096):
        for place in (sector, (base.size // sector - 1) * sector):  # the second is the spare one, in the last sector
            partitions = _gpt_at(base, place, sector)
            if partitions is not None:
                return partitions
    raise BaseOpenError(
        f"base {base.given} should have a GPT, and both its primary and its backup table are missing or damaged: "
        "repair a copy with sgdisk or gdisk, or give offset and size instead"
    )


def _gpt_at(base: Table, place: int, sector: int) -> list[Partition] | None:
    header = _read(base, sector, place) if place > 0 else b""
    if len(header) < _GPT_HEADER.size:
        return None
    signature, _, length, crc, _, my_lba, _, _, _, _, entries_lba, count, entry, entries_crc = _GPT_HEADER.unpack_from(
        header
    )
    if signature != b"EFI PART" or not _GPT_HEADER.size <= length <= sector or my_lba * sector != place:
        return None
    if binascii.crc32(header[:16] + b"\0\0\0\0" + header[20:length]) != crc:
        return None
    if entry < 128 or entry % 8 or count * entry > _MOST_ENTRIES_BYTES:
        return None
    table = _read(base, count * entry, entries_lba * sector)
    if len(table) < count * entry or binascii.crc32(table) != entries_crc:
        return None
    partitions = []
    for index in range(count):
        kind, _, first, last = _GPT_ENTRY.unpack_from(table, index * entry)
        if any(kind) and last >= first:
            partitions.append(Partition(index + 1, first * sector, (last - first + 1) * sector))
    return partitions
