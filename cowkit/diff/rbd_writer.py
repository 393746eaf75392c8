"""Writes a difference as Ceph's `rbd export-diff` does and `rbd import-diff` reads: format 1 of doc/dev/rbd-diff.rst.

A header line, what is known of the images ("Metadata records"), then what is to be written and zeroed ("Data Records"), and an
end. Numbers are little-endian.
"""

from __future__ import annotations

import struct

from cowkit.diff.batch import Batch
from cowkit.diff.image_output import ImageOutput
from cowkit.disk.extent import Kind
from cowkit.errors import UsageError

_HEADER = b"rbd diff v1\n"
_NAME = struct.Struct("<cI")
_SIZE = struct.Struct("<cQ")
_RANGE = struct.Struct("<cQQ")
_END = b"e"


class RbdWriter:
    """A difference for an image of ``size`` bytes, written to ``output``; :meth:`finish` completes it.

    :param since: the snapshot that it is on top of; `rbd import-diff` wants the image to have it. None: the image's beginning.
    :param at: the snapshot that it leads to, which `rbd import-diff` makes.
    :raises UsageError: a name is too long for the format.
    """

    def __init__(self, output: ImageOutput, size: int, *, since: str | None = None, at: str | None = None) -> None:
        self._output = output
        self._size = size
        self._end = 0
        head = _HEADER + _snapshot(b"f", since) + _snapshot(b"t", at)
        self._append(head + _SIZE.pack(b"s", size))

    def add(self, batch: Batch) -> None:
        """Write the runs of ``batch``, cut at the end of the disk."""
        for (offset, length, kind), content in batch.pieces():
            inside = min(length, self._size - offset)
            if kind is Kind.ZERO:
                self._append(_RANGE.pack(b"z", offset, inside))
                continue
            self._append(_RANGE.pack(b"w", offset, inside))
            self._output.pwrite_meanwhile(content[:inside], self._end)
            self._end += inside

    def finish(self) -> None:
        """Write the end."""
        self._append(_END)
        self._output.truncate(self._end)

    def _append(self, data: bytes) -> None:
        self._output.pwrite(data, self._end)
        self._end += len(data)


def _snapshot(tag: bytes, name: str | None) -> bytes:
    if name is None:
        return b""
    raw = name.encode("utf-8", "surrogateescape")
    if "@" in name or "/" in name:
        raise UsageError(f"checkpoint {name!r} cannot be a snapshot's name in Ceph, which has no '@' or '/' in it")
    return _NAME.pack(tag, len(raw)) + raw
