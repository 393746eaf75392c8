"""Golden bases: what was prepared once, as a compressed difference that many disks stand on.

A golden base is a qcow2 difference that cowkit made, ``NAME.golden.qcow2``, with a record beside it, ``NAME.golden.json``.
The record tells it from a file that merely has such a name: that one is opened as any other image. Each process opens a
golden base once, however many disks stand on it, by cowkit's own reader: so a disk of it costs what a disk of a raw file
does. What was read of it lies unpacked in a file without a name until the last disk is closed.

Whoever has it open holds a shared flock(2) on the file, so that who tidies up knows that it is in use.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from typing import NamedTuple

from cowkit.bases import open_base
from cowkit.bases.opening import is_uri
from cowkit.diff.qcow2.header import backing_chain
from cowkit.diff.qcow2.reader import Qcow2Image
from cowkit.disk.base import Base, FileBase, Identity
from cowkit.disk.extent import Extent, Kind, merged
from cowkit.disk.layer import Layer
from cowkit.disk.owner_map import BASE, FIRST_LAYER, ZERO, OwnerMap
from cowkit.disk.source import PaddedSource, Source, ZeroSource
from cowkit.errors import BaseChangedError, BaseError, BaseOpenError, DiskError, ImageError

SUFFIX = ".golden.qcow2"
WHAT = "golden base of cowkit"
FORMAT = 1

_PACKED = FIRST_LAYER
_UNPACKED = FIRST_LAYER + 1


class Record(NamedTuple):
    """What is known of a golden base, besides its content."""

    name: str
    key: str
    """The digest of all that it was made from."""
    size: int
    """The disk's size in bytes; the image's is rounded up to sectors."""
    file_size: int
    mtime_ns: int
    sha256: str
    stands_on: list[tuple[str, Identity]]
    """The files that were there before, from the base down, as they were."""
    built_in: str
    """The run that made it."""
    verified_in: str
    """The last run that compared the digest."""


def record_path(path: str) -> str:
    """Where the record of the golden base at ``path`` is."""
    return f"{path.removesuffix(SUFFIX)}.golden.json"


def written(record: Record) -> str:
    """The record as text."""
    return json.dumps({"what": WHAT, "format": FORMAT, **record._asdict()}, indent=1)


def read_record(path: str) -> Record | None:
    """The record of the golden base at ``path``; None where there is none to make sense of."""
    try:
        with open(record_path(path), encoding="utf-8") as file:
            found = json.load(file)
        if found.pop("what") != WHAT or found.pop("format") != FORMAT:
            return None
        found["stands_on"] = [(name, Identity(*identity)) for name, identity in found["stands_on"]]
        return Record(**found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def identities(path: str) -> list[tuple[str, Identity]]:
    """The file at ``path`` and, of a qcow2 image, those it stands on, as they are now.

    A golden base counts by its path, size and time of change, without device and inode: no two have a path, and one that was
    removed under a run is put back as another file.

    :raises BaseOpenError: one is missing, or can be no base.
    """
    found = []
    for each in [path, *backing_chain(path)]:
        file = FileBase(each)
        try:
            assert file.identity is not None
            golden = file.path.endswith(SUFFIX) and read_record(file.path) is not None
            who = file.identity._replace(device=-1, inode=-1) if golden else file.identity
            found.append((file.path, who))
        finally:
            file.release()
    return found


def open_golden(path: str, tmpdir: str) -> Base | None:
    """The golden base at ``path``, which may be open already; None where it is none.

    :param tmpdir: where to unpack it.
    :raises BaseOpenError: it is damaged, or cannot be opened.
    :raises BaseChangedError: what it stands on is not what it was.
    """
    path = os.path.abspath(path)
    with _here.lock:
        found = _here.open.get(path)
        if found is not None and found.is_at_its_path() and found.hold_unless_closed():
            return found
        record = read_record(path)
        if record is None:
            return None
        _here.open[path] = opened = GoldenBase(path, record, tmpdir)
        return opened


class GoldenBase(Base):
    """The disk in the golden base at ``path``.

    Several disks share it, so closing one of them does not interrupt what others read.

    :raises BaseOpenError: it is damaged, or cannot be opened.
    :raises BaseChangedError: what it stands on is not what it was.
    """

    sparse = True
    backing_format = "qcow2"

    def __init__(self, path: str, record: Record, tmpdir: str) -> None:
        super().__init__()
        self.given: str = path
        self.path: str = path
        self.size = record.size
        self._record = record
        self._tmpdir = tmpdir
        self._layer: Layer | None = None
        self._unpacking = threading.Lock()
        self._file = FileBase(path)
        try:
            self.identity = self._checked(record)
            fcntl.flock(self._file.fileno(), fcntl.LOCK_SH)
            try:
                self._image = Qcow2Image(path)
                try:
                    self._shift = self._image.cluster_size.bit_length() - 1
                    self._map = self._mapped()
                    self._below = self._opened_below()
                except BaseException:
                    self._image.close()
                    raise
            except ImageError as error:
                raise BaseOpenError(f"golden base {path} is damaged: {error}; remove it, and run again") from error
        except BaseException:
            self._file.release()
            raise
        self._source: Source = PaddedSource(self._below, self._below.size) if self._below else ZeroSource()

    def _checked(self, record: Record) -> Identity:
        identity = self._file.identity
        assert identity is not None
        if (identity.size, identity.mtime_ns) != (record.file_size, record.mtime_ns):
            raise BaseOpenError(f"golden base {self.path} was written to since it was made: remove it, and run again")
        for path, then in record.stands_on:
            if identities(path)[0][1] != then:
                raise BaseChangedError(
                    f"base {path} changed since the golden base {record.name!r} was made on it: run the tests again, which "
                    "makes it anew"
                )
        return identity

    def _mapped(self) -> OwnerMap:
        found = OwnerMap(-(-self.size >> self._shift))
        for offset, length, kind in self._image.extents(0, self.size):
            if kind is not Kind.HOLE:
                owner = ZERO if kind is Kind.ZERO else _PACKED
                found.set(offset >> self._shift, -(-(offset + length) >> self._shift), owner)
        return found

    def _opened_below(self) -> Base | None:
        name = self._image.backing_file
        if name is None:
            return None
        below = open_golden(name, self._tmpdir) if name.endswith(SUFFIX) else None
        if below is not None:
            return below
        return open_base(name, format=None if is_uri(name) else self._image.backing_format, tmpdir=self._tmpdir)

    def is_at_its_path(self) -> bool:
        """Whether the path still leads to this very file."""
        try:
            now = os.stat(self.path)
        except OSError:
            return False
        return (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) == self.identity

    def _was_put_back(self) -> bool:
        now = read_record(self.path)
        if now is None or now.sha256 != self._record.sha256:
            return False
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (now.file_size, now.mtime_ns)

    @property
    def view(self) -> None:
        """None: its bytes lie in several files."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on.

        :raises BaseError: the image is damaged, or what it stands on cannot be read.
        """
        end = offset + len(buffer)
        for first, last, owner in self._map.runs(offset >> self._shift, -(-end >> self._shift)):
            start, stop = max(first << self._shift, offset), min(last << self._shift, end)
            part = buffer[start - offset : stop - offset]
            if owner == BASE:
                self._source.read_into(part, start)
            elif owner == ZERO:
                ZeroSource().read_into(part, start)
            else:
                self._unpack(part, start, first, last)

    def _unpack(self, buffer: memoryview, offset: int, first: int, last: int) -> None:
        end = offset + len(buffer)
        for cluster in range(first, last):
            at = cluster << self._shift
            start, stop = max(at, offset), min(at + (1 << self._shift), end)
            part = buffer[start - offset : stop - offset]
            if self._map.owner(cluster) == _PACKED:
                content = self._unpacked(cluster)
                if content is not None:
                    part[:] = memoryview(content)[start - at : stop - at]
                    continue
            assert self._layer is not None
            self._layer.read_into(part, start)

    def _unpacked(self, cluster: int) -> bytes | None:
        """The content of a cluster, which is put away for the next reader; None if that was done before."""
        at = cluster << self._shift
        with self._unpacking:
            if self._map.owner(cluster) == _UNPACKED:
                return None
            try:
                content = self._image.pread(min(1 << self._shift, self.size - at), at)
            except ImageError as error:
                raise BaseError(f"cannot read golden base {self.path}: {error}") from error
            try:
                if self._layer is None:
                    self._layer = Layer(self.size, self._tmpdir)
                self._layer.write([memoryview(content)], at)
                self._map.set(cluster, cluster + 1, _UNPACKED)
            except DiskError:
                pass  # a read does not fail for want of room: the next one unpacks again
            return content

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Data, and as holes what reads as zeroes for sure."""
        return merged(self._extents(offset, offset + length))

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        for first, last, owner in self._map.runs(offset >> self._shift, -(-end >> self._shift)):
            start, stop = max(first << self._shift, offset), min(last << self._shift, end)
            if owner in (_PACKED, _UNPACKED):
                yield Extent(start, stop - start, Kind.DATA)
                continue
            if owner == BASE and self._below is not None and start < self._below.size:
                inside = min(stop, self._below.size)
                yield from self._below.extents(start, inside - start)
                start = inside
            if start < stop:
                yield Extent(start, stop - start, Kind.HOLE)

    def verify(self) -> None:
        """See :meth:`cowkit.disk.base.FileBase.verify`: the image and what it stands on are compared."""
        self._file.verify()
        if self._below is not None:
            self._below.verify()

    def verify_path(self) -> None:
        """See :meth:`cowkit.disk.base.FileBase.verify_path`, for the image and what it stands on.

        A copy that was put back where the image had been removed will do.
        """
        self._file.verify()
        if not (self.is_at_its_path() or self._was_put_back()):
            self._file.verify_path()
        if self._below is not None:
            self._below.verify_path()

    def _close(self) -> None:
        with _here.lock:
            if _here.open.get(self.path) is self:
                del _here.open[self.path]
        self._image.close()
        if self._layer is not None:
            self._layer.release()
        if self._below is not None:
            self._below.release()
        self._file.release()


class _Here:
    """The golden bases that this process has open."""

    def __init__(self) -> None:
        self.open: dict[str, GoldenBase] = {}
        self.lock = threading.RLock()


_here = _Here()


def _after_fork_in_child() -> None:
    # What is open is the parent's: its locks may be taken by threads that the child does not have.
    _here.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_after_fork_in_child)
