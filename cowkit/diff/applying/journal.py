r"""The journal of `cowkit apply --in-place`: all that is to be written to the base, on the disk before the base is touched.

::

    "cowkit apply journal 1\n"
    JSON and "\n"                   the file's name, its sizes before and after, and which difference it is
    offset, length, kind            a record; of data, with so many bytes behind it
    ...
    "end\n" and 32 bytes            the SHA-256 of all that is in front of them

It is written under another name, brought to the disk (fsync(2)) and renamed, so a file of the journal's name is a whole one:
the *commit*. Writing its records to the base is the same however often it is done, so who finds a journal does it again, from the
beginning, and removes it when the base is on the disk. The digest is compared before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO, NamedTuple

from cowkit.bases.unfinished import journal_of, unready_journal_of
from cowkit.disk.extent import Extent, Kind
from cowkit.errors import OutputError

_MAGIC = b"cowkit apply journal 1\n"
_RECORD = struct.Struct(">QQB")
_END = b"end\n"
_DIGEST = 32
_PIECE = 1 << 20
_KINDS = (Kind.DATA, Kind.ZERO)


class Facts(NamedTuple):
    """What a journal says of itself. Sizes are in bytes."""

    size_before: int
    size: int
    """Of the base when it is applied."""
    diff: str
    """The difference's absolute path."""
    diff_identity: list[int]
    """Its device, inode, size and time of last change."""
    written_bytes: int = 0
    zeroed_bytes: int = 0


def identity_of_file(path: str | os.PathLike[str]) -> list[int]:
    """Device, inode, size and time of last change in ns."""
    status = os.stat(path)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


class JournalWriter:
    """Writes the journal for the base at ``path``; :meth:`commit` makes it count. A context manager.

    :raises OutputError: it cannot be written: the base is as it was.
    """

    def __init__(self, path: str, facts: Facts) -> None:
        self._path = journal_of(path)
        self._new = unready_journal_of(path)
        self._digest = hashlib.sha256()
        try:
            # What a killed one left is written over: whoever comes here has the base's lock.
            self._file: BinaryIO | None = open(self._new, "wb", opener=_private)  # noqa: SIM115 - closed in __exit__
        except OSError as error:
            raise self._failed(error) from error
        self._put(_MAGIC + json.dumps(facts._asdict()).encode("ascii") + b"\n")

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                os.unlink(self._new)

    def add(self, extent: Extent, data: bytes = b"") -> None:
        """One record more."""
        self._put(_RECORD.pack(extent.offset, extent.length, _KINDS.index(extent.kind)))
        self._put(data)

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from error
        self._digest.update(data)

    def commit(self) -> None:
        """From here on the base is to be what the journal says, whatever happens."""
        assert self._file is not None
        try:
            self._file.write(_END + self._digest.digest())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.rename(self._new, self._path)
            try:
                sync_directory(self._path)
            except OSError:
                os.unlink(self._path)
                raise
        except OSError as error:
            raise self._failed(error) from error
        self._file = None

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write the journal {self._path}: {error.strerror}; the base is as it was, `--to` needs no journal"
        )


class Journal:
    """The journal for the base at ``path``, which is seen to be whole; a context manager.

    :raises OutputError: it is damaged, or cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = journal_of(path)
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 - closed in __exit__
        except OSError as error:
            raise OutputError(f"cannot read the journal {self.path}: {error.strerror}") from error
        try:
            self._end = self._check()
            self._file.seek(len(_MAGIC))
            self.facts = Facts(**json.loads(self._file.readline()))
            self._first = self._file.tell()
        except OSError as error:
            self._file.close()
            raise OutputError(f"cannot read the journal {self.path}: {error.strerror}") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _check(self) -> int:
        """Where the records end, after the digest was compared."""
        length = os.fstat(self._file.fileno()).st_size
        end = length - len(_END) - _DIGEST
        digest = hashlib.sha256()
        if end >= len(_MAGIC) and self._file.read(len(_MAGIC)) == _MAGIC:
            digest.update(_MAGIC)
            left = end - len(_MAGIC)
            while left > 0 and (data := self._file.read(min(_PIECE, left))):
                digest.update(data)
                left -= len(data)
            if not left and self._file.read() == _END + digest.digest():
                return end
        raise OutputError(
            f"the journal {self.path} is damaged, so the apply that it is of cannot be finished: the base beside it may be half "
            "written; put a good copy in its place and remove the journal"
        )

    def records(self) -> Iterator[tuple[Extent, bytes]]:
        """Each record with its data."""
        self._file.seek(self._first)
        while self._file.tell() < self._end:
            offset, length, kind = _RECORD.unpack(self._file.read(_RECORD.size))
            extent = Extent(offset, length, _KINDS[kind])
            yield extent, self._file.read(length) if extent.kind is Kind.DATA else b""

    def remove(self) -> None:
        """The base is what the journal says, and on the disk: the journal is not needed any more."""
        os.unlink(self.path)
        sync_directory(self.path)


def sync_directory(path: str) -> None:
    """Bring to the disk which files the directory of ``path`` has."""
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _private(path: str, flags: int) -> int:
    """Open it for this user alone: it has what is in the difference, and that may be nobody else's business."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
