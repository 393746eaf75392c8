"""What a base and a layer do with their files: whole reads and writes, mappings, and where the holes are."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from cowkit.disk.extent import Extent, Kind
from cowkit.errors import UsageError

NO_DISK = {
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a character device",
}
"""What is neither a regular file nor a block device, by its kind (``stat.S_IFMT``): opening it may wait, or do something."""


class ShortReadError(OSError):
    """The file ended before the read did."""


def path_text(path: str | os.PathLike[str], what: str) -> str:
    """``path`` as a string.

    :param what: what it is the path of, for the error message.
    :raises UsageError: it is no path.
    """
    try:
        return os.fsdecode(path)
    except TypeError as error:
        raise UsageError(f"{what} is a path, not {path!r}") from error


def is_same_file(path: str, other: str | None) -> bool:
    """Whether both name one file that is there."""
    try:
        return other is not None and os.path.samefile(path, other)
    except (OSError, ValueError):  # no file's name has a NUL
        return False


_MOST_LINKS = 40
"""As many in a row as Linux follows."""


def pread_whole(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer`` from ``offset`` on.

    :raises ShortReadError: the file is shorter than that.
    """
    while buffer:
        count = os.preadv(fd, [buffer], offset)
        if count == 0:
            raise ShortReadError(errno.EIO, f"the file ends at byte {offset}, {len(buffer)} bytes too soon")
        buffer = buffer[count:]
        offset += count


def pwrite_whole(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``."""
    while True:
        count = os.pwrite(fd, data, offset)
        if count == len(data):
            return
        data = data[count:]
        offset += count


def map_for_reading(fd: int, size: int) -> memoryview | None:
    """A mapping of the file for system calls to read from; None where it cannot be had (then read instead)."""
    try:
        return memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
    except (OSError, ValueError, OverflowError):
        return None


def data_and_holes(fd: int, offset: int, end: int) -> Iterator[Extent]:
    """The file's data and holes between ``offset`` and ``end``, in order, as the file system tells them (lseek(2)).

    A file system that cannot tell, or a block device, has data all over.
    """
    while offset < end:
        try:
            data = min(os.lseek(fd, offset, os.SEEK_DATA), end)
        except OSError as error:
            # ENXIO: no data from here to the end of the file.
            data = end if error.errno == errno.ENXIO else offset
            if error.errno != errno.ENXIO:
                yield Extent(offset, end - offset, Kind.DATA)
                return
        if data > offset:
            yield Extent(offset, data - offset, Kind.HOLE)
        if data == end:
            return
        hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        yield Extent(data, hole - data, Kind.DATA)
        offset = hole


def is_made_up(fd: int, status: os.stat_result) -> bool:
    """Whether the file is one of ``/proc`` or ``/sys``: made up by the kernel while it is read, of no length or a false one."""
    if not stat.S_ISREG(status.st_mode) or status.st_blocks:
        return False
    for root in ("/proc", "/sys"):
        with suppress(OSError):
            # Where nothing is mounted there, it is a folder of the file system that all else is on.
            if os.stat(root).st_dev == status.st_dev and _type_of_file_system(fd) in ("proc", "sysfs"):
                return True
    return False


def on_tmpfs(fd: int) -> bool:
    """Whether the file lies on a tmpfs."""
    return _type_of_file_system(fd) == "tmpfs"


def _type_of_file_system(fd: int) -> str | None:
    """What the file lies on, if no block device is below (proc(5): fields 3 and, behind the dash, 1 of ``mountinfo``).

    None where one is, which the device's number tells at once, and where it is not to be found.
    """
    device = os.fstat(fd).st_dev
    if os.major(device):
        return None
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                before, _, behind = line.partition(" - ")
                if before.split(" ", 3)[2] == wanted:
                    return behind.split(" ", 1)[0]
    except OSError:
        pass
    return None


def names_descriptor(path: str) -> bool:
    """Whether ``path`` leads to an open file of whichever process follows it: ``/dev/stdout``, ``/dev/fd/1``, ``/proc/self/fd/1``."""
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
        if folder.startswith("/proc/") and folder.endswith("/fd"):
            return True
        if not os.path.islink(path):
            return False
        path = os.path.join(folder, os.readlink(path))
    return False
