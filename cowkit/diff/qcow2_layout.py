"""Where everything lies in a qcow2 version 3 image: constants, records and arithmetic, no input or output.

The names and the sections referred to are those of QEMU's docs/interop/qcow2.txt. All numbers are big-endian.
The sizes of tables are QEMU's own: an L1 table of at most 32 MiB, a refcount table of at most 8 MiB, refcounts of 16 bits.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from cowkit.disk.sizes import format_size
from cowkit.errors import UsageError

MAGIC = b"QFI\xfb"
VERSION = 3

SMALLEST_CLUSTER = 4096
LARGEST_CLUSTER = 2 << 20
DEFAULT_CLUSTER = 64 << 10

SECTOR = 512
"""QEMU counts an image's size in these."""

LONGEST_BACKING_NAME = 1023
"""In bytes ("Header", backing_file_size)."""

LARGEST_L1_TABLE = 32 << 20
LARGEST_REFCOUNT_TABLE = 8 << 20
"""In bytes; limits of QEMU's ("Header", size; "Host cluster management")."""

ENTRY = struct.Struct(">Q")
"""An entry of an L1, L2 or refcount table ("Cluster mapping", "Host cluster management")."""

COPIED = 1 << 63
"""Of an L1 or L2 entry: the cluster's refcount is exactly one ("Cluster mapping", bit 63)."""

COMPRESSED = 1 << 62
"""Of an L2 entry: a compressed cluster ("Cluster mapping", bit 62)."""

READS_AS_ZERO = 1
"""Of an L2 entry: the cluster reads as zeroes, whatever the backing file has ("Standard Cluster Descriptor", bit 0)."""

OFFSET_MASK = (1 << 56) - (1 << 9)
"""Of an L1 or L2 entry: the offset in the file ("Cluster mapping", bits 9 to 55)."""

REFCOUNT_ORDER = 4
"""Refcounts of 2**4 bits ("Header", refcount_order)."""
REFCOUNT_BYTES = 2

EXTENSION = struct.Struct(">II")
"""Type and length of a header extension; its data follows, padded to 8 bytes ("Header extensions")."""
EXTENSION_END = 0
EXTENSION_BACKING_FORMAT = 0xE2792ACA

INCOMPATIBLE_FEATURES = ("dirty", "corrupt", "external data file", "compression type", "extended L2 entries")
"""Names of the bits of incompatible_features, from bit 0 on ("Header")."""


class Header(NamedTuple):
    """The fields of the header, in the file's order ("Header"; every version 3 image has these 104 bytes)."""

    magic: bytes
    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int
    compatible_features: int
    autoclear_features: int
    refcount_order: int
    header_length: int


HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
"""The header's fields, see :class:`Header` ("Header")."""


def up(number: int, unit: int) -> int:
    """``number`` rounded up to a multiple of ``unit``."""
    return -(-number // unit) * unit


def down(number: int, unit: int) -> int:
    """``number`` rounded down to a multiple of ``unit``."""
    return number // unit * unit


def image_size(size: int) -> int:
    """The virtual size of an image that holds ``size`` bytes: QEMU counts sectors, and reads the last one's rest as zeroes."""
    return up(size, SECTOR)


def check_cluster_size(cluster_size: int) -> int:
    """``cluster_size`` if it can be one.

    :raises UsageError: it is no power of two from 4096 bytes to 2 MiB.
    """
    if not SMALLEST_CLUSTER <= cluster_size <= LARGEST_CLUSTER or cluster_size & (cluster_size - 1):
        raise UsageError(
            f"cluster size {cluster_size} is no power of two from {SMALLEST_CLUSTER} to {LARGEST_CLUSTER} bytes (2 MiB)"
        )
    return cluster_size


class Geometry(NamedTuple):
    """What follows from the two numbers of an image: its virtual size and its cluster size, both in bytes."""

    size: int
    cluster_size: int

    @property
    def cluster_bits(self) -> int:
        """The cluster size as a power of two ("Header", cluster_bits)."""
        return self.cluster_size.bit_length() - 1

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table, which is one cluster ("Cluster mapping")."""
        return self.cluster_size // ENTRY.size

    @property
    def l2_reach(self) -> int:
        """How many bytes of the disk one L2 table maps."""
        return self.l2_entries * self.cluster_size

    @property
    def l1_entries(self) -> int:
        """Entries that the L1 table needs ("Header", l1_size)."""
        return -(-self.size // self.l2_reach)

    @property
    def refcounts(self) -> int:
        """Clusters that one refcount block, which is one cluster, counts ("Host cluster management")."""
        return self.cluster_size // REFCOUNT_BYTES


def geometry(size: int, cluster_size: int) -> Geometry:
    """The geometry of an image for a disk of ``size`` bytes, which is rounded up to whole sectors.

    :raises UsageError: no such cluster size, or the disk is too large for it.
    """
    made = Geometry(image_size(size), check_cluster_size(cluster_size))
    if made.l1_entries * ENTRY.size > LARGEST_L1_TABLE:
        most = LARGEST_L1_TABLE // ENTRY.size * made.l2_reach
        raise UsageError(
            f"a disk of {format_size(size)} is too large for clusters of {format_size(cluster_size)}, which reach "
            f"{format_size(most)}: give a larger cluster size"
        )
    return made


class Refcounts(NamedTuple):
    """How many clusters the refcount structures take, and how many the file has with them."""

    blocks: int
    table_clusters: int
    total: int


def refcounts_for(shape: Geometry, clusters: int) -> Refcounts:
    """The refcount structures of a file with ``clusters`` others; they count themselves as well."""
    blocks = table = 0
    while True:
        total = clusters + blocks + table
        need_blocks = -(-total // shape.refcounts)
        need_table = -(-need_blocks * ENTRY.size // shape.cluster_size)
        if (need_blocks, need_table) == (blocks, table):
            return Refcounts(blocks, table, total)
        blocks, table = need_blocks, need_table


def head_of_file(
    shape: Geometry,
    *,
    l1_table_offset: int,
    refcount_table_offset: int,
    refcount_table_clusters: int,
    backing_file: bytes | None,
    backing_format: str,
) -> bytes:
    """The header, its extensions and the name of the backing file: the beginning of the first cluster."""
    extensions = b""
    if backing_file is not None:
        format_name = backing_format.encode()
        extensions += EXTENSION.pack(EXTENSION_BACKING_FORMAT, len(format_name))
        extensions += format_name.ljust(up(len(format_name), 8), b"\0")
    extensions += EXTENSION.pack(EXTENSION_END, 0)
    header = Header(
        magic=MAGIC,
        version=VERSION,
        backing_file_offset=HEADER.size + len(extensions) if backing_file is not None else 0,
        backing_file_size=len(backing_file) if backing_file is not None else 0,
        cluster_bits=shape.cluster_bits,
        size=shape.size,
        crypt_method=0,
        l1_size=shape.l1_entries,
        l1_table_offset=l1_table_offset,
        refcount_table_offset=refcount_table_offset,
        refcount_table_clusters=refcount_table_clusters,
        nb_snapshots=0,
        snapshots_offset=0,
        incompatible_features=0,
        compatible_features=0,
        autoclear_features=0,
        refcount_order=REFCOUNT_ORDER,
        header_length=HEADER.size,
    )
    return HEADER.pack(*header) + extensions + (backing_file or b"")
