"""Which file system, or other known content, lies somewhere on a disk: told by its magic number alone."""

from __future__ import annotations

import struct
from typing import Protocol


class Readable(Protocol):
    """Whatever has bytes."""

    @property
    def size(self) -> int:
        """How many bytes there are."""

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on, all of them within ``size``."""


_MAGICS = (
    (0, b"XFSB", "xfs"),
    (3, b"NTFS    ", "ntfs"),
    (3, b"EXFAT   ", "exfat"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0x36, b"FAT12   ", "vfat"),
    (0x36, b"FAT16   ", "vfat"),
    (0x52, b"FAT32   ", "vfat"),
    (512, b"LABELONE", "lvm"),
    (1024, b"\x10\x20\xf5\xf2", "f2fs"),
    (4086, b"SWAPSPACE2", "swap"),
    (0, b"hsqs", "squashfs"),
    (0x8001, b"CD001", "iso9660"),
    (0x10040, b"_BHRfS_M", "btrfs"),
)
_LOOKED_AT = 0x10048

WITHOUT_FILES = ("swap",)
CONTAINERS = {"lvm": "an LVM physical volume", "luks": "an encrypted volume"}
"""What may have file systems within, which are not looked for."""

_EXT_MAGIC = struct.Struct("<H")
_EXT_FEATURES = struct.Struct("<II")
_EXT4_ONLY = 0x2C0
"""Of the incompatible features: extents, 64bit and flex_bg, of which an ext4 has one at least."""
_EXT_JOURNAL = 0x4


def file_system_at(disk: Readable, offset: int, size: int) -> str | None:
    """What lies from ``offset`` on in ``size`` bytes: ``"ext4"``, ``"xfs"``, ``"vfat"`` and so on; None if nothing known does."""
    inside = max(0, min(size, disk.size - offset, _LOOKED_AT))
    head = disk.pread(inside, offset) if inside else b""
    if len(head) >= 2048 and _EXT_MAGIC.unpack_from(head, 1024 + 56) == (0xEF53,):
        compatible, incompatible = _EXT_FEATURES.unpack_from(head, 1024 + 92)
        return "ext4" if incompatible & _EXT4_ONLY else "ext3" if compatible & _EXT_JOURNAL else "ext2"
    return next((name for at, magic, name in _MAGICS if head[at : at + len(magic)] == magic), None)
