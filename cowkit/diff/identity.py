"""Who the base of a difference is, so that another one is not taken for it.

The identity is the base's size and the SHA-256 of some blocks of it, at positions that follow from the size alone: the first
and the last block, blocks that lie ever more densely towards both ends (partition tables, superblocks and logs are there),
and blocks spread evenly in between. That costs at most 64 reads of 4 KiB, however large the base is. What it cannot tell apart
are two bases that differ only elsewhere: for that there is the SHA-256 of all the bytes, which has to read them.

A qcow2 image counts sectors, so what is 130,000 bytes as a raw file is 130,048 to whoever reads the image. Sizes are therefore
compared in sectors, and what lies behind a base's end reads as zeroes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

from cowkit.diff.qcow2.layout import SECTOR, image_size
from cowkit.disk.sizes import LARGEST_DISK
from cowkit.errors import ImageError

Hash = Literal["sampled", "full"]
"""What of the base an identity is made of: some blocks, or all of it as well."""

VERSION = 1
BLOCK = 4096
_NEAR_ENDS = 16
_SPREAD = 31
_PIECE = 1 << 20
_LONGEST = 1024
_HEX = re.compile("[0-9a-f]{64}")


class Reader(Protocol):
    """What an identity is taken of: a base, or a chain of images."""

    @property
    def size(self) -> int:
        """In bytes."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on, all of it within ``size``."""


class BaseIdentity(NamedTuple):
    """A base's identity: its size in bytes, and digests in hexadecimal."""

    size: int
    sampled: str
    """SHA-256 of the blocks at :func:`positions`, one after another, with zeroes up to a whole sector at the base's end."""
    full: str | None = None
    """SHA-256 of all ``size`` bytes, as ``sha256sum`` prints it; None where it was not asked for."""
    increment: bool = False
    """Whether this is an earlier state of the disk, and so what is stood on one more difference, and not the base."""

    def to_bytes(self) -> bytes:
        """The same as it lies in an image: JSON with a version."""
        said: dict[str, object] = {"v": VERSION, "size": self.size, "sampled": self.sampled}
        if self.full is not None:
            said["full"] = self.full
        if self.increment:
            said["increment"] = True
        return json.dumps(said, separators=(",", ":")).encode("ascii")

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> BaseIdentity:
        """What :meth:`to_bytes` gave.

        :param where: the image, for messages.
        :raises ImageError: it is something else, or of a later version.
        """
        try:
            said = json.loads(raw) if len(raw) <= _LONGEST else None
        except (ValueError, RecursionError):
            said = None
        if isinstance(said, dict) and isinstance(said.get("v"), int) and said["v"] > VERSION:
            raise ImageError(f"image {where} has its base's identity in version {said['v']}: a later cowkit reads it")
        if isinstance(said, dict) and said.get("v") == VERSION:
            size, sampled, full = (said.get(name) for name in ("size", "sampled", "full"))
            known = isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= LARGEST_DISK
            if known and _is_digest(sampled) and (full is None or _is_digest(full)):
                increment = said.get("increment") is True
                return cls(int(str(size)), str(sampled), None if full is None else str(full), increment)
        raise ImageError(f"image {where} is damaged: its base's identity cannot be read")

    def differs_from(
        self, reader: Reader, *, full: bool = False, sampled: bool = True, progress: Progress | None = None
    ) -> str | None:
        """Why ``reader`` is not the base that this is the identity of, in words; None where it is.

        :param full: compare all bytes; the identity has a digest of them.
        :param sampled: compare the sampled blocks: what differs there is known soon, unless ``reader`` is slow at that.
        """
        if image_size(reader.size) != image_size(self.size):
            return f"its size is {reader.size} bytes, not {self.size}"
        if sampled and sampled_digest(reader, self.size) != self.sampled:
            return "blocks that were sampled differ"
        if full and full_digest(reader, self.size, progress) != self.full:
            return "the digest of all its bytes differs"
        return None


Progress = Callable[[int, int], None]
"""Called now and then with the bytes that are dealt with and those there are."""


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None


def identify(reader: Reader, *, full: bool = False, progress: Progress | None = None) -> BaseIdentity:
    """The identity of ``reader``.

    :param full: with the digest of all bytes, which takes as long as it takes to read them.
    :raises BaseError: it cannot be read.
    """
    digest = full_digest(reader, reader.size, progress) if full else None
    return BaseIdentity(reader.size, sampled_digest(reader, reader.size), digest)


def positions(size: int) -> list[int]:
    """The offsets of the blocks that are sampled of ``size`` bytes, in order: at most 64, all of them for a small base."""
    blocks = -(-image_size(size) // BLOCK)
    if blocks == 0:
        return []
    near = [(1 << n) - 1 for n in range(_NEAR_ENDS)]
    wanted = {
        *near,
        *(blocks - 1 - each for each in near),
        *(blocks * n // (_SPREAD + 1) for n in range(1, _SPREAD + 1)),
    }
    return [block * BLOCK for block in sorted(wanted) if 0 <= block < blocks]


def sampled_bytes(size: int) -> int:
    """How much of a base of ``size`` bytes is read for :func:`sampled_digest`."""
    return sum(max(0, min(BLOCK, size - offset)) for offset in positions(size))


def sampled_digest(reader: Reader, size: int) -> str:
    """The SHA-256 of the sampled blocks, for a base that counts as having ``size`` bytes."""
    digest = hashlib.sha256()
    buffer = bytearray(BLOCK)
    for offset in positions(size):
        length = min(BLOCK, image_size(size) - offset)
        digest.update(_read(reader, memoryview(buffer)[:length], offset))
    return digest.hexdigest()


def full_digest(reader: Reader, size: int, progress: Progress | None = None) -> str:
    """The SHA-256 of the first ``size`` bytes, of which up to a sector's rest may be missing."""
    digest = hashlib.sha256()
    buffer = bytearray(min(_PIECE, max(size, SECTOR)))
    for offset in range(0, size, _PIECE):
        length = min(_PIECE, size - offset)
        digest.update(_read(reader, memoryview(buffer)[:length], offset))
        if progress is not None:
            progress(offset + length, size)
    return digest.hexdigest()


def _read(reader: Reader, piece: memoryview, offset: int) -> memoryview:
    inside = max(0, min(len(piece), reader.size - offset))
    if inside:
        reader.read_into(piece[:inside], offset)
    piece[inside:] = bytes(len(piece) - inside)
    return piece
