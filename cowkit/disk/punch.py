"""Giving back the space of a part of a file: fallocate(2), which Python's ``os`` does not have."""

from __future__ import annotations

import ctypes
import os

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE
_PUNCH_HOLE = 2  # FALLOC_FL_PUNCH_HOLE

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Turn a range of a file into a hole that reads as zeroes; False where the file system cannot."""
    return int(_fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)) == 0


def can_punch(directory: str) -> bool:
    """Whether files in ``directory`` can have holes punched.

    :raises OSError: no file can be made there.
    """
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, 8192)
        return punch_hole(fd, 0, 4096)
    finally:
        os.close(fd)
