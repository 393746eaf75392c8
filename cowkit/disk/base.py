"""The base: the read-only source of a disk's data.

A base is opened read-only and never written. Who it is (device, inode, size, time of last change) is taken down at
opening and compared later, so that it never changes unnoticed.
"""

from __future__ import annotations

import os
import stat
from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from cowkit.disk.counted import Counted
from cowkit.disk.extent import Extent, Kind
from cowkit.disk.files import (
    NO_DISK,
    ShortReadError,
    data_and_holes,
    is_made_up,
    map_for_reading,
    on_tmpfs,
    pread_whole,
)
from cowkit.disk.sizes import parse_size
from cowkit.disk.source import ZeroSource
from cowkit.errors import BaseChangedError, BaseError, BaseOpenError, UsageError


def _meant_as_size(given: str) -> str:
    try:
        parse_size(given)
    except UsageError:
        return ""
    return f"; for a blank disk of that size, leave the base out and give the size (size={given!r}, --size {given})"


def _absolute(given: str) -> str:
    """``given`` from the root on. ``..`` behind a symbolic link is not where it seems: then it stays as it is written.

    :raises BaseOpenError: it is relative, and the working directory is gone.
    """
    try:
        plain = os.path.abspath(given)
        whole = os.path.join(os.getcwd(), given)
    except OSError as error:
        raise BaseOpenError(f"cannot open base {given}: the working directory is gone ({error.strerror})") from error
    try:
        return plain if os.path.samefile(plain, given) else whole
    except (OSError, ValueError):
        return whole if os.path.exists(given) else plain


class Identity(NamedTuple):
    """Who a base file is. For a block device ``device`` and ``inode`` name the device itself, and the time is not kept."""

    device: int
    inode: int
    size: int
    mtime_ns: int


class Base(Counted):
    """A read-only source of ``size`` bytes. The disk holds it, and so does each view of the disk."""

    size: int
    path: str | None = None
    """The absolute path of a file or device, symbolic links kept; None where there is none."""
    given: str | None = None
    """The path as it was given."""
    identity: Identity | None = None
    sparse: bool = False
    """Whether it may have holes, so that asking :meth:`extents` about a long range pays."""
    backing_format: str = "raw"
    """The format, as QEMU names it, that a difference records for its backing file."""
    backing_refusal: str | None = None
    """Why a difference cannot name :attr:`given` as its backing file, and what to do instead; None where it can."""
    scattered_reads_are_slow: bool = False
    """Whether reading a few blocks here and there may take as long as reading all of it."""

    @property
    @abstractmethod
    def view(self) -> memoryview | None:
        """See :class:`cowkit.disk.source.Source`."""

    @abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on, all of it within ``size``.

        :raises BaseError: it cannot be read.
        """

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on, all of them within ``size``.

        :raises BaseError: it cannot be read.
        """
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    @abstractmethod
    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Where the range has data (``DATA``) and where nothing is allocated (``HOLE``), in order, without gaps."""

    def will_need(self, offset: int, length: int) -> None:
        """A hint that the range is soon read."""

    def interrupt(self) -> None:
        """The disk is about to be closed: have reads that wait for somebody else end now, with an error. From any thread."""

    @abstractmethod
    def verify(self) -> None:
        """Look whether the base is still what it was when it was opened.

        :raises BaseChangedError: it is not.
        """

    def verify_path(self) -> None:
        """Look whether the path that a difference would record still leads to this base, as it was.

        :raises BaseChangedError: it does not.
        """
        self.verify()


class ZeroBase(Base):
    """Nothing: ``size`` bytes of zeroes."""

    sparse = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    @property
    def view(self) -> None:
        """None: there is no file behind it."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with zeroes."""
        ZeroSource().read_into(buffer, offset)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """One hole."""
        if length:
            yield Extent(offset, length, Kind.HOLE)

    def verify(self) -> None:
        """Nothing can change."""

    def _close(self) -> None:
        """Nothing is open."""


