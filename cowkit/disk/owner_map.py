"""The owner map: for each block of a disk, who holds its bytes.

An owner is one byte: ``BASE``, ``ZERO`` or the number of a layer. The map is cut into chunks of 8,192 blocks::

    chunks   [ B B Z p s B ... ]      B, Z: one shared constant for "all base", "all zero": costs no memory
                    | |               p: a bytearray of this map's own, changed in place
                    | shared          s: a bytearray that a frozen copy holds too: copied before it is changed

So a disk of any size that nobody touched costs eight bytes for each chunk, freezing the map copies only the list of
chunks, and runs of equal owners are found at C speed (``count``, ``re``, ``translate`` over a chunk).

Invariants: a ``bytes`` chunk is uniform; a chunk is changed in place only while its index is in ``_private``. Two
threads may set different blocks at once, also of one chunk; whoever sets a whole chunk, or freezes or restores the map,
must be the only one at work there (overlay.py sees to both).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from functools import lru_cache

BASE = 0
ZERO = 1
FIRST_LAYER = 2
LAST_LAYER = 254
NO_LAYER = 255
"""Stands for "there is no such layer" where a number is compared with owners: no block ever has it."""

CHUNK_SHIFT = 13
CHUNK_BLOCKS = 1 << CHUNK_SHIFT
CHUNK_MASK = CHUNK_BLOCKS - 1

Chunk = bytes | bytearray
Run = tuple[int, int, int]
"""``(first, last, owner)``: the blocks ``first`` up to, not including, ``last``."""

_DATA = FIRST_LAYER
_KINDS = bytes(min(owner, _DATA) for owner in range(256))
_CHANGED = bytes([0] + [255] * 255)


@lru_cache(maxsize=64)
def _uniform(owner: int, blocks: int) -> bytes:
    return bytes((owner,)) * blocks


@lru_cache(maxsize=256)
def _run_of(owner: int) -> re.Pattern[bytes]:
    return re.compile(re.escape(bytes((owner,))) + b"*")


def _chunk_runs(chunk: Chunk, start: int, stop: int) -> Iterator[Run]:
    while start < stop:
        owner = chunk[start]
        if type(chunk) is bytes:
            end = stop
        else:
            match = _run_of(owner).match(chunk, start, stop)
            assert match is not None  # the pattern matches the empty string too
            # Another thread may have changed the block between the look and the match: then say one block.
            end = max(match.end(), start + 1)
        yield start, end, owner
        start = end


def _marked_runs(kinds: Chunk, start: int, stop: int) -> Iterator[Run]:
    """The runs of ZERO and of _DATA among zeroes; ``find`` skips those twenty times faster than a pattern does."""
    zero, data = kinds.find(ZERO, start, stop), kinds.find(_DATA, start, stop)
    while zero >= 0 or data >= 0:
        if data < 0 or 0 <= zero < data:
            match = _run_of(ZERO).match(kinds, zero, stop)
            assert match is not None
            yield zero, match.end(), ZERO
            zero = kinds.find(ZERO, match.end(), stop)
        else:
            end = data + 1
            if end < stop and kinds[end] == _DATA:  # blocks alone, the most of them, do without a pattern
                match = _run_of(_DATA).match(kinds, data, stop)
                assert match is not None
                end = match.end()
            yield data, end, _DATA
            data = kinds.find(_DATA, end, stop)


def _joined(runs: Iterator[Run]) -> Iterator[Run]:
    previous: Run | None = None
    for run in runs:
        if previous is None:
            previous = run
        elif previous[2] == run[2] and previous[1] == run[0]:
            previous = (previous[0], run[1], run[2])
        else:
            yield previous
            previous = run
    if previous is not None:
        yield previous


class FrozenMap:
    """An owner map that nobody changes any more."""

    __slots__ = ("blocks", "chunks")

    def __init__(self, blocks: int, chunks: list[Chunk]) -> None:
        self.blocks = blocks
        self.chunks = chunks

    def owner(self, block: int) -> int:
        """The owner of one block."""
        return self.chunks[block >> CHUNK_SHIFT][block & CHUNK_MASK]

    def runs(self, first: int, last: int) -> Iterator[Run]:
        """The longest runs of equal owners that cover the blocks ``first`` up to ``last``."""
        return _joined(self._pieces(first, last))

    def _pieces(self, first: int, last: int) -> Iterator[Run]:
        while first < last:
            index = first >> CHUNK_SHIFT
            origin = index << CHUNK_SHIFT
            stop = min(last - origin, CHUNK_BLOCKS)
            for start, end, owner in _chunk_runs(self.chunks[index], first - origin, stop):
                yield origin + start, origin + end, owner
            first = origin + stop

    def dirty_runs(
        self, first: int = 0, last: int | None = None, since: FrozenMap | None = None, *, one_layer: bool = False
    ) -> Iterator[Run]:
        """The longest runs of blocks that are zeroed (said as ``ZERO``) or held by any layer (said as ``FIRST_LAYER``).

        :param since: only what has another owner than in this earlier copy of the map.
        :param one_layer: of a map that nobody changes: no layer but ``FIRST_LAYER`` holds any block. To see to that for each block
            takes four fifths of the time.
        """
        return _joined(self._dirty_pieces(first, self.blocks if last is None else last, since, one_layer))

    def _dirty_pieces(self, first: int, last: int, since: FrozenMap | None, one_layer: bool) -> Iterator[Run]:
        for index in range(first >> CHUNK_SHIFT, (last + CHUNK_MASK) >> CHUNK_SHIFT):
            chunk = self.chunks[index]
            if chunk[0] == BASE and type(chunk) is bytes:
                continue
            origin = index << CHUNK_SHIFT
            kinds = chunk if one_layer else chunk.translate(_KINDS)
            if since is not None:
                earlier = since.chunks[index]
                if earlier is chunk:
                    continue
                kinds = _where_changed(kinds, chunk, earlier)
            start, stop = max(first - origin, 0), min(last - origin, len(chunk))
            for run_start, run_stop, kind in _marked_runs(kinds, start, stop):
                yield origin + run_start, origin + run_stop, kind

    def dirty_blocks(self) -> int:
        """How many blocks are zeroed or held by a layer."""
        clean = 0
        for chunk in self.chunks:
            if type(chunk) is bytes:
                clean += len(chunk) if chunk[0] == BASE else 0
            else:
                clean += chunk.count(BASE)
        return self.blocks - clean

    def blocks_of(self, owner: int) -> int:
        """How many blocks ``owner`` holds."""
        return sum(chunk.count(owner) for chunk in self.chunks)


def _where_changed(kinds: Chunk, now: Chunk, earlier: Chunk) -> bytes:
    """``kinds`` with 0 wherever ``now`` and ``earlier`` are equal; big integers do it at C speed."""
    differs = (int.from_bytes(now, "little") ^ int.from_bytes(earlier, "little")).to_bytes(len(now), "little")
    mask = int.from_bytes(differs.translate(_CHANGED), "little")
    return (int.from_bytes(kinds, "little") & mask).to_bytes(len(now), "little")


class OwnerMap(FrozenMap):
    """The owner map of a disk in use."""

    __slots__ = ("_lock", "_private")

    def __init__(self, blocks: int) -> None:
        chunks: list[Chunk] = [_uniform(BASE, CHUNK_BLOCKS)] * (blocks >> CHUNK_SHIFT)
        if blocks & CHUNK_MASK:
            chunks.append(_uniform(BASE, blocks & CHUNK_MASK))
        super().__init__(blocks, chunks)
        self._private: set[int] = set()
        self._lock = threading.Lock()

    def set(self, first: int, last: int, owner: int) -> None:
        """Give the blocks ``first`` up to ``last`` to ``owner``."""
        index = first >> CHUNK_SHIFT
        if (last - 1) >> CHUNK_SHIFT == index:
            start = first & CHUNK_MASK
            self._set_in_chunk(index, start, start + last - first, owner)
            return
        if first & CHUNK_MASK:
            self._set_in_chunk(index, first & CHUNK_MASK, CHUNK_BLOCKS, owner)
            index += 1
        whole = last >> CHUNK_SHIFT
        with self._lock:
            self._private.difference_update([i for i in self._private if index <= i < whole])
            self.chunks[index:whole] = [_uniform(owner, CHUNK_BLOCKS)] * (whole - index)
        if last & CHUNK_MASK:
            self._set_in_chunk(whole, 0, last & CHUNK_MASK, owner)

    def _set_in_chunk(self, index: int, start: int, stop: int, owner: int) -> None:
        chunk = self.chunks[index]
        if stop - start == len(chunk):
            with self._lock:  # no longer private first: an interrupt in between costs a copy and nothing else
                self._private.discard(index)
                self.chunks[index] = _uniform(owner, stop)
            return
        if index not in self._private:
            if type(chunk) is bytes and chunk[0] == owner:
                return
            with self._lock:
                if index not in self._private:
                    self.chunks[index] = bytearray(chunk)
                    self._private.add(index)
        own = self.chunks[index]
        assert type(own) is bytearray
        if stop - start == 1:
            own[start] = owner
        else:
            own[start:stop] = _uniform(owner, stop - start) if stop - start <= 64 else bytes((owner,)) * (stop - start)

    def freeze(self) -> FrozenMap:
        """A copy as of now. Costs eight bytes a chunk; chunks are copied when they are next changed."""
        self._private.clear()
        return FrozenMap(self.blocks, self.chunks.copy())

    def restore(self, frozen: FrozenMap) -> None:
        """Be as ``frozen`` is, which stays as it is."""
        self._private.clear()
        self.chunks = frozen.chunks.copy()
