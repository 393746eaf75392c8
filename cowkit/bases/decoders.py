"""The compressions: each a decoder with a size, places from which it can start, and reads.

Each is a thin coat over a library of its own, imported when such a base is opened. A decoder is used by one thread at a time.
"""

from __future__ import annotations

import bisect
import importlib
import io
import os
import zlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

from cowkit.errors import MissingToolError, with_pip

_STEP = 1 << 20
_READ_AHEAD = 256 << 10
_OPEN_BLOCKS = 2
"""How many xz blocks are kept half decoded: each holds a dictionary, 64 MiB with ``xz -9``."""


class Decoder(Protocol):
    """A compressed file, seen from the decompressed side. Offsets and lengths are those of the decompressed bytes.

    What its methods raise is the library's own; :class:`cowkit.bases.compressed.CompressedBase` makes one line of it.
    """

    size: int
    starts: Sequence[int]
    """Where decoding can start, in order, beginning with 0: the first byte of each block or frame."""

    def read(self, length: int, offset: int) -> bytes:
        """From 1 to ``length`` bytes from ``offset`` on. Cheap where it goes on from the end of the last read."""

    def close(self) -> None:
        """Close what it opened."""


def open_decoder(format: str, fd: int, given: str) -> Decoder:
    """The decoder of ``format`` for the file that ``fd`` has open; it keeps a descriptor of its own.

    :raises MissingToolError: the library that it needs is not installed.
    """
    return _DECODERS[format](fd, given)


