"""Who the base of a difference is, so that another one is not taken for it.

The identity is the base's size and the SHA-256 of some blocks of it, at positions that follow from the size alone: the first
and the last block, blocks that lie ever more densely towards both ends (partition tables, superblocks and logs are there),
and blocks spread evenly in between. That costs at most 64 reads of 4 KiB, however large the base is. What it cannot tell apart
are two bases that differ only elsewhere: for that there is the SHA-256 of all the bytes, which has to read them.

An earlier state of a disk differs from the base, and from other states, just where it was written to, which may be nowhere near
those blocks. So of a state there are as many blocks more, from what was written before and after it; their positions are recorded.

A qcow2 image counts sectors, so what is 130,000 bytes as a raw file is 130,048 to whoever reads the image. Sizes are therefore
compared in sectors, and what lies behind a base's end reads as zeroes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from cowkit.diff.qcow2.layout import SECTOR, image_size
from cowkit.disk.extent import Extent

Hash = Literal["sampled", "full"]
"""What of the base an identity is made of: some blocks, or all of it as well."""

BLOCK = 4096
MOST_WRITTEN = 64
"""Blocks that are sampled of what was written before a state and after it, together."""
_NEAR_ENDS = 16
_SPREAD = 31
_PIECE = 1 << 20


class Reader(Protocol):
    """What an identity is taken of: a base, or a chain of images."""

    @property
    def size(self) -> int:
        """In bytes."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on, all of it within ``size``."""


class Written(NamedTuple):
    """Blocks of an earlier state of a disk that were written before it, or after it."""

    at: tuple[int, ...]
    """Their offsets in order, multiples of :data:`BLOCK`; at most :data:`MOST_WRITTEN`."""
    digest: str
    """Their SHA-256 in hexadecimal, one after another, with zeroes up to a whole sector at the end."""


class BaseIdentity(NamedTuple):
    """A base's identity: its size in bytes, and digests in hexadecimal."""

    size: int
    sampled: str
    """SHA-256 of the blocks at :func:`positions`, one after another, with zeroes up to a whole sector at the base's end."""
    full: str | None = None
    """SHA-256 of all ``size`` bytes, as ``sha256sum`` prints it; None where it was not asked for."""
    increment: bool = False
    """Whether this is an earlier state of the disk, and so what is stood on one more difference, and not the base."""
    written: Written | None = None
    """Of an earlier state: what tells it from other states; None where nothing was written, or it was not recorded."""

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
        if (
            sampled
            and self.written is not None
            and blocks_digest(reader, self.size, self.written.at) != self.written.digest
        ):
            return "blocks that were written before it was made, or after, differ"
        if full and full_digest(reader, self.size, progress) != self.full:
            return "the digest of all its bytes differs"
        return None


Progress = Callable[[int, int], None]
"""Called now and then with the bytes that are dealt with and those there are."""


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
    return blocks_digest(reader, size, positions(size))


def blocks_digest(reader: Reader, size: int, offsets: Sequence[int]) -> str:
    """The SHA-256 of the blocks at ``offsets``, for a base that counts as having ``size`` bytes."""
    digest = hashlib.sha256()
    buffer = bytearray(BLOCK)
    for offset in offsets:
        length = min(BLOCK, image_size(size) - offset)
        digest.update(_read(reader, memoryview(buffer)[:length], offset))
    return digest.hexdigest()


def spread(extents: Sequence[Extent], most: int) -> list[int]:
    """The offsets of up to ``most`` blocks, spread over ``extents``: of many extents, of some the first one; of few, of each more."""
    if not extents or most < 1:
        return []
    if len(extents) >= most:
        starts = [extents[len(extents) * number // most].offset for number in range(most)]
        return sorted({start // BLOCK * BLOCK for start in starts})
    each = most // len(extents)
    found: set[int] = set()
    for extent in extents:
        first, last = extent.offset // BLOCK, (extent.end - 1) // BLOCK
        found.update((first + (last - first) * number // max(1, each - 1)) * BLOCK for number in range(each))
    return sorted(found)


def shared(parts: Sequence[Sequence[Extent]], most: int) -> list[int]:
    """The offsets of up to ``most`` blocks in order, of each part as many as there is room for: what one leaves, others have."""
    found: set[int] = set()
    left = sorted((part for part in parts if part), key=lambda part: len(spread(part, most)))
    while left and len(found) < most:
        found.update(spread(left[0], max(1, (most - len(found)) // len(left))))
        del left[0]
    return sorted(found)


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
