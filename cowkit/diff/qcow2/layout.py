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

LONGEST_FORMAT_NAME = 15
"""In bytes; QEMU's."""

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

COMPRESSED_UNIT = 512
"""Compressed clusters are measured in these, and begin at any byte ("Compressed Clusters Descriptor")."""

SUBCLUSTERS = 32
"""Of a cluster, with extended L2 entries ("Extended L2 Entries")."""

SMALLEST_SPLIT_CLUSTER = 512 * SUBCLUSTERS
"""The smallest cluster that QEMU divides: its subclusters are sectors."""

EXTENDED_ENTRY = struct.Struct(">QQ")
"""An extended L2 entry: the descriptor and the bitmap, in which bit x says that subcluster x is in the file and bit 32 + x
that it reads as zeroes ("Extended L2 Entries")."""

OFFSET_MASK = (1 << 56) - (1 << 9)
"""Of an L1 or L2 entry: the offset in the file ("Cluster mapping", bits 9 to 55)."""

REFCOUNT_ORDER = 4
"""Refcounts of 2**4 bits ("Header", refcount_order)."""
REFCOUNT_BYTES = 2

_PAGE = 4096

EXTENSION = struct.Struct(">II")
"""Type and length of a header extension; its data follows, padded to 8 bytes ("Header extensions")."""
EXTENSION_END = 0
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_BITMAPS = 0x23852875
EXTENSION_IDENTITY = int.from_bytes(b"cowk", "big")
"""cowkit's own: who the backing file is, and the disk's exact size. QEMU ignores what it does not know, and keeps it when it rewrites the
header."""

BITMAPS = struct.Struct(">IIQQ")
"""The bitmaps extension: how many there are, zero, size and offset of their directory ("Bitmaps extension")."""

DIRECTORY_ENTRY = struct.Struct(">QIIBBHI")
"""Of the directory of bitmaps: table's offset and entries, flags, type, granularity bits, bytes of the name and of extra
data; the name follows ("Bitmap directory")."""

ALL_SET = 1
"""An entry of a bitmap's table for bits that are all set, in no cluster ("Bitmap table", bit 0)."""

LONGEST_BITMAP_NAME = 1023
"""In bytes, to QEMU."""

INCOMPATIBLE_FEATURES = ("dirty", "corrupt", "external data file", "compression type", "extended L2 entries")
"""Names of the bits of incompatible_features, from bit 0 on ("Header")."""


DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION_TYPE, EXTENDED_L2 = range(5)
"""Those bits."""

BITMAPS_CONSISTENT = 0
"""The bit of autoclear_features that says that whoever wrote the image last knew of its bitmaps ("Header")."""

COMPRESSION_TYPES = ("zlib", "zstd")
"""What compression_type says, from 0 on ("Header"); an image without that field has zlib."""


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

COMPRESSION_FIELD = struct.Struct(">B7x")
"""What follows them in an image whose clusters are compressed by something else than zlib ("Header", compression_type)."""


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


def check_format_name(name: str) -> str:
    """``name`` if a backing file's format can be called so.

    :raises UsageError: it is empty, has over 15 bytes, or is no plain word.
    """
    if not (0 < len(name) <= LONGEST_FORMAT_NAME and name.isascii() and name.replace("-", "").isalnum()):
        raise UsageError(f"backing format {name[:40]!r} is no name of a format, such as 'raw' or 'qcow2'")
    return name


class Geometry(NamedTuple):
    """What follows from an image's virtual size and cluster size, both in bytes, and from whether clusters are divided."""

    size: int
    cluster_size: int
    subclusters: bool = False
    """Whether L2 entries are extended ones."""

    @property
    def cluster_bits(self) -> int:
        """The cluster size as a power of two ("Header", cluster_bits)."""
        return self.cluster_size.bit_length() - 1

    @property
    def grain(self) -> int:
        """The least that the image can take from the backing file or not, in bytes: a subcluster, or a cluster."""
        return self.cluster_size // SUBCLUSTERS if self.subclusters else self.cluster_size

    def portion(self, block_size: int) -> int:
        """The least of a disk with blocks of ``block_size`` that is looked at and written to the file, in bytes.

        Smaller grains than blocks are written as many as a page has, whose room they take anyway.
        """
        return max(self.grain, min(_PAGE, block_size, self.cluster_size))

    @property
    def l2_entry(self) -> int:
        """Bytes of an L2 entry."""
        return EXTENDED_ENTRY.size if self.subclusters else ENTRY.size

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table, which is one cluster ("Cluster mapping")."""
        return self.cluster_size // self.l2_entry

    @property
    def compressed_offset_bits(self) -> int:
        """How many bits of a compressed cluster's L2 entry are its offset ("Compressed Clusters Descriptor")."""
        return 62 - (self.cluster_bits - 8)

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


def geometry(size: int, cluster_size: int, *, subclusters: bool = False) -> Geometry:
    """The geometry of an image for a disk of ``size`` bytes, which is rounded up to whole sectors.

    :raises UsageError: no such cluster size, or the disk is too large for it.
    """
    made = Geometry(image_size(size), check_cluster_size(cluster_size), subclusters)
    if subclusters and cluster_size < SMALLEST_SPLIT_CLUSTER:
        raise UsageError(
            f"clusters of {cluster_size} bytes have no subclusters: give a cluster size of {SMALLEST_SPLIT_CLUSTER} or more"
        )
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


class Bitmaps(NamedTuple):
    """Where an image's persistent bitmaps are ("Bitmaps extension")."""

    number: int
    directory_size: int
    directory_offset: int


def head_of_file(
    shape: Geometry,
    *,
    l1_table_offset: int,
    refcount_table_offset: int,
    refcount_table_clusters: int,
    backing_file: bytes | None,
    backing_format: str,
    compression: int = 0,
    bitmaps: Bitmaps | None = None,
    identity: bytes | None = None,
) -> bytes:
    """The header, its extensions and the name of the backing file: the beginning of the first cluster.

    :param compression: the index in :data:`COMPRESSION_TYPES`.
    :param identity: who the backing file is, as :class:`cowkit.diff.recorded.Recorded` puts it. There is room for it in the
        smallest cluster: with the longest name, all this takes less than 3,300 bytes.
    """
    more = COMPRESSION_FIELD.pack(compression) if compression else b""
    extensions = b""
    if backing_file is not None:
        extensions += extension(EXTENSION_BACKING_FORMAT, backing_format.encode())
    if bitmaps is not None:
        data = BITMAPS.pack(bitmaps.number, 0, bitmaps.directory_size, bitmaps.directory_offset)
        extensions += extension(EXTENSION_BITMAPS, data)
    if identity is not None:
        extensions += extension(EXTENSION_IDENTITY, identity)
    extensions += extension(EXTENSION_END, b"")
    before = HEADER.size + len(more) + len(extensions)
    header = Header(
        magic=MAGIC,
        version=VERSION,
        backing_file_offset=before if backing_file is not None else 0,
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
        incompatible_features=bool(compression) << COMPRESSION_TYPE | shape.subclusters << EXTENDED_L2,
        compatible_features=0,
        autoclear_features=(bitmaps is not None) << BITMAPS_CONSISTENT,
        refcount_order=REFCOUNT_ORDER,
        header_length=HEADER.size + len(more),
    )
    return HEADER.pack(*header) + more + extensions + (backing_file or b"")


def extension(kind: int, data: bytes) -> bytes:
    """A header extension ("Header extensions")."""
    return EXTENSION.pack(kind, len(data)) + data.ljust(up(len(data), 8), b"\0")