def _library(module: str, package: str, given: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingToolError(
            package, purpose=f"opening the compressed base {given}", remedy=with_pip(package)
        ) from error


class _Whole(io.FileIO):
    """A file that fails at its end: python-xz asks for as much as the index says, and would ask a file that was cut for ever."""

    def read(self, size: int | None = -1, /) -> bytes:
        """At least one byte, unless none is wanted."""
        data = super().read(-1 if size is None else size)
        if size and not data:
            raise EOFError("it ends too soon")
        return data or b""


class XzDecoder:
    """An ``.xz`` file, by python-xz: its index, at the end of the file, says where its blocks are."""

    def __init__(self, fd: int, given: str) -> None:
        xz: Any = _library("xz", "python-xz", given)
        strategy: Any = _library("xz.strategy", "python-xz", given)
        self._raw = _Whole(os.dup(fd))
        try:
            self._file = xz.XZFile(self._raw, "r", block_read_strategy=strategy.RollingBlockReadStrategy(_OPEN_BLOCKS))
        except BaseException:
            self._raw.close()
            raise
        self.size: int = len(self._file)
        self.starts: Sequence[int] = self._file.block_boundaries or [0]

    def read(self, length: int, offset: int) -> bytes:
        """See :class:`Decoder`."""
        self._file.seek(offset)
        data: bytes = self._file.read(min(length, _STEP))
        return data

    def close(self) -> None:
        """See :class:`Decoder`."""
        self._file.close()
        self._raw.close()


class _Indexed:
    """A format that says neither its size nor where decoding can start: a library goes through all of it once and notes that."""

    def __init__(self, raw: Any, file: Any) -> None:
        self._raw = raw
        self._file = file
        # indexed-gzip finds no end of nothing.
        self.size: int = file.seek(0, os.SEEK_END) if file.read(1) else 0
        self.starts: Sequence[int] = range(0, max(self.size, 1), _STEP)

    def read(self, length: int, offset: int) -> bytes:
        """See :class:`Decoder`."""
        self._file.seek(offset)
        data: bytes = self._file.read(min(length, _STEP))
        return data

    def close(self) -> None:
        """See :class:`Decoder`."""
        self._file.close()
        self._raw.close()


def _gzip(fd: int, given: str) -> Decoder:
    library: Any = _library("indexed_gzip", "indexed-gzip", given)
    raw = io.FileIO(os.dup(fd))
    file = None
    try:
        file = library.IndexedGzipFile(fileobj=raw, readbuf_size=_READ_AHEAD, spacing=_STEP)
        file.build_full_index()
        decoder = _Indexed(raw, file)
        _check_whole_gzip(raw.fileno(), decoder.size)
    except BaseException:
        if file is not None:
            file.close()
        raw.close()
        raise
    return decoder


def _check_whole_gzip(fd: int, size: int) -> None:
    """Raise EOFError where the file was cut short: indexed-gzip takes a cut for the end.

    A file of one member ends with its size (RFC 1952, section 2.3.1, ISIZE). Others are gone through once more.
    """
    length = os.fstat(fd).st_size
    if size and os.pread(fd, 4, length - 4) == (size & 0xFFFFFFFF).to_bytes(4, "little"):
        return
    member = zlib.decompressobj(wbits=31)
    place = 0
    while data := os.pread(fd, _READ_AHEAD, place):
        place += len(data)
        while data:
            if member.eof:
                data = data.lstrip(b"\0")  # between and behind members there may be zeroes
                if not data:
                    break
                member = zlib.decompressobj(wbits=31)
            member.decompress(data)
            data = member.unused_data
    if not member.eof:
        raise EOFError("it ends in the middle")


def _bzip2(fd: int, given: str) -> Decoder:
    library: Any = _library("indexed_bzip2", "indexed-bzip2", given)
    raw = io.FileIO(os.dup(fd))
    file = None
    try:
        file = library.open(raw, parallelization=1)
        return _Indexed(raw, file)
    except BaseException:
        if file is not None:
            file.close()
        raw.close()
        raise


class ZstdDecoder:
    """A ``.zst`` file, by Python's compression.zstd (its backport before 3.14). Decoding can start at each of its frames.

    Frames are found by going through the headers of their blocks (RFC 8878, section 3.1.1). Only a frame that does not say
    its size is decoded for it.
    """

    def __init__(self, fd: int, given: str) -> None:
        try:
            self._zstd: Any = importlib.import_module("compression.zstd")
        except ImportError:
            self._zstd = _library("backports.zstd", "backports.zstd", given)
        self._fd = os.dup(fd)
        self._decoder: Any = None
        self._position = -1
        self._input = 0
        starts: list[int] = []
        self.starts: Sequence[int] = starts
        self._frames: list[int] = []
        self.size = 0
        try:
            self._find_frames(os.fstat(self._fd).st_size, starts)
        except BaseException:
            self.close()
            raise
        if not starts:
            starts.append(0)

    def _find_frames(self, length: int, starts: list[int]) -> None:
        place = 0
        while place < length:
            head = os.pread(self._fd, 18, place)
            if len(head) >= 8 and head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:  # skippable (3.1.2)
                place += 8 + int.from_bytes(head[4:8], "little")
                continue
            size = self._zstd.get_frame_info(head).decompressed_size
            following = self._end_of_frame(head, place)
            if following > length:
                break
            if size is None:
                size = self._measure(place)
            if size:
                starts.append(self.size)
                self._frames.append(place)
                self.size += size
            place = following
        if place != length:
            raise EOFError(f"it ends at byte {length}, in the middle of a frame")

    def _end_of_frame(self, head: bytes, place: int) -> int:
        descriptor = head[4]
        single_segment = descriptor >> 5 & 1
        place += 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3] + (single_segment, 2, 4, 8)[descriptor >> 6]
        while True:
            block = os.pread(self._fd, 3, place)
            if len(block) < 3:
                raise EOFError("it ends in the middle of a frame")
            header = int.from_bytes(block, "little")
            place += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)  # a run-length block holds one byte
            if header & 1:
                return place + 4 * (descriptor >> 2 & 1)

    def _measure(self, place: int) -> int:
        self._start(place)
        size = 0
        while not self._decoder.eof:
            size += len(self._more(_STEP))
        self._position = -1
        return size

    def _start(self, place: int) -> None:
        self._decoder = self._zstd.ZstdDecompressor()
        self._input = place

    def _more(self, length: int) -> bytes:
        """Up to ``length`` bytes; none when the frame ends or more input is wanted."""
        data = b""
        if self._decoder.needs_input:
            data = os.pread(self._fd, _READ_AHEAD, self._input)
            if not data:
                raise EOFError("it ends in the middle of a frame")
            self._input += len(data)
        found: bytes = self._decoder.decompress(data, length)
        return found

    def read(self, length: int, offset: int) -> bytes:
        """See :class:`Decoder`."""
        frame = bisect.bisect_right(self.starts, offset) - 1
        end = self.starts[frame + 1] if frame + 1 < len(self.starts) else self.size
        start = self.starts[frame]
        if not start <= self._position <= offset:
            self._start(self._frames[frame])
            self._position = start
        length = min(length, _STEP, end - offset)
        parts = []
        # When the frame's last byte is out, decode on to its end, where the checksum is.
        while self._position < offset + length or (offset + length == end and not self._decoder.eof):
            if self._decoder.eof:
                raise EOFError("a frame is shorter than it says")
            data = self._more(min(_STEP, max(offset + length - self._position, 1)))
            parts.append(data[max(0, offset - self._position) :])
            self._position += len(data)
        if self._position > end:
            raise EOFError("a frame is longer than it says")
        if self._decoder.eof:
            self._position = -1
        return b"".join(parts)

    def close(self) -> None:
        """See :class:`Decoder`."""
        self._decoder = None
        os.close(self._fd)


_DECODERS: dict[str, Callable[[int, str], Decoder]] = {"xz": XzDecoder, "gz": _gzip, "bz2": _bzip2, "zst": ZstdDecoder}
