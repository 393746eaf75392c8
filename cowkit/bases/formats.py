"""Which format a base has: told by its name and its first bytes together, or by the user.

Design note. A guest may write what it likes into a raw disk, so also the first bytes of a qcow2 image that names a file of
the host as its backing file. Therefore content alone never decides: name and content agree, or the user says the format,
or an error asks. This holds for compressed files, too, since a raw disk may begin with the bytes of one.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from cowkit.errors import BaseOpenError, UsageError

HEAD = 512
"""How many of a base's first bytes (and of its last ones) are looked at."""

COMPRESSED = {"xz": "xz", "gz": "gzip", "zst": "zstd", "bz2": "bzip2"}
"""Compressions, by format, and what people call them."""

IMAGES = ("qcow2", "qcow", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels", "dmg", "bochs", "cloop")
"""Image formats, called as QEMU calls its drivers."""

FORMATS = ("raw", *COMPRESSED, *IMAGES)

_ALIASES = {"gzip": "gz", "zstd": "zst", "bzip2": "bz2", "vhd": "vpc"}

_EXTENSIONS = {
    ".xz": "xz",
    ".gz": "gz",
    ".zst": "zst",
    ".zstd": "zst",
    ".bz2": "bz2",
    ".qcow2": "qcow2",
    ".qcow": "qcow",
    ".vmdk": "vmdk",
    ".vdi": "vdi",
    ".vhdx": "vhdx",
    ".vhd": "vpc",
    ".vpc": "vpc",
    ".qed": "qed",
    ".hdd": "parallels",
    ".hds": "parallels",
    ".dmg": "dmg",
}

_SKIPPABLE_ZSTD = range(0x184D2A50, 0x184D2A60)
_BZIP2_BLOCKS = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")  # a block begins, the stream ends


class _Magic(NamedTuple):
    format: str
    offset: int
    value: bytes


_MAGICS = (
    _Magic("xz", 0, b"\xfd7zXZ\0"),
    _Magic("gz", 0, b"\x1f\x8b\x08"),
    _Magic("zst", 0, b"\x28\xb5\x2f\xfd"),
    _Magic("qcow", 0, b"QFI\xfb\0\0\0\x01"),
    _Magic("qcow2", 0, b"QFI\xfb"),
    _Magic("vmdk", 0, b"KDMV"),
    _Magic("vmdk", 0, b"COWD"),
    _Magic("vmdk", 0, b"# Disk DescriptorFile"),
    _Magic("vhdx", 0, b"vhdxfile"),
    _Magic("vpc", 0, b"conectix"),
    _Magic("qed", 0, b"QED\0"),
    _Magic("parallels", 0, b"WithoutFreeSpace"),
    _Magic("parallels", 0, b"WithouFreSpacExt"),
    _Magic("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    _Magic("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n"),
    _Magic("bochs", 0, b"Bochs Virtual HD Image\0"),
)

_FOOTERS = (_Magic("vpc", 0, b"conectix"), _Magic("dmg", 0, b"koly"))
"""At the beginning of the last 512 bytes. What lies in front is the guest's, so these count for a name that says so, alone."""


def known_format(name: str) -> str:
    """``name`` as this module calls the format.

    :raises UsageError: there is no such format.
    """
    found = _ALIASES.get(name.lower(), name.lower())
    if found not in FORMATS:
        raise UsageError(f"base format {name!r} is none of {', '.join(FORMATS)}")
    return found


def format_of_name(name: str) -> str | None:
    """The format that a file's name claims; None where it claims none, as ``disk.img`` does."""
    return _EXTENSIONS.get(os.path.splitext(name)[1].lower())


def format_of_content(head: bytes) -> str | None:
    """The format that a base's first bytes are the beginning of; None where they look like no format's."""
    for magic in _MAGICS:
        if head[magic.offset :].startswith(magic.value):
            return magic.format
    if head[:3] == b"BZh" and head[4:10] in _BZIP2_BLOCKS:
        return "bz2"
    if len(head) >= 4 and struct.unpack_from("<I", head)[0] in _SKIPPABLE_ZSTD:
        return "zst"
    return None


def detect(given: str, head: bytes, tail: bytes) -> str:
    """The format of the base that is called ``given``, begins with ``head`` and ends with ``tail``.

    :raises BaseOpenError: its name and its content do not agree: the user has to say.
    """
    name = format_of_name(given)
    content = format_of_content(head)
    if name is None and content is None:
        return "raw"
    if name == content or any(footer.format == name and tail.startswith(footer.value) for footer in _FOOTERS):
        assert name is not None
        return name
    if content is None:
        raise BaseOpenError(
            f"base {given} is called {_called(name)} and does not begin like one: "
            "if it is a raw disk, say so with base_format='raw' (--format raw)"
        )
    claim = "its name does not say so" if name is None else f"its name says {name}"
    raise BaseOpenError(
        f"base {given} begins like {_called(content)} and {claim}: a raw disk's guest can write such bytes, too, "
        f"so say which it is, with base_format={content!r} or base_format='raw' (--format {content}, --format raw)"
    )


def _called(format_name: str | None) -> str:
    assert format_name is not None
    if format_name in COMPRESSED:
        article = "an" if format_name == "xz" else "a"
        return f"{article} {COMPRESSED[format_name]} file"
    return f"a {format_name} image"
