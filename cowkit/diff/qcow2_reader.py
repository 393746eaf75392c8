"""Reads qcow2 version 3 images, strictly: whatever a field or an entry says is checked before it is believed.

It reads what cowkit writes and what QEMU writes without special features: no compression, encryption, internal snapshots,
external data files or extended L2 entries. Those are refused by name, as is every incompatible feature that is
not known ("Header", incompatible_features). Sections are those of QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

from cowkit.diff.qcow2_layout import (
    COMPRESSED,
    COPIED,
    ENTRY,
    EXTENSION,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_END,
    HEADER,
    INCOMPATIBLE_FEATURES,
    LARGEST_L1_TABLE,
    LARGEST_REFCOUNT_TABLE,
    LONGEST_BACKING_NAME,
    MAGIC,
    OFFSET_MASK,
    READS_AS_ZERO,
    REFCOUNT_BYTES,
    REFCOUNT_ORDER,
    VERSION,
    Geometry,
    Header,
    up,
)
from cowkit.disk.extent import Extent, Kind, merged
from cowkit.errors import ImageError, UsageError

Pread = Callable[[int, int], bytes]
"""``pread(length, offset)``, as bases and disks have it."""

_CACHED_TABLES = 64
_MOST_CLUSTER_BITS = 21
_LEAST_CLUSTER_BITS = 9
_RAW_EXTERNAL_DATA = 2  # of autoclear_features ("Header", bit 1)
_LONGEST_CHAIN = 200
_LONGEST_FORMAT_NAME = 15  # to QEMU


class _Head(NamedTuple):
    header: Header
    backing_file: str | None
    backing_format: str | None


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
        self._fd = _open(self.path)
        try:
            self._file_size = os.lseek(self._fd, 0, os.SEEK_END)
            head = _read_head(self.path, self._fd)
            self._header = head.header
            self.backing_file = head.backing_file
            """The name of the backing file as it is recorded; None without one."""
            self.backing_format = head.backing_format
            """The backing file's format as it is recorded, such as ``"raw"``; None where it is not."""
            self._check_header()
            self._shape = Geometry(head.header.size, 1 << head.header.cluster_bits)
            self._l1 = self._read_l1()
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        return self._shape.size

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
        for run, host in self._runs(offset, offset + length):
            if run.kind is Kind.DATA:
                parts.append(self._read(run.length, host, "data"))
            elif run.kind is Kind.ZERO or self.backing_file is None:
                parts.append(bytes(run.length))
            else:
                parts.append(self._read_backing(run.length, run.offset))
        return b"".join(parts)

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """What the image itself holds: ``DATA``, ``ZERO``, or ``HOLE`` where the backing file shows through.

        :raises ImageError: the image is damaged there.
        """
        end = self.size if length is None else min(offset + length, self.size)
        return merged(run for run, _ in self._runs(offset, end))

    def check(self) -> None:
        """Check that each cluster of the file has one user and a refcount of one, or none and zero, and is marked so.

        :raises ImageError: it is not so.
        """
        size = self.cluster_size
        if self._header.refcount_order != REFCOUNT_ORDER:
            raise self._bad(f"it has refcounts of {1 << self._header.refcount_order} bits, and cowkit checks 16")
        uses = bytearray(-(-self._file_size // size))

        def use(offset: int, what: str, count: int = 1) -> None:
            for cluster in range(offset // size, offset // size + count):
                if uses[cluster]:
                    raise self._bad(f"the cluster at byte {cluster * size} is used twice, again as {what}")
                uses[cluster] = 1

        use(0, "the header")
        if self._l1:
            use(self._header.l1_table_offset, "the L1 table", -(-len(self._l1) * ENTRY.size // size))
        use(self._header.refcount_table_offset, "the refcount table", self._header.refcount_table_clusters)
        for index, entry in enumerate(self._l1):
            if not entry:
                continue
            use(self._marked(entry, f"L1 entry {index}"), "an L2 table")
            for at, each in enumerate(self._table(index)):
                if each & OFFSET_MASK:
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
        need = Geometry(header.size, 1 << header.cluster_bits).l1_entries
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
            table = struct.unpack(f">{self._shape.l2_entries}Q", raw)
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
        """Check a standard cluster descriptor ("Cluster mapping")."""
        if entry & COMPRESSED:
            raise self._bad(f"{what} is a compressed cluster, which cowkit does not read")
        if not entry & OFFSET_MASK:
            raise self._bad(f"{what} is {entry:#x}: it marks a cluster that it does not have")
        self._offset(entry, entry & ~(COPIED | READS_AS_ZERO), what)

    def _runs(self, offset: int, end: int) -> Iterator[tuple[Extent, int]]:
        """The range as runs of one kind, with where in the file the data of each is."""
        size = self.cluster_size
        while offset < end:
            table, index = divmod(offset // size, self._shape.l2_entries)
            if not self._l1[table]:
                stop = min(end, (table + 1) * self._shape.l2_reach)
                yield Extent(offset, stop - offset, Kind.HOLE), 0
                offset = stop
                continue
            entry = self._table(table)[index]
            stop = min(end, (offset // size + 1) * size)
            run = Extent(offset, stop - offset, Kind.DATA)
            if entry & READS_AS_ZERO:
                yield run._replace(kind=Kind.ZERO), 0
            elif entry:
                yield run, (entry & OFFSET_MASK) + offset % size
            else:
                yield run._replace(kind=Kind.HOLE), 0
            offset = stop

    # Refcounts

    def _marked(self, entry: int, what: str) -> int:
        if not entry & COPIED:
            raise self._bad(f"{what} does not say that its cluster has one user")
        return entry & OFFSET_MASK

    def _check_refcounts(self, blocks: list[int], uses: bytearray) -> None:
        size, entries = self.cluster_size, self._shape.refcounts
        for index in range(max(len(blocks), -(-len(uses) // entries))):
            block = blocks[index] if index < len(blocks) else 0
            used = bytes(uses[index * entries : (index + 1) * entries])
            if not block and not any(used):
                continue
            expected = used.ljust(entries, b"\0")
            found = self._read(size, block, "a refcount block") if block else bytes(size)
            if found[1::REFCOUNT_BYTES] == expected and not found[0::REFCOUNT_BYTES].strip(b"\0"):
                continue
            for at, (count,) in enumerate(struct.iter_unpack(">H", found)):
                if count != expected[at]:
                    where = (index * entries + at) * size
                    raise self._bad(f"the cluster at byte {where} has {expected[at]} users and a refcount of {count}")

    # Reading

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
            fd = _open(path)
            try:
                name = _read_head(path, fd).backing_file
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


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"cannot open image {path}: {error.strerror}") from error
    except ValueError as error:  # a null byte in the path
        raise ImageError(f"cannot open image {path!r}: {error}") from error


def _read_head(path: str, fd: int) -> _Head:
    """The header, the backing file's name and its format ("Header", "Header extensions")."""

    def bad(what: str) -> ImageError:
        return ImageError(f"image {path} is damaged or not for cowkit: {what}")

    try:
        raw = os.pread(fd, 1 << _MOST_CLUSTER_BITS, 0)
    except OSError as error:
        raise ImageError(f"cannot read image {path}: {error.strerror}") from error
    if raw[: len(MAGIC)] != MAGIC:
        raise ImageError(f"{path} is no qcow2 image: it does not begin with 'QFI' and 0xfb")
    if len(raw) < HEADER.size:
        raise bad(f"it ends within its header, after {len(raw)} bytes")
    header = Header._make(HEADER.unpack_from(raw))
    if header.version != VERSION:
        raise bad(f"it has version {header.version}, and cowkit reads version {VERSION}")
    for bit in range(64):
        if header.incompatible_features >> bit & 1:
            feature = INCOMPATIBLE_FEATURES[bit] if bit < len(INCOMPATIBLE_FEATURES) else "unknown"
            raise bad(f"it has the incompatible feature {bit} ({feature})")
    if header.autoclear_features & _RAW_EXTERNAL_DATA:
        raise bad("it says that an external data file is raw, and has none")
    if not _LEAST_CLUSTER_BITS <= header.cluster_bits <= _MOST_CLUSTER_BITS:
        raise bad(f"it has clusters of 2**{header.cluster_bits} bytes")
    if header.crypt_method:
        raise bad(f"it is encrypted (method {header.crypt_method})")
    if header.nb_snapshots or header.snapshots_offset:
        raise bad(f"it has {header.nb_snapshots} internal snapshots, at byte {header.snapshots_offset}")
    if header.refcount_order > 6:
        raise bad(f"it has refcounts of 2**{header.refcount_order} bits")
    cluster = raw[: 1 << header.cluster_bits]
    if header.header_length < HEADER.size or header.header_length % 8 or header.header_length > len(cluster):
        raise bad(f"its header has {header.header_length} bytes")
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
    return _Head(header, name, _backing_format(cluster[:end], header.header_length, bad))


def _backing_format(area: bytes, at: int, bad: Callable[[str], ImageError]) -> str | None:
    """The backing file's format, from the extensions, which are in ``area`` from ``at`` on."""
    found: str | None = None
    while at + EXTENSION.size <= len(area):
        kind, length = EXTENSION.unpack_from(area, at)
        at += EXTENSION.size
        if at + length > len(area):
            raise bad(f"header extension {kind:#x} has {length} bytes, more than there are")
        if kind == EXTENSION_END:
            break
        if kind == EXTENSION_BACKING_FORMAT:
            if length > _LONGEST_FORMAT_NAME:
                raise bad(f"the name of its backing file's format has {length} bytes")
            found = area[at : at + length].decode("ascii", "backslashreplace")
        at = up(at + length, 8)
    return found
