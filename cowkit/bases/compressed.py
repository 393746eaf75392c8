"""A compressed raw disk as a base, with random access.

Design note. What was decoded once is kept in a sparse file without a name, at its own offset, so no part of the disk is
decoded twice, and memory holds no more than the library's state. A *chunk* is what can be decoded without what lies in front
of it: an xz block, a zstd frame, a mebibyte of a gzip or bzip2 file (for which the library keeps an index). Of each chunk
the first ``_done`` bytes are in the file; that number grows under the lock, after the bytes are there, so a read that
finds its range done needs no lock. A file that is one chunk (``xz disk.img`` without ``-T``, ``zstd disk.img``) is decoded
from its beginning up to what is asked for, and goes on from there: nothing of it is decoded twice either.

The file is a convenience. Where there is no room for it, or so little that the overlay may soon need it, reads are decoded
as they come: slowly, but they do not fail, and a disk without room for writes can still be read.
"""

from __future__ import annotations

import bisect
import os
import threading
from array import array
from collections.abc import Iterator

from cowkit.bases.decoders import Decoder, open_decoder
from cowkit.bases.formats import COMPRESSED
from cowkit.disk.base import Base, FileBase
from cowkit.disk.extent import Extent, Kind
from cowkit.disk.layer import Layer, default_directory
from cowkit.disk.source import ZEROES
from cowkit.errors import BaseError, BaseOpenError, MissingToolError, OverlayError, OverlayFullError

_WHOLE = 64 << 20
"""Chunks up to this size are decoded whole at once: one that is left half way keeps its decoder's memory, or starts again."""
_ROOM_TO_LEAVE = 256 << 20


class CompressedBase(Base):
    """The raw disk in ``file``, a file compressed with xz, gzip, zstd or bzip2. Several threads may read at once.

    What was decoded is kept in a sparse file without a name in ``tmpdir``, which can grow to the disk's data. gzip and bzip2
    do not say how large the disk is: opening them goes through the whole file once (about 1 s, 20 s for each GiB of disk). So does
    opening a zstd file that was compressed from a pipe. Of a file that is a single xz block or zstd frame, the first read far
    inside decodes all in front of it; ``xz -T0`` and ``zstd`` in several frames make files with places to start from.

    :param file: the compressed file; the base holds it and lets go of it when it is closed, if it could be opened.
    :param format: ``"xz"``, ``"gz"``, ``"zst"`` or ``"bz2"``.
    :param tmpdir: ``$TMPDIR`` or ``/var/tmp``, unless given.
    :raises BaseOpenError: the file is damaged, cut short, or not of that format.
    :raises MissingToolError: the library for it is not installed.
    """

    scattered_reads_are_slow = True

    def __init__(self, file: FileBase, format: str, tmpdir: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.given: str = file.given
        self.path: str = file.path
        self.identity = file.identity
        name = COMPRESSED[format]
        self._name = f"{'an' if name == 'xz' else 'a'} {name} file"
        self.backing_refusal = (
            f"base {file.given} is {self._name}, which cannot be a qcow2 backing file: decompress it and name the raw disk "
            f"(--backing {os.path.basename(os.path.splitext(file.given)[0])})"
        )
        self._directory = default_directory() if tmpdir is None else os.fspath(tmpdir)
        try:
            self._decoder: Decoder = open_decoder(format, file.fileno(), file.given)
        except (MissingToolError, MemoryError):
            raise
        except Exception as error:
            raise BaseOpenError(
                f"base {file.given} is not {self._name}, or damaged or cut short: {_reason(error)}"
            ) from error
        self._file = file
        self.size = self._decoder.size
        self._starts = self._decoder.starts
        self._done = array("Q", bytes(8 * len(self._starts)))
        self._lock = threading.Lock()
        self._cache: Layer | None = None

    @property
    def view(self) -> None:
        """None: most of the bytes are nowhere yet."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on, decoding what was not read before.

        :raises BaseError: the compressed data are damaged, or the file cannot be read.
        """
        while buffer:
            chunk = bisect.bisect_right(self._starts, offset) - 1
            part = buffer[: self._end(chunk) - offset]
            self._read_chunk(chunk, part, offset)
            offset += len(part)
            buffer = buffer[len(part) :]

    def _end(self, chunk: int) -> int:
        return self._starts[chunk + 1] if chunk + 1 < len(self._starts) else self.size

    def _read_chunk(self, chunk: int, buffer: memoryview, offset: int) -> None:
        start = self._starts[chunk]
        wanted = offset + len(buffer) - start
        if self._done[chunk] < wanted:
            with self._lock:
                if not self._decode(chunk, wanted):
                    self._decode_into(buffer, offset)
                    return
        assert self._cache is not None
        self._cache.read_into(buffer, offset)

    def _decode(self, chunk: int, wanted: int) -> bool:
        """Decode the first ``wanted`` bytes of a chunk, at least; False where there is no room to keep them."""
        start = self._starts[chunk]
        length = self._end(chunk) - start
        goal = length if length <= _WHOLE else wanted
        while self._done[chunk] < goal:
            if not self._has_room():
                return False
            place = start + self._done[chunk]
            data = self._decoded(goal - self._done[chunk], place)
            try:
                if data != ZEROES[: len(data)]:
                    self._layer().write([memoryview(data)], place)
            except (OverlayFullError, OverlayError):
                return False
            self._done[chunk] += len(data)
        return True

    def _has_room(self) -> bool:
        try:
            cache = self._layer()
            status = os.fstatvfs(cache.fd)
        except (OverlayError, OSError):
            return False
        # A fraction for small file systems (a tmpfs of 100 MiB is none to give up on), a limit for large ones.
        return status.f_bavail * status.f_frsize >= min(_ROOM_TO_LEAVE, status.f_blocks * status.f_frsize // 8)

    def _layer(self) -> Layer:
        if self._cache is None:
            self._cache = Layer(self.size, self._directory)
        return self._cache

    def _decode_into(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            data = self._decoded(len(buffer), offset)
            buffer[: len(data)] = data
            offset += len(data)
            buffer = buffer[len(data) :]

    def _decoded(self, length: int, offset: int) -> bytes:
        try:
            data = self._decoder.read(length, offset)
        except MemoryError:
            raise
        except Exception as error:
            self._file.verify()  # a file that changed meanwhile is the better explanation
            raise BaseError(
                f"cannot read base {self.given} at byte {offset}: {self._name} that is damaged: {_reason(error)}"
            ) from error
        if not data:
            self._file.verify()
            raise BaseError(
                f"cannot read base {self.given} at byte {offset}: {self._name} that is damaged: it ends there"
            )
        return data

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """All data: what is zero is known only after decoding."""
        if length:
            yield Extent(offset, length, Kind.DATA)

    def verify(self) -> None:
        """See :meth:`cowkit.disk.base.FileBase.verify`: the compressed file is compared."""
        self._file.verify()

    def verify_path(self) -> None:
        """See :meth:`cowkit.disk.base.FileBase.verify_path`."""
        self._file.verify_path()

    def _close(self) -> None:
        self._decoder.close()
        if self._cache is not None:
            self._cache.release()
        self._file.release()


def _reason(error: Exception) -> str:
    """What a library says, in one line without an end."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
