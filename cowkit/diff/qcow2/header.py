"""Reads the header of a qcow2 version 3 image, strictly: what kind of image it is, and what it stands on.

Sections are those of QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from cowkit.diff.qcow2.layout import (
    BITMAPS,
    BITMAPS_CONSISTENT,
    COMPRESSION_TYPE,
    COMPRESSION_TYPES,
    EXTENDED_L2,
    EXTENSION,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_BITMAPS,
    EXTENSION_END,
    EXTENSION_IDENTITY,
    HEADER,
    INCOMPATIBLE_FEATURES,
    LONGEST_BACKING_NAME,
    LONGEST_FORMAT_NAME,
    MAGIC,
    SMALLEST_SPLIT_CLUSTER,
    VERSION,
    Bitmaps,
    Header,
    up,
)
from cowkit.disk.files import NO_DISK
from cowkit.errors import ImageError

MOST_CLUSTER_BITS = 21
_LEAST_CLUSTER_BITS = 9
_RAW_EXTERNAL_DATA = 2  # of autoclear_features ("Header", bit 1)
_LONGEST_CHAIN = 200


class Head(NamedTuple):
    """What the first cluster of an image says."""

    header: Header
    backing_file: str | None
    backing_format: str | None
    compression: str
    bitmaps: Bitmaps | None
    identity: bytes | None
    """Who the backing file is, as :class:`cowkit.diff.recorded.Recorded` reads it; None in images of other programs."""


def backing_chain(path: str) -> list[str]:
    """The files that the image at ``path`` stands on, one on top of the other; none where it is no qcow2 image.

    Names are followed as QEMU does: a relative one from the directory of the image that has it. The list ends at the
    first that cannot be read.
    """
    chain: list[str] = []
    while len(chain) < _LONGEST_CHAIN:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                break
            fd = open_image(path)
            try:
                name = read_head(path, fd).backing_file
            finally:
                os.close(fd)
        except (ImageError, OSError, ValueError):
            break
        if name is None:
            break
        path = os.path.join(os.path.dirname(path), name)
        if path in chain:
            break
        chain.append(path)
    return chain


def open_image(path: str) -> int:
    """A descriptor of the file at ``path``, read-only.

    :raises ImageError: it cannot be opened.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)  # before it is opened: opening a pipe waits for a writer
        if kind in NO_DISK:
            raise ImageError(f"{path} is {NO_DISK[kind]}, and no image: give a qcow2 file")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ImageError(f"cannot open image {path}: {error.strerror}") from error
    except ValueError as error:  # a null byte in the path
        raise ImageError(f"cannot open image {path!r}: {error}") from error


