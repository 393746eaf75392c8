"""Finding room for what is about to be written to a file, where that makes the writing quicker.

A file system that finds blocks when it writes a page back (ext4, XFS) reserves room for each page as it is copied. With room found
for all of a large piece at once (fallocate(2)), 62 MiB take ext4 18 ms instead of 26.

Of pieces that follow one another, room for what is likely to come is found with them: 256 KiB then take ext4 58 microseconds instead of 70
(and 83 without room; Linux 6.18). That is room which others lack if nothing comes, so it is never more than the stream has had until
then, nor than 4 MiB, only where plenty is left, and no more once 4 MiB in all were for nothing.
"""

from __future__ import annotations

import errno
import os
import time

from cowkit.disk.files import on_tmpfs

_EMULATED = 5e-4, 1 / (4 << 30)
"""Seconds, and more for each byte, from which on nothing is saved: the C library may be writing a byte to each block (NFS, ZFS)."""
_MOST_AHEAD = 4 << 20
"""Bytes; 2 MiB gain next to nothing less, and 16 MiB nothing more."""
_PLENTY = 1 << 30
"""Bytes that have to be free on the file system for room to be found ahead."""


class Room:
    """Finds room in one file, as long as that pays; never fails, since the write tells better what is wrong."""

    def __init__(self) -> None:
        self._pays: bool | None = None
        self._looks_ahead = True
        self._after = -1
        """Where the last piece ended."""
        self._until = -1
        """Where the room ends that was found with it and before it."""
        self._for_nothing = 0
        """Bytes that were found ahead of pieces which did not come."""
        self._found_ahead = False
        self._ahead = 0
        """How much of that was for pieces to come."""

    def find(self, fd: int, offset: int, length: int, *, limit: int = 0) -> None:
        """Have the file system find blocks for a range of the file, which becomes longer if it ends before.

        The range is nobody else's to write to meanwhile.

        :param limit: up to where room may be found for later pieces as well; others may be writing there. 0: for none.
        """
        if self._pays is False:
            return
        end = offset + length
        before, self._after = self._after, end
        follows = offset == before
        if follows and end <= self._until:
            return
        if not follows and self._until > before:
            self._for_nothing += self._until - before
            if self._for_nothing >= _MOST_AHEAD:
                self._looks_ahead = False
        self._until = end
        if self._pays is None:
            self._try(fd, offset, length)
            return
        self._ahead = min(2 * self._ahead or length, _MOST_AHEAD) if follows and self._looks_ahead else 0
        until = min(end + self._ahead, limit)
        if until > end and _has_plenty(fd):
            self._found_ahead = True  # or some of it
            if _find(fd, offset, until - offset):
                self._until = until
                return
            self._looks_ahead = False
        self._pays = _find(fd, offset, length)

    def give_up(self) -> bool:
        """Find no more room ahead; whether any was, which the file may hold for nothing."""
        found, self._found_ahead, self._looks_ahead = self._found_ahead, False, False
        self._until = self._after
        return found

    def _try(self, fd: int, offset: int, length: int) -> None:
        """For the first time: later ones may have to wait for a write."""
        if on_tmpfs(fd):  # whose pages are the room, and would be looked for twice
            self._pays = False
            return
        begun = time.perf_counter()
        self._pays = _find(fd, offset, length) and time.perf_counter() - begun < _EMULATED[0] + length * _EMULATED[1]
        self._looks_ahead = self._pays and _is_hole(fd, offset, length)


def _find(fd: int, offset: int, length: int) -> bool:
    try:
        os.posix_fallocate(fd, offset, length)
    except OSError:
        return False
    return True


def _is_hole(fd: int, offset: int, length: int) -> bool:
    """Whether nothing was written there, to find the room: else what somebody writes there meanwhile might be lost."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) >= offset + length
    except OSError as error:
        return error.errno == errno.ENXIO  # no data from there on


def _has_plenty(fd: int) -> bool:
    try:
        space = os.fstatvfs(fd)
    except OSError:
        return False
    return space.f_bavail * space.f_frsize >= _PLENTY