class FileBase(Base):
    """A raw image: a regular file, or a block device.

    :raises BaseOpenError: it is missing, unreadable, or neither a regular file nor a block device.
    """

    _fd = -1
    _view: memoryview | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.given: str = os.fspath(path)
        if not self.given:
            raise BaseOpenError("the path of the base is empty: give a file or a block device")
        self.path: str = _absolute(self.given)
        try:
            # Look before opening: opening a pipe waits for a writer, opening a device may do something.
            kind = stat.S_IFMT(os.stat(self.given).st_mode)
            if kind in NO_DISK:
                raise BaseOpenError(f"base {self.given} is {NO_DISK[kind]}: give a raw image file or a block device")
            fd = os.open(self.given, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise BaseOpenError(
                f"cannot open base {self.given}: {error.strerror}{_meant_as_size(self.given)}"
            ) from error
        except OSError as error:
            raise BaseOpenError(f"cannot open base {self.given}: {error.strerror}") from error
        except ValueError as error:
            raise BaseOpenError(f"cannot open base {self.given!r}: {error}") from error
        try:
            self.identity = self._identify(fd)
            status = os.fstat(fd)
            if is_made_up(fd, status):
                raise BaseOpenError(
                    f"base {self.given} is no file on a disk but something that the kernel tells (proc, sysfs): give a raw image "
                    "file or a block device"
                )
            self.sparse = stat.S_ISREG(status.st_mode) and status.st_blocks * 512 < status.st_size
        except OSError as error:
            os.close(fd)
            raise BaseOpenError(f"cannot open base {self.given}: {error.strerror}") from error
        except BaseOpenError:
            os.close(fd)
            raise
        self._fd = fd
        self.size = self.identity.size
        self._view: memoryview | None = None

    def fileno(self) -> int:
        """The descriptor that the file is open on, for what reads formats; it is the base's, who closes it."""
        return self._fd

    @staticmethod
    def _identify(fd: int) -> Identity:
        status = os.fstat(fd)
        if stat.S_ISBLK(status.st_mode):
            return Identity(-1, status.st_rdev, os.lseek(fd, 0, os.SEEK_END), 0)
        return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    @property
    def view(self) -> memoryview | None:
        """A mapping for system calls to read; see :class:`cowkit.disk.source.Source`."""
        if self._view is None and self.size:
            # A tmpfs fills the holes of a file that is read through a mapping with memory, and fails where it has none.
            if not (self.sparse and on_tmpfs(self._fd)):
                self._view = map_for_reading(self._fd, self.size)
        return self._view

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on.

        :raises BaseChangedError: the file has become shorter than that.
        :raises BaseError: the system fails to read it.
        """
        try:
            pread_whole(self._fd, buffer, offset)
        except ShortReadError as error:
            raise BaseChangedError(f"base {self.given} was cut short while it was in use: {error.strerror}") from error
        except OSError as error:
            raise BaseError(f"cannot read base {self.given} at byte {offset}: {error.strerror}") from error

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The file's data and holes, as the file system tells them.

        :raises BaseChangedError: the file has become shorter: what is missing must not be taken for a hole.
        """
        if self.sparse and os.fstat(self._fd).st_size < self.size:
            raise BaseChangedError(f"base {self.given} was cut short while it was in use")
        return data_and_holes(self._fd, offset, offset + length)

    def will_need(self, offset: int, length: int) -> None:
        """Have the range read ahead into the page cache."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def verify(self) -> None:
        """Compare size and time of last change with what they were at opening, and the file at the path with this one.

        :raises BaseChangedError: the file was written to, cut or extended while it was in use.
        """
        assert self.identity is not None
        now = self._identify(self._fd)
        if now == self.identity:
            return
        if now.size != self.identity.size:
            what = f"its size went from {self.identity.size} to {now.size} bytes"
        else:
            what = "it was written to, or its time of last change was set"
        raise BaseChangedError(
            f"base {self.given} changed while it was in use ({what}): what was read from it is not to be trusted; "
            "keep bases read-only (chmod a-w) and run again"
        )

    def verify_path(self) -> None:
        """Look whether the path still leads to this very file, as :meth:`verify` does for the file itself.

        :raises BaseChangedError: it leads to another file, or nowhere.
        """
        self.verify()
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError as error:
            raise BaseChangedError(f"base {self.given} is not there any more: {error.strerror}") from error
        if not same:
            raise BaseChangedError(
                f"base {self.given} was replaced by another file while it was in use: put the old one back"
            )

    def _close(self) -> None:
        self._view = None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        # For what an interrupt or a fork kept from being released.
        self._close()
