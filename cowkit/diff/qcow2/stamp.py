"""Puts the identity of the backing file into an image that another program wrote ("Header extensions")."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cowkit.diff.qcow2.layout import (
    EXTENSION,
    EXTENSION_END,
    EXTENSION_IDENTITY,
    HEADER,
    MAGIC,
    VERSION,
    Header,
    extension,
    up,
)
from cowkit.disk.files import pwrite_whole
from cowkit.errors import ImageError, OutputError

if TYPE_CHECKING:
    from cowkit.diff.recorded import Recorded

_CLUSTER_BITS = range(9, 22)
_FEATURE_NAMES = 0x6803F857
"""Names for people of the feature bits: what has to go where there is no room ("Feature name table")."""
_BACKING_NAME_AT = 8
"""The offset of backing_file_offset in the header ("Header")."""


def stamp(path: str | os.PathLike[str], identity: Recorded) -> None:
    """Put ``identity`` into the header of the qcow2 version 3 image at ``path``, in place of one that is there.

    The header's other extensions stay as they are, byte by byte, and the name of the backing file moves behind them. All of it
    is one write; nobody else may have the image open.

    :raises ImageError: it is no such image, or its first cluster has no room.
    :raises OutputError: it cannot be written to.
    """
    name = os.fspath(path)
    try:
        fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {name!r}: {getattr(error, 'strerror', None) or error}") from error
    try:
        cluster = os.pread(fd, 1 << _CLUSTER_BITS[-1], 0)
        pwrite_whole(fd, memoryview(_stamped(cluster, identity.to_bytes(), name)), 0)
    except OSError as error:
        raise OutputError(f"cannot write {name}: {error.strerror}") from error
    finally:
        os.close(fd)


def _stamped(raw: bytes, identity: bytes, path: str) -> bytes:
    """The beginning of the image's first cluster with the identity in it."""
    if len(raw) < HEADER.size or raw[: len(MAGIC)] != MAGIC:
        raise ImageError(f"{path} is no qcow2 image, and its base cannot be recorded in it")
    header = Header._make(HEADER.unpack_from(raw))
    if header.version != VERSION or header.cluster_bits not in _CLUSTER_BITS:
        raise ImageError(f"image {path} is no qcow2 image of version {VERSION}, and its base cannot be recorded in it")
    size = 1 << header.cluster_bits
    raw = raw[:size].ljust(size, b"\0")
    start, length = header.backing_file_offset, header.backing_file_size if header.backing_file_offset else 0
    if not HEADER.size <= header.header_length <= size or (
        start and not header.header_length <= start <= size - length
    ):
        raise ImageError(f"image {path} is damaged: its header does not fit into its first cluster")
    found = _extensions(raw[: start or size], header.header_length, path)
    kept = b"".join(whole for kind, whole in found if kind != EXTENSION_IDENTITY)
    end = extension(EXTENSION_END, b"")
    ours = extension(EXTENSION_IDENTITY, identity)
    if header.header_length + len(kept) + len(ours) + len(end) + length > size:
        kept = b"".join(whole for kind, whole in found if kind not in (EXTENSION_IDENTITY, _FEATURE_NAMES))
    new_start = header.header_length + len(kept) + len(ours) + len(end)
    if new_start + length > size:
        raise ImageError(f"image {path} has no room for the identity of its base in its first {size} bytes")
    head = bytearray(raw[: header.header_length])
    if start:
        head[_BACKING_NAME_AT : _BACKING_NAME_AT + 8] = new_start.to_bytes(8, "big")
    return bytes(head) + kept + ours + end + raw[start : start + length]


def _extensions(area: bytes, at: int, path: str) -> list[tuple[int, bytes]]:
    """The type and all the bytes of each header extension."""
    found: list[tuple[int, bytes]] = []
    while at + EXTENSION.size <= len(area):
        kind, length = EXTENSION.unpack_from(area, at)
        end = up(at + EXTENSION.size + length, 8)
        if kind == EXTENSION_END:
            break
        if end > len(area):
            raise ImageError(
                f"image {path} is damaged: header extension {kind:#x} has {length} bytes, more than there are"
            )
        found.append((kind, area[at:end]))
        at = end
    return found