def read_head(path: str, fd: int) -> Head:
    """What the first cluster of the image at ``path``, open as ``fd``, says ("Header", "Header extensions").

    :raises ImageError: it is no sound qcow2 version 3 image, or uses a feature that is not read here.
    """

    def bad(what: str) -> ImageError:
        return ImageError(f"image {path} is damaged or not for cowkit: {what}")

    try:
        raw = os.pread(fd, HEADER.size, 0)
        if raw.startswith(MAGIC):  # few bases are qcow2, and 2 MiB of new memory cost a millisecond
            raw = os.pread(fd, 1 << MOST_CLUSTER_BITS, 0)
    except OSError as error:
        raise ImageError(f"cannot read image {path}: {error.strerror}") from error
    if raw[: len(MAGIC)] != MAGIC:
        raise ImageError(f"{path} is no qcow2 image: it does not begin with 'QFI' and 0xfb")
    if len(raw) < HEADER.size:
        raise bad(f"it ends within its header, after {len(raw)} bytes")
    header = Header._make(HEADER.unpack_from(raw))
    if header.version == 2:
        raise ImageError(
            f"image {path} is of qcow2 version 2, and cowkit reads version {VERSION}: `qemu-img amend -f qcow2 -o compat=1.1 {path}` "
            "makes it one"
        )
    if header.version != VERSION:
        raise bad(f"it has version {header.version}, and cowkit reads version {VERSION}")
    for bit in range(64):
        if header.incompatible_features >> bit & 1 and bit not in (COMPRESSION_TYPE, EXTENDED_L2):
            feature = INCOMPATIBLE_FEATURES[bit] if bit < len(INCOMPATIBLE_FEATURES) else "unknown"
            raise bad(f"it has the incompatible feature {bit} ({feature})")
    if header.autoclear_features & _RAW_EXTERNAL_DATA:
        raise bad("it says that an external data file is raw, and has none")
    if not _LEAST_CLUSTER_BITS <= header.cluster_bits <= MOST_CLUSTER_BITS:
        raise bad(f"it has clusters of 2**{header.cluster_bits} bytes")
    if header.crypt_method:
        raise ImageError(
            f"image {path} is encrypted, and cowkit reads no encrypted images: use QEMU's programs, or write it to one that is not "
            "encrypted with `qemu-img convert` and its secret"
        )
    if header.nb_snapshots or header.snapshots_offset:
        raise bad(f"it has {header.nb_snapshots} internal snapshots, at byte {header.snapshots_offset}")
    if header.refcount_order > 6:
        raise bad(f"it has refcounts of 2**{header.refcount_order} bits")
    cluster = raw[: 1 << header.cluster_bits]
    if header.header_length < HEADER.size or header.header_length % 8 or header.header_length > len(cluster):
        raise bad(f"its header has {header.header_length} bytes")
    kind = cluster[HEADER.size] if header.header_length > HEADER.size else 0
    if kind >= len(COMPRESSION_TYPES) or bool(kind) != bool(header.incompatible_features >> COMPRESSION_TYPE & 1):
        raise bad(f"its compression type is {kind}, which its features contradict or cowkit does not know")
    if header.incompatible_features >> EXTENDED_L2 & 1 and len(cluster) < SMALLEST_SPLIT_CLUSTER:
        raise bad(f"it has subclusters in clusters of {len(cluster)} bytes")
    name: str | None = None
    end = len(cluster)
    if header.backing_file_offset:
        start, length = header.backing_file_offset, header.backing_file_size
        end = start
        if not 0 < length <= LONGEST_BACKING_NAME or start < header.header_length or start + length > len(cluster):
            raise bad(f"the name of its backing file has {length} bytes at byte {start}")
        name = os.fsdecode(cluster[start : start + length])
        if "\0" in name:
            raise bad("the name of its backing file has a null byte")
    extensions = _extensions(cluster[:end], header.header_length, bad)
    backing_format = _backing_format(extensions, bad)
    bitmaps = _bitmaps(header, extensions, bad)
    return Head(header, name, backing_format, COMPRESSION_TYPES[kind], bitmaps, extensions.get(EXTENSION_IDENTITY))


def _extensions(area: bytes, at: int, bad: Callable[[str], ImageError]) -> dict[int, bytes]:
    """The header extensions, which are in ``area`` from ``at`` on, by their types."""
    found: dict[int, bytes] = {}
    while at + EXTENSION.size <= len(area):
        kind, length = EXTENSION.unpack_from(area, at)
        at += EXTENSION.size
        if at + length > len(area):
            raise bad(f"header extension {kind:#x} has {length} bytes, more than there are")
        if kind == EXTENSION_END:
            break
        found[kind] = area[at : at + length]
        at = up(at + length, 8)
    return found


def _backing_format(extensions: dict[int, bytes], bad: Callable[[str], ImageError]) -> str | None:
    name = extensions.get(EXTENSION_BACKING_FORMAT)
    if name is None:
        return None
    if len(name) > LONGEST_FORMAT_NAME:
        raise bad(f"the name of its backing file's format has {len(name)} bytes")
    return name.decode("ascii", "backslashreplace")


def _bitmaps(header: Header, extensions: dict[int, bytes], bad: Callable[[str], ImageError]) -> Bitmaps | None:
    """Where the bitmaps are; those that somebody who did not know of them has made stale count as none."""
    data = extensions.get(EXTENSION_BITMAPS)
    if data is None or not header.autoclear_features >> BITMAPS_CONSISTENT & 1:
        return None
    if len(data) != BITMAPS.size:
        raise bad(f"its bitmaps extension has {len(data)} bytes")
    number, _, size, offset = BITMAPS.unpack(data)
    return Bitmaps(number, size, offset)
