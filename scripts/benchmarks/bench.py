"""What all experiments of a run share: the folder, the image in the page cache, and how long to measure."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from types import TracebackType

from scripts.benchmarks.interrupts import held
from scripts.benchmarks.model import BenchError

MIB = 1 << 20
GIB = 1 << 30
_PIECE = 16 * MIB
_SOCKETS = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
"""Wherever the image is: the path of a socket has at most 107 bytes. In memory, as /run/user is: ext4 looks at each of the thousands of
files that the last rounds deleted before it makes another one, which made some disks take five times as long as the others."""
_ODD = 4099  # bytes by which each piece is turned against the one before: no two aligned blocks are the same


@dataclass(frozen=True)
class Room:
    """What one server or probe has for itself; ``with`` it, and it goes at the end."""

    folder: str
    """On the image's file system."""
    sockets: str

    def __enter__(self) -> Room:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with held():
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self.sockets, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """What keeps a program's files in here, and cowkit's disks from being seen outside."""
        return {"TMPDIR": self.folder, "COWKIT_RUNTIME_DIR": os.path.join(self.sockets, "run")}


class Bench:
    """A run: ``with Bench(directory) as bench``. Its folder goes at the end with all that is in it.

    :param directory: where the image and all overlays are; they share its file system.
    :param seconds: the length of one measurement.
    :param quick: less of everything that has no length in seconds.
    :raises BenchError: the folder cannot be made.
    """

    def __init__(self, directory: str, *, seconds: float, quick: bool = False) -> None:
        self.seconds = seconds
        self.quick = quick
        try:
            self.folder = tempfile.mkdtemp(prefix="cowkit-bench-", dir=os.path.abspath(directory))
        except OSError as error:
            raise BenchError(f"no folder can be made in {directory}: {error.strerror}; choose another, --dir") from None
        try:
            self._sockets = tempfile.mkdtemp(prefix="cowkit-bench-", dir=_SOCKETS)
        except OSError as error:
            os.rmdir(self.folder)
            raise BenchError(f"no folder for sockets can be made in {_SOCKETS}: {error.strerror}") from None
        self._number = 0

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with held():
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self._sockets, ignore_errors=True)

    def new_room(self) -> Room:
        """A new one, empty."""
        self._number += 1
        room = Room(*(os.path.join(parent, str(self._number)) for parent in (self.folder, self._sockets)))
        os.mkdir(room.folder)
        os.mkdir(room.sockets, 0o700)
        return room

    @property
    def area(self) -> int:
        """How much of the image clients use, in bytes."""
        return GIB // 2 if self.quick else GIB

    def image(self, size: int | None = None) -> str:
        """The path of the image: at least ``size`` bytes of random data, in the page cache and on the disk.

        :raises BenchError: there is no room.
        """
        size = self.area if size is None else size
        path = os.path.join(self.folder, "disk.img")
        try:
            with open(path, "ab") as file:
                if file.tell() < size:
                    _fill(file.fileno(), file.tell(), size)
        except OSError as error:
            raise BenchError(f"the image cannot be made in {self.folder}: {error.strerror}") from None
        return path


def _fill(descriptor: int, begin: int, end: int) -> None:
    random = os.urandom(_PIECE)
    for offset in range(begin, end, _PIECE):
        turn = offset // _PIECE * _ODD % _PIECE
        piece = memoryview(random[turn:] + random[:turn])[: end - offset]
        while piece:
            piece = piece[os.write(descriptor, piece) :]
    os.fsync(descriptor)  # or what is still being written holds up whoever is measured first
