"""Where the structures of an ext2, ext3 or ext4 file system lie, computed from its superblock and group descriptors.

The format: Documentation/filesystems/ext4 of the Linux kernel ("Super Block", "Block Group Descriptors", "Layout", "inode").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Self

from cowkit.disk import Base

_SUPERBLOCK = 1024
_MAGIC = 0xEF53
_EXTENT_MAGIC = 0xF30A
_JOURNAL_INODE = 8
_INODES = {1: "the bad blocks", 2: "the root directory", 7: "room for group descriptors", 8: "the journal"}

_HAS_JOURNAL, _SPARSE_SUPER2 = 0x4, 0x200  # compatible features
_META_BG, _64BIT, _EXTENTS = 0x10, 0x80, 0x40  # incompatible ones
_SPARSE_SUPER = 0x1  # read-only compatible
_BLOCK_UNINIT = 0x2  # a group's flag: its block bitmap was never written
_MOST_GROUPS = 1 << 20


class ExtLayout:
    """A file system that begins at ``start`` of ``content``; offsets and blocks are counted from there."""

    def __init__(self, content: Base, start: int, superblock: bytes) -> None:
        def number(offset: int, form: str = "<I") -> int:
            found: int = struct.unpack_from(form, superblock, offset)[0]
            return found

        self._content, self._start = content, start
        self._compat, self._incompat, self._ro_compat = (number(at) for at in (0x5C, 0x60, 0x64))
        self._block = 1024 << number(0x18)
        self._first = number(0x14)
        high = number(0x150) << 32 if self._incompat & _64BIT else 0
        self._blocks = number(0x4) | high
        self._group_blocks, self._group_inodes = number(0x20), number(0x28)
        self._inode_size = number(0x58, "<H") if number(0x4C) else 128
        self._first_inode = number(0x54) if number(0x4C) else 11
        self._descriptor = number(0xFE, "<H") if self._incompat & _64BIT else 32
        self._reserved = number(0xCE, "<H")
        self._first_meta = number(0x104) if self._incompat & _META_BG else _MOST_GROUPS
        self._backups = struct.unpack_from("<II", superblock, 0x24C)
        self._groups = -(-(self._blocks - self._first) // self._group_blocks)
        if not 0 < self._groups <= _MOST_GROUPS or self._descriptor < 32 or not 128 <= self._inode_size <= self._block:
            raise ValueError
        self._kind = (
            "ext4" if self._incompat & (_EXTENTS | _64BIT) else "ext3" if self._compat & _HAS_JOURNAL else "ext2"
        )

    @classmethod
    def of(cls, content: Base, start: int) -> Self | None:
        """The layout of the file system at ``start``; None where there is none."""
        if start + 2 * _SUPERBLOCK > content.size:
            return None
        superblock = content.pread(1024, start + _SUPERBLOCK)
        if struct.unpack_from("<H", superblock, 0x38)[0] != _MAGIC or struct.unpack_from("<I", superblock, 0x18)[0] > 6:
            return None
        try:
            return cls(content, start, superblock)
        except (ValueError, ZeroDivisionError):
            return None

    def describe(self, offset: int) -> str | None:
        """The structure at ``offset`` of the file system; None beyond its end."""
        if offset >= self._blocks * self._block:
            return None
        return f"{self._kind}: {self._structure(offset)}"

    def _structure(self, offset: int) -> str:
        if offset < _SUPERBLOCK:
            return "the boot block, before the superblock"
        if offset < 2 * _SUPERBLOCK:
            return f"the superblock, byte {offset - _SUPERBLOCK} of it"
        block, inside = divmod(offset, self._block)
        if block < self._first or (block == 0 and self._first == 0):
            return "the rest of the superblock's block"
        group, place = divmod(block - self._first, self._group_blocks)
        found = self._in_head(group, place, inside) or self._in_tables(block, inside) or self._in_journal(block)
        return found or self._data(block, group, place)

    # What a group begins with

    def _has_superblock(self, group: int) -> bool:
        if group == 0:
            return True
        if self._compat & _SPARSE_SUPER2:
            return group in self._backups
        if not self._ro_compat & _SPARSE_SUPER:
            return True
        return group == 1 or any(_is_power(group, of) for of in (3, 5, 7))

    @property
    def _per_block(self) -> int:
        return self._block // self._descriptor

    def _in_head(self, group: int, place: int, inside: int) -> str | None:
        has = self._has_superblock(group)
        if has and place == 0:
            return f"the copy of the superblock in group {group}, byte {inside} of it"
        copy = f", copy in group {group}" if group else ""
        meta = group // self._per_block
        if meta >= self._first_meta:
            first = meta * self._per_block
            if group in (first, first + 1, first + self._per_block - 1) and place == int(has):
                return self._named_descriptor(meta, inside, "" if group == first else copy)
            return None
        if not has:
            return None
        count = min(-(-self._groups // self._per_block), self._first_meta)
        if 1 <= place <= count:
            return self._named_descriptor(place - 1, inside, copy)
        if place <= count + self._reserved:
            return f"room for more group descriptors in group {group}"
        return None

    def _named_descriptor(self, table: int, inside: int, copy: str) -> str:
        return f"the group descriptors: that of group {table * self._per_block + inside // self._descriptor}{copy}"

    def _descriptor_place(self, table: int) -> int:
        """The block with the descriptors of groups ``table * _per_block`` and so on."""
        if table < self._first_meta:
            return self._first + 1 + table
        group = table * self._per_block
        return self._first + group * self._group_blocks + int(self._has_superblock(group))

    def _descriptors(self) -> Iterator[bytes]:
        for table in range(-(-self._groups // self._per_block)):
            raw = self._read(self._descriptor_place(table))
            for index in range(min(self._per_block, self._groups - table * self._per_block)):
                yield raw[index * self._descriptor : (index + 1) * self._descriptor]

    def _places(self, descriptor: bytes) -> tuple[int, int, int]:
        """Where a group's block bitmap, inode bitmap and inode table begin."""
        low = struct.unpack_from("<III", descriptor, 0)
        if len(descriptor) < 64:
            return low[0], low[1], low[2]
        high = struct.unpack_from("<III", descriptor, 0x20)
        return low[0] | high[0] << 32, low[1] | high[1] << 32, low[2] | high[2] << 32

    def _in_tables(self, block: int, inside: int) -> str | None:
        length = -(-self._group_inodes * self._inode_size // self._block)
        for group, descriptor in enumerate(self._descriptors()):
            blocks, inodes, table = self._places(descriptor)
            if block == blocks:
                return f"the block bitmap of group {group}"
            if block == inodes:
                return f"the inode bitmap of group {group}"
            if table <= block < table + length:
                index = ((block - table) * self._block + inside) // self._inode_size
                number = group * self._group_inodes + index + 1
                meant = "lost+found" if number == self._first_inode else _INODES.get(number)
                return f"the inode table of group {group}, inode {number}{f' ({meant})' if meant else ''}"
        return None

    # The journal

    def _in_journal(self, block: int) -> str | None:
        if not self._compat & _HAS_JOURNAL:
            return None
        group, index = divmod(_JOURNAL_INODE - 1, self._group_inodes)
        descriptor = next(each for number, each in enumerate(self._descriptors()) if number == group)
        place = self._places(descriptor)[2] * self._block + index * self._inode_size
        inode = self._content.pread(128, self._start + place)
        pointers = inode[0x28:0x64]
        runs = self._extents(pointers, 5) if _is_extent_node(pointers) else self._indirect(pointers)
        for logical, first, count in runs:
            if first <= block < first + count:
                return f"the journal, block {logical + block - first} of it"
        return None

    def _extents(self, node: bytes, deepest: int) -> Iterator[tuple[int, int, int]]:
        _, count, _, depth = struct.unpack_from("<HHHH", node)
        for index in range(min(count, len(node) // 12 - 1)):
            logical, second, third, fourth = struct.unpack_from("<IHHI", node, 12 + 12 * index)
            if depth == 0:
                yield logical, third << 32 | fourth, second if second <= 32768 else second - 32768
            elif deepest:
                # An index has the lower half of the address first.
                low, high = struct.unpack_from("<IH", node, 12 + 12 * index + 4)
                below = self._read(high << 32 | low)
                if _is_extent_node(below):
                    yield from self._extents(below, deepest - 1)

    def _indirect(self, pointers: bytes) -> Iterator[tuple[int, int, int]]:
        blocks = struct.unpack("<15I", pointers)
        for logical, place in enumerate(blocks[:12]):
            if place:
                yield logical, place, 1
        logical, span = 12, self._block // 4
        for level, place in enumerate(blocks[12:]):
            yield from self._below(place, level, logical)
            logical += span ** (level + 1)

    def _below(self, place: int, level: int, logical: int) -> Iterator[tuple[int, int, int]]:
        if not place:
            return
        yield logical, place, 1  # the block of pointers is the journal's, too
        span = self._block // 4
        for index, below in enumerate(struct.unpack(f"<{span}I", self._read(place))):
            if level:
                yield from self._below(below, level - 1, logical + index * span**level)
            elif below:
                yield logical + index, below, 1

    # Everything else

    def _data(self, block: int, group: int, place: int) -> str:
        descriptor = next(each for number, each in enumerate(self._descriptors()) if number == group)
        flags = struct.unpack_from("<H", descriptor, 0x12)[0]
        used = ""
        if not flags & _BLOCK_UNINIT:
            bitmap = self._read(self._places(descriptor)[0])
            used = ", in use" if bitmap[place // 8] >> place % 8 & 1 else ", free"
        return f"data block {block} in group {group}{used}"

    def _read(self, block: int) -> bytes:
        if not 0 <= block < self._blocks:
            raise ValueError
        return self._content.pread(self._block, self._start + block * self._block)


def _is_extent_node(raw: bytes) -> bool:
    return int(struct.unpack_from("<H", raw)[0]) == _EXTENT_MAGIC


def _is_power(number: int, of: int) -> bool:
    while number % of == 0:
        number //= of
    return number == 1
