"""Reads qcow2 version 3 images, strictly: whatever a field or an entry says is checked before it is believed.

It reads what cowkit writes and what QEMU writes without special features: no encryption, internal snapshots or external
data files. Those are refused by name, as is every incompatible feature that is not known ("Header",
incompatible_features). Sections are those of QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from cowkit.diff.qcow2.bitmap_reader import StoredBitmap, read_bitmaps
from cowkit.diff.qcow2.compression import decompress
from cowkit.diff.qcow2.header import open_image, read_head
from cowkit.diff.qcow2.layout import (
    COMPRESSED,
    COMPRESSED_UNIT,
    COPIED,
    ENTRY,
    EXTENDED_L2,
    LARGEST_L1_TABLE,
    LARGEST_REFCOUNT_TABLE,
    OFFSET_MASK,
    READS_AS_ZERO,
    REFCOUNT_BYTES,
    REFCOUNT_ORDER,
    SUBCLUSTERS,
    Geometry,
    up,
)
from cowkit.disk.extent import Extent, Kind, merged
from cowkit.errors import ImageError, UsageError

Pread = Callable[[int, int], bytes]
"""``pread(length, offset)``, as bases and disks have it."""

_CACHED_TABLES = 64
_MANY = 8
"""Pieces of the backing file that are read at once, if they are an eighth of what lies between them."""
_ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1


class _Run(NamedTuple):
    """A run of one kind, and where in the file its data begin; or the L2 entry of a compressed cluster that it is in."""

    extent: Extent
    host: int = 0
    compressed: int = 0


class Qcow2Image:
    """The image at ``path``, read-only, merged with its backing file.

    :param backing_pread: reads the backing file, ``pread(length, offset)``; needed for reading where the image has one.
    :param backing_size: the backing file's size in bytes; beyond it, it reads as zeroes.
    :raises ImageError: it cannot be opened, is no sound qcow2 version 3 image or uses a feature that is not read here.
    """

    def __init__(self, path: str | os.PathLike[str], backing_pread: Pread | None = None, backing_size: int = 0) -> None:
        self.path = os.fspath(path)
        self._backing_pread = backing_pread
        self._backing_size = backing_size
        self._tables: dict[int, tuple[int, ...]] = {}
        self._unpacked: tuple[int, bytes] = (0, b"")
        """The compressed cluster that was last read: its L2 entry and its content."""
        self._fd = open_image(self.path)
        try:
            self._file_size = os.lseek(self._fd, 0, os.SEEK_END)
            head = read_head(self.path, self._fd)
            self._header = head.header
            self.backing_file = head.backing_file
            """The name of the backing file as it is recorded; None without one."""
            self.backing_format = head.backing_format
            """The backing file's format as it is recorded, such as ``"raw"``; None where it is not."""
            self.identity = head.identity
            """Who the backing file is, as :class:`cowkit.diff.recorded.Recorded` reads it; None where it is not recorded."""
            self._compression = head.compression
            self._shape = Geometry(
                head.header.size,
                1 << head.header.cluster_bits,
                subclusters=bool(head.header.incompatible_features >> EXTENDED_L2 & 1),
            )
            self._check_header()
            self._l1 = self._read_l1()
            self._directory = (
                (head.bitmaps.directory_offset, -(-head.bitmaps.directory_size // self.cluster_size))
                if head.bitmaps
                else None
            )
            self._bitmaps: dict[str, StoredBitmap] = read_bitmaps(
                head.bitmaps, self._shape, self._read_clusters, self._bad
            )
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        return self._shape.size

    @property
    def subclusters(self) -> bool:
        """Whether its clusters are divided by 32."""
        return self._shape.subclusters

    @property
    def cluster_size(self) -> int:
        """In bytes."""
        return self._shape.cluster_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes of the disk from ``offset`` on: the image's, and the backing file's where it has none.

        :raises UsageError: the range is not within the disk, or the backing file is needed and was not given.
        :raises ImageError: the image is damaged there.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise UsageError(f"bytes {offset} to {offset + length} are not within the image, which has {self.size}")
        parts = []
        runs = list(self._runs(offset, offset + length))
        below = self._all_below(runs)
        for run, host, compressed in runs:
            if compressed:
                at = run.offset % self.cluster_size
                parts.append(self._decompressed(compressed)[at : at + run.length])
            elif run.kind is Kind.DATA:
                parts.append(self._read(run.length, host, "data"))
            elif run.kind is Kind.ZERO or self.backing_file is None:
                parts.append(bytes(run.length))
            elif below is not None:
                parts.append(below[run.offset - offset : run.offset - offset + run.length])
            else:
                parts.append(self._read_backing(run.length, run.offset))
        return b"".join(parts)

    def _all_below(self, runs: Sequence[_Run]) -> bytes | None:
        """What the backing file has where ``runs`` are, in one read; None where that would be far more than is wanted.

        It may be behind another program, to which a hundred small reads are a hundred ways there and back.
        """
        wanted = [run.length for run, _, _ in runs if run.kind is Kind.HOLE]
        if len(wanted) < _MANY or self.backing_file is None:
            return None
        first, last = runs[0][0].offset, runs[-1][0].end
        return self._read_backing(last - first, first) if sum(wanted) * _MANY >= last - first else None

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """What the image itself holds: ``DATA``, ``ZERO``, or ``HOLE`` where the backing file shows through.

        :raises ImageError: the image is damaged there.
        """
        end = self.size if length is None else min(offset + length, self.size)
        return merged(run.extent for run in self._runs(offset, end))

    def bitmap(self, name: str) -> Iterator[Extent]:
        """What the persistent bitmap ``name`` has as dirty (``DATA``), in order.

        :raises UsageError: there is no such bitmap.
        :raises ImageError: the image is damaged there.
        """
        if name not in self._bitmaps:
            there = ", ".join(self._bitmaps) or "none"
            raise UsageError(f"image {self.path} has no bitmap {name!r} (it has {there})")
        return merged(self._bitmaps[name].extents(self.size, self._read_clusters))

    @property
    def bitmaps(self) -> list[str]:
        """The names of the persistent bitmaps."""
        return list(self._bitmaps)

    def check(self) -> None:
        """Check that each cluster of the file has as many users as its refcount says, more than one only if they are compressed.

        :raises ImageError: it is not so.
        """
        size = self.cluster_size
        if self._header.refcount_order != REFCOUNT_ORDER:
            raise self._bad(f"it has refcounts of {1 << self._header.refcount_order} bits, and cowkit checks 16")
        uses = array("H", bytes(-(-self._file_size // size) * REFCOUNT_BYTES))
        packed: set[int] = set()

        def use(offset: int, what: str, count: int = 1) -> None:
            for cluster in range(offset // size, offset // size + count):
                if uses[cluster]:
                    raise self._bad(f"the cluster at byte {cluster * size} is used twice, again as {what}")
                uses[cluster] = 1

        use(0, "the header")
        if self._l1:
            use(self._header.l1_table_offset, "the L1 table", -(-len(self._l1) * ENTRY.size // size))
        use(self._header.refcount_table_offset, "the refcount table", self._header.refcount_table_clusters)
        for stored in self._bitmaps.values():
            for offset in stored.clusters:
                use(offset, "a bitmap")
        if self._directory:
            use(self._directory[0], "the directory of bitmaps", self._directory[1])
        for index, entry in enumerate(self._l1):
            if not entry:
                continue
            use(self._marked(entry, f"L1 entry {index}"), "an L2 table")
            for at, each in enumerate(self._table(index)[:: 2 if self._shape.subclusters else 1]):
                if each & COMPRESSED:
                    host, length = self._place(each)
                    for cluster in range(host // size, -(-(host + length) // size)):
                        if uses[cluster] and cluster not in packed:
                            raise self._bad(
                                f"the cluster at byte {cluster * size} is used twice, again for compressed data"
                            )
                        packed.add(cluster)
                        uses[cluster] += 1
                elif each & OFFSET_MASK:
                    use(self._marked(each, f"L2 entry {at} of table {index}"), "data")
        table = self._read(
            self._header.refcount_table_clusters * size, self._header.refcount_table_offset, "the refcount table"
        )
        blocks = [entry for (entry,) in ENTRY.iter_unpack(table)]
        for index, entry in enumerate(blocks):
            if entry:
                use(self._offset(entry, entry, f"refcount table entry {index}"), "a refcount block")
        self._check_refcounts(blocks, uses)

    # The header

    def _check_header(self) -> None:
        header = self._header
        if header.l1_size * ENTRY.size > LARGEST_L1_TABLE:
            raise self._bad(f"its L1 table has {header.l1_size} entries, over 32 MiB")
        if header.refcount_table_clusters << header.cluster_bits > LARGEST_REFCOUNT_TABLE:
            raise self._bad(f"its refcount table has {header.refcount_table_clusters} clusters, over 8 MiB")
        if not header.refcount_table_clusters:
            raise self._bad("it has no refcount table")
        need = self._shape.l1_entries
        if header.l1_size < need:
            raise self._bad(f"its L1 table has {header.l1_size} entries, and {header.size} bytes need {need}")
        if header.l1_size:
            self._check_range(header.l1_table_offset, header.l1_size * ENTRY.size, "the L1 table")
        self._check_range(
            header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits, "the refcount table"
        )

    def _read_l1(self) -> tuple[int, ...]:
        header = self._header
        if not header.l1_size:
            return ()
        raw = self._read(header.l1_size * ENTRY.size, header.l1_table_offset, "the L1 table")
        if not raw.strip(b"\0"):
            return (0,) * header.l1_size
        entries: tuple[int, ...] = struct.unpack(f">{header.l1_size}Q", raw)
        for index, entry in enumerate(entries):
            if entry:
                self._offset(entry, entry & ~COPIED, f"L1 entry {index}")
        return entries

    # Tables

    def _table(self, index: int) -> tuple[int, ...]:
        """The L2 table that L1 entry ``index`` points to; there is one."""
        table = self._tables.get(index)
        if table is None:
            offset = self._l1[index] & OFFSET_MASK
            raw = self._read(self.cluster_size, offset, "an L2 table")
            table = struct.unpack(f">{len(raw) // ENTRY.size}Q", raw)
            if self._shape.subclusters:
                for at in range(0, len(table), 2):
                    if table[at] or table[at + 1]:
                        self._check_extended(table[at], table[at + 1], f"L2 entry {at // 2} of table {index}")
            else:
                last_seen = 0
                for at, entry in enumerate(table):
                    if entry != last_seen and entry > READS_AS_ZERO:
                        self._check_entry(entry, f"L2 entry {at} of table {index}")
                    last_seen = entry
            if len(self._tables) >= _CACHED_TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[index] = table
        return table

    def _check_entry(self, entry: int, what: str) -> None:
        """Check an L2 entry ("Cluster mapping")."""
        if entry & COMPRESSED:
            host, length = self._place(entry)
            if entry & COPIED or host < self.cluster_size or host + length > up(self._file_size, self.cluster_size):
                raise self._bad(f"{what} is {entry:#x}: no compressed cluster can be there")
            return
        if not entry & OFFSET_MASK:
            raise self._bad(f"{what} is {entry:#x}: it marks a cluster that it does not have")
        self._offset(entry, entry & ~(COPIED | READS_AS_ZERO), what)

    def _check_extended(self, entry: int, bits: int, what: str) -> None:
        """Check an extended L2 entry ("Extended L2 Entries")."""
        held, zero = bits & _ALL_SUBCLUSTERS, bits >> SUBCLUSTERS
        if entry & READS_AS_ZERO or held & zero or (held and not entry) or (bits and entry & COMPRESSED):
            raise self._bad(f"{what} is {entry:#x} with {bits:#x} for its subclusters, which contradict each other")
        if entry:
            self._check_entry(entry, what)

    def _runs(self, offset: int, end: int) -> Iterator[_Run]:
        """The range as runs of one kind."""
        size = self.cluster_size
        while offset < end:
            table, index = divmod(offset // size, self._shape.l2_entries)
            if not self._l1[table]:
                stop = min(end, (table + 1) * self._shape.l2_reach)
                yield _Run(Extent(offset, stop - offset, Kind.HOLE))
                offset = stop
                continue
            stop = min(end, (offset // size + 1) * size)
            run = Extent(offset, stop - offset, Kind.DATA)
            if self._shape.subclusters:
                entry, bits = self._table(table)[2 * index : 2 * index + 2]
            else:
                entry, bits = self._table(table)[index], 0
            if entry & COMPRESSED:
                yield _Run(run, compressed=entry)
            elif self._shape.subclusters:
                yield from self._runs_of_subclusters(run, entry & OFFSET_MASK, bits)
            elif entry & READS_AS_ZERO:
                yield _Run(run._replace(kind=Kind.ZERO))
            elif entry:
                yield _Run(run, (entry & OFFSET_MASK) + offset % size)
            else:
                yield _Run(run._replace(kind=Kind.HOLE))
            offset = stop

    def _runs_of_subclusters(self, part: Extent, host: int, bits: int) -> Iterator[_Run]:
        """The same of ``part`` of a cluster that is divided."""
        offset, grain = part.offset, self._shape.grain
        while offset < part.end:
            at = offset % self.cluster_size
            stop = min(part.end, (offset // grain + 1) * grain)
            run = Extent(offset, stop - offset, Kind.HOLE)
            if bits >> at // grain & 1:
                yield _Run(run._replace(kind=Kind.DATA), host + at)
            elif bits >> SUBCLUSTERS + at // grain & 1:
                yield _Run(run._replace(kind=Kind.ZERO))
            else:
                yield _Run(run)
            offset = stop

    # Compressed clusters

    def _place(self, entry: int) -> tuple[int, int]:
        """Where the data of a compressed cluster may be: offset and length ("Compressed Clusters Descriptor")."""
        bits = self._shape.compressed_offset_bits
        host = entry & (1 << bits) - 1
        sectors = (entry & ~(COPIED | COMPRESSED)) >> bits
        return host, (sectors + 1) * COMPRESSED_UNIT - host % COMPRESSED_UNIT

    def _decompressed(self, entry: int) -> bytes:
        """The content of a compressed cluster."""
        if self._unpacked[0] != entry:
            host, length = self._place(entry)
            packed = self._read(length, host, "compressed data")
            try:
                content = decompress(self._compression, packed, self.cluster_size)
            except ValueError as error:
                raise self._bad(f"the compressed cluster at byte {host} cannot be decompressed: {error}") from error
            if len(content) < self.cluster_size:
                raise self._bad(f"the compressed cluster at byte {host} ends after {len(content)} bytes")
            self._unpacked = entry, content
        return self._unpacked[1]

    # Refcounts

    def _marked(self, entry: int, what: str) -> int:
        if not entry & COPIED:
            raise self._bad(f"{what} does not say that its cluster has one user")
        return entry & OFFSET_MASK

    def _check_refcounts(self, blocks: list[int], uses: array[int]) -> None:
        size, entries = self.cluster_size, self._shape.refcounts
        for index in range(max(len(blocks), -(-len(uses) // entries))):
            block = blocks[index] if index < len(blocks) else 0
            used = uses[index * entries : (index + 1) * entries]
            if not block and not any(used):
                continue
            used.frombytes(bytes((entries - len(used)) * REFCOUNT_BYTES))
            found = array("H", self._read(size, block, "a refcount block") if block else bytes(size))
            if sys.byteorder == "little":
                found.byteswap()
            if found == used:
                continue
            for at, count in enumerate(found):
                if count != used[at]:
                    where = (index * entries + at) * size
                    raise self._bad(f"the cluster at byte {where} has {used[at]} users and a refcount of {count}")

    # Reading

    def _read_clusters(self, length: int, offset: int, what: str) -> bytes:
        self._check_range(offset, length, what)
        return self._read(length, offset, what)

    def _offset(self, entry: int, offset: int, what: str) -> int:
        """``offset``, which is what is left of ``entry`` without its flags, if there can be a cluster.

        :raises ImageError: it has reserved bits, is not aligned or not within the file.
        """
        if not offset or offset & ~OFFSET_MASK:
            raise self._bad(f"{what} is {entry:#x}, which has reserved bits set or no offset")
        self._check_range(offset, self.cluster_size, what)
        return offset

    def _check_range(self, offset: int, length: int, what: str) -> None:
        size = 1 << self._header.cluster_bits
        if not offset or offset % size:
            raise self._bad(f"{what} points to byte {offset}, which is not where a cluster of {size} bytes begins")
        # The file may end within its last cluster: what is missing there are zeroes.
        if offset + length > up(self._file_size, size):
            raise self._bad(f"{what} points to byte {offset}, and the file has {self._file_size}")

    def _read(self, length: int, offset: int, what: str) -> bytes:
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as error:
            raise ImageError(f"cannot read image {self.path}: {error.strerror}") from error
        return data if len(data) == length else self._read_on(data, length, offset, what)

    def _read_on(self, data: bytes, length: int, offset: int, what: str) -> bytes:
        while len(data) < length:
            try:
                more = os.pread(self._fd, length - len(data), offset + len(data))
            except OSError as error:
                raise ImageError(f"cannot read image {self.path}: {error.strerror}") from error
            if not more:
                if offset + len(data) < self._file_size:
                    raise self._bad(f"it was cut short while {what} was read")
                break
            data += more
        return data.ljust(length, b"\0")

    def _read_backing(self, length: int, offset: int) -> bytes:
        if self._backing_pread is None:
            raise UsageError(f"image {self.path} needs its backing file {self.backing_file} to be read")
        inside = max(0, min(length, self._backing_size - offset))
        return (self._backing_pread(inside, offset) if inside else b"").ljust(length, b"\0")

    def _bad(self, what: str) -> ImageError:
        return ImageError(f"image {self.path} is damaged or not for cowkit: {what}")
