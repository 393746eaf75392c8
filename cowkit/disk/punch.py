"""Giving back the space of a part of a file: fallocate(2), which Python's ``os`` does not have."""

from __future__ import annotations

import ctypes

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE
_PUNCH_HOLE = 2  # FALLOC_FL_PUNCH_HOLE

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Turn a range of a file into a hole that reads as zeroes; False where the file system cannot."""
    return int(_fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)) == 0
