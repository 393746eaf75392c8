"""The overlay: the owner map with its layers, and the copy-on-write operations on it.

Design note. New data goes to the *top* layer, the only one that is ever written. All other layers are frozen: a
checkpoint or a view needs them as they are. A request runs inside a pass of the disk's gate (gate.py), so the top layer
and the set of layers do not change under it. Requests on different connections do run beside each other, by these rules:

* A write to blocks that the top layer owns goes straight to the file, without a lock.
* Whatever changes owners (the first write to a block, copying up, zeroing, trimming, caching) first claims the *stripes*
  of its blocks: locks that each stand for every 32nd region of 64 blocks. Owners are looked at again under the claim,
  and set only once the data lie in the file. So a copy-up never puts old bytes over those of a write that was
  acknowledged meanwhile, and a write that finds no space changes nothing.
* A zeroing or trim may punch a block that an unclaimed write is just writing to. The two are then in flight at the same
  time, and "first the write, then the trim" is an order in which they may be seen.
* A read takes no lock. It sees the owner from before a change or from after it; both hold bytes that were there during
  the read. A view handed out for a gathered send stays readable when the layer is dropped: it keeps the mapping.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from cowkit.disk.base import Base, ZeroBase
from cowkit.disk.checkpoint import allocation
from cowkit.disk.extent import Extent, Kind
from cowkit.disk.layer import Layer
from cowkit.disk.owner_map import BASE, CHUNK_MASK, CHUNK_SHIFT, FIRST_LAYER, LAST_LAYER, NO_LAYER, ZERO, OwnerMap, Run
from cowkit.disk.piped import Piped
from cowkit.disk.source import PaddedSource, Source, ZeroSource
from cowkit.errors import CheckpointError, DiskError, OverlayFullError

T = TypeVar("T")

MOST_LAYERS = LAST_LAYER + 1 - FIRST_LAYER

_LARGEST_SPARE = 256 << 20
_STRIPES = 32
_REGION_SHIFT = 6
_COPY_PIECE = 1 << 20

_WORTH_A_LOOK = 32768
"""Reads of a sparse base from this length on ask the file system for holes: about a microsecond, less than sending zeroes."""

Segment = tuple[int, int, memoryview | None]
"""``(start, stop, view)``; see :meth:`Overlay.segments`."""


class Overlay:
    """The overlay of a disk of ``size`` bytes on ``base``. Offsets are within the disk: the caller has checked."""

    def __init__(
        self, base: Base, size: int, block_size: int, directory: str, *, cow_on_read: bool, cow_on_cache: bool
    ) -> None:
        self.base = base
        self.size = size
        self.block_size = block_size
        self.shift = block_size.bit_length() - 1
        self.directory = directory
        self.cow_on_read = cow_on_read and not isinstance(base, ZeroBase)
        self.cow_on_cache = cow_on_cache and not isinstance(base, ZeroBase)
        self.map = OwnerMap(-(-size // block_size))
        self.top = NO_LAYER
        self.stack: list[int] = []
        """The numbers of the layers, from the oldest to the newest."""
        self.layers: dict[int, Layer] = {}
        below: Source = base if base.size >= size else PaddedSource(base, base.size)
        self.sources: list[Source | None] = [below, ZeroSource()] + [None] * 254
        """Who holds the bytes, by owner."""
        self.views: list[memoryview | None] = [None] * 256
        """The mappings that system calls may read, by owner, as far as they were needed so far."""
        self.look_from = _WORTH_A_LOOK if base.sparse else size + 1
        """Reads from this length on ask a sparse base for holes, in bytes."""
        self.failure: DiskError | None = None
        """Why the last request failed that found no room, or a broken overlay: NBD has but a number for its client."""
        self._stripes = [threading.Lock() for _ in range(_STRIPES)]
        self._growing = threading.Lock()
        self._spare: Layer | None = None
        self._recycled = False
        self._closed = False

    # Reading

    def segments(self, offset: int, end: int) -> Iterator[Segment]:
        """The range in pieces, in order: each with a view for a system call to read, or None where it reads as zeroes.

        Python must not look into a view: see :class:`cowkit.disk.source.Source`.

        :raises DiskError: a part that has to be read here cannot be read.
        :raises BaseError: likewise, of the base.
        """
        if self.cow_on_read:
            self._copy_on_read(offset, end - offset)
        for first, last, owner in self.map.runs(offset >> self.shift, ((end - 1) >> self.shift) + 1):
            start, stop = max(first << self.shift, offset), min(last << self.shift, end)
            if owner == ZERO:
                yield start, stop, None
            elif owner == BASE:
                yield from self._base_segments(start, stop)
            else:
                yield start, stop, self._seen(owner, start, stop)

    def _base_segments(self, start: int, stop: int) -> Iterator[Segment]:
        inside = max(start, min(stop, self.base.size))
        if inside - start >= self.look_from:
            for extent in self.base.extents(start, inside - start):
                hole = extent.kind is Kind.HOLE
                yield extent.offset, extent.end, None if hole else self._seen(BASE, extent.offset, extent.end)
        elif inside > start:
            yield start, inside, self._seen(BASE, start, inside)
        if stop > inside:
            yield inside, stop, None

    def _seen(self, owner: int, start: int, stop: int) -> memoryview:
        view = self.views[owner]
        source = self._source(owner)
        if view is None:
            view = self.views[owner] = source.view
        if view is not None:
            return view[start:stop]
        buffer = memoryview(bytearray(stop - start))
        source.read_into(buffer, start)
        return buffer

    def _source(self, owner: int) -> Source:
        source = self.sources[owner]
        assert source is not None  # every owner in the map has a source
        return source

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on."""
        if self.cow_on_read:
            self._copy_on_read(offset, len(buffer))
        self._fill(buffer, offset)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        end = offset + len(buffer)
        for first, last, owner in self.map.runs(offset >> self.shift, ((end - 1) >> self.shift) + 1):
            start, stop = max(first << self.shift, offset), min(last << self.shift, end)
            self._source(owner).read_into(buffer[start - offset : stop - offset], start)

    # Writing

    def write(self, data: memoryview, offset: int) -> None:
        """Write ``data``, a view of bytes, at ``offset``.

        :raises OverlayFullError: no room; all the old bytes stand.
        """
        first = offset >> self.shift
        last = ((offset + len(data) - 1) >> self.shift) + 1
        if first >> CHUNK_SHIFT == (last - 1) >> CHUNK_SHIFT:
            start = first & CHUNK_MASK
            count = last - first
            if self.map.chunks[first >> CHUNK_SHIFT].count(self.top, start, start + count) == count:
                self.layers[self.top].write_one(data, offset)
                return
            if count == 1 and self._write_block(first, data, offset):
                return
        self._change(first, last, lambda: self._write_claimed([(data, offset)]))

    def write_piped(self, piped: Piped, offset: int) -> None:
        """:meth:`write` of the payload in a pipe. Where it fails, some of it may still be there.

        :raises OverlayFullError: no room; all the old bytes stand.
        """
        length = piped.left
        end = offset + length
        first, last = offset >> self.shift, ((end - 1) >> self.shift) + 1
        start, count = first & CHUNK_MASK, last - first
        chunk = self.map.chunks[first >> CHUNK_SHIFT]
        if start + count <= len(chunk) and chunk.count(self.top, start, start + count) == count:
            self.layers[self.top].write_piped(piped, length, offset)
            return
        whole = not offset & (self.block_size - 1) and (not end & (self.block_size - 1) or end == self.size)
        data: memoryview | None = None  # once it is not in the pipe any more

        def work() -> None:
            nonlocal data
            # Of what has several owners the fresh blocks go first (see _write_claimed), and a pipe has but one order.
            if data is None and whole and all(owner != self.top for _, _, owner in self.map.runs(first, last)):
                layer = self._top_layer()
                try:
                    layer.write_fresh_piped(piped, offset)
                except OverlayFullError:
                    data = layer.take_back(piped, length, offset)  # there may yet be room
                    layer.abandon(offset, length)
                    raise
                self.map.set(first, last, self.top)
                return
            if data is None:
                data = piped.take_payload()
            self._write_claimed([(data, offset)])

        self._change(first, last, work)

    def _write_block(self, block: int, data: memoryview, offset: int) -> bool:
        """One block or a part of it, as :meth:`_write_claimed` would, in a third of the time; False where it is not that simple."""
        top = self.top
        if top == NO_LAYER:
            return False
        with self._stripes[(block >> _REGION_SHIFT) % _STRIPES]:
            if len(data) < self.block_size and (owner := self.map.owner(block)) != top:
                start = block << self.shift
                whole = memoryview(bytearray(min(self.block_size, self.size - start)))
                self._source(owner).read_into(whole, start)
                whole[offset - start : offset - start + len(data)] = data
                data, offset = whole, start
            try:
                self.layers[top].write_one(data, offset)
            except OverlayFullError:
                return False
            self.map.set(block, block + 1, top)
        return True

    def _change(self, first: int, last: int, work: Callable[[], None]) -> None:
        """Claim the blocks and carry out ``work``, which has changed nothing where it finds no room."""
        try:
            try:
                self._claim(first, last, work)
            except OverlayFullError:
                if not self._reclaim():
                    raise
                self._claim(first, last, work)
        except DiskError as error:
            self.failure = error
            raise

    def _write_claimed(self, writes: list[tuple[memoryview, int]]) -> None:
        """Write them all, or none where there is no room; their blocks are claimed, and no two share one."""
        layer = self._top_layer()
        fresh: list[Run] = []
        owned: list[tuple[memoryview, int]] = []
        for data, offset in writes:
            end = offset + len(data)
            for run in self.map.runs(offset >> self.shift, ((end - 1) >> self.shift) + 1):
                first, last = run[0] << self.shift, min(run[1] << self.shift, self.size)
                start, stop = max(first, offset), min(last, end)
                part = data[start - offset : stop - offset]
                if run[2] == self.top:
                    owned.append((part, start))
                    continue
                # Only fresh blocks can find no room. They go first, and nothing has changed until their owner is set.
                try:
                    layer.write_fresh([*self._old_bytes(first, start), part, *self._old_bytes(stop, last)], first)
                except OverlayFullError:
                    for begun, ended, _ in [*fresh, run]:
                        layer.abandon(begun << self.shift, (ended - begun) << self.shift)
                    raise
                fresh.append(run)
        for part, start in owned:
            layer.write([part], start)
        for first, last, _ in fresh:
            self.map.set(first, last, self.top)

    def _old_bytes(self, start: int, stop: int) -> list[memoryview]:
        if start == stop:
            return []
        buffer = memoryview(bytearray(stop - start))
        self._fill(buffer, start)
        return [buffer]

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeroes and give its space back, as far as the top layer held it.

        :raises OverlayFullError: a block that is zeroed in part has no room; nothing has changed then.
        """
        end = offset + length
        first = offset >> self.shift
        last = ((end - 1) >> self.shift) + 1
        whole_first = -(-offset >> self.shift)
        # The disk's last block is whole when the disk ends within it: nothing lies behind.
        whole_last = last if end == self.size else end >> self.shift
        if whole_first > whole_last:
            parts = [(offset, end)]
        else:
            parts = [(offset, min(whole_first << self.shift, end)), (max(whole_last << self.shift, offset), end)]
        self._change(first, last, lambda: self._zero_claimed(parts, whole_first, whole_last))

    def _zero_claimed(self, parts: list[tuple[int, int]], whole_first: int, whole_last: int) -> None:
        writes = [(memoryview(bytes(stop - start)), start) for start, stop in parts if self._needs_zeroes(start, stop)]
        if writes:
            self._write_claimed(writes)
        if whole_first < whole_last:
            self._zero_blocks(whole_first, whole_last)

    def _needs_zeroes(self, start: int, stop: int) -> bool:
        """Whether a part of a block must be written for it to read as zeroes."""
        if start >= stop:
            return False
        owner = self.map.owner(start >> self.shift)
        return owner != ZERO and not (owner == BASE and isinstance(self.base, ZeroBase))

    def _zero_blocks(self, first: int, last: int) -> None:
        held = self.top != NO_LAYER and any(owner == self.top for _, _, owner in self.map.runs(first, last))
        self.map.set(first, last, ZERO)
        if held:
            start = first << self.shift
            self.layers[self.top].punch(start, min(last << self.shift, self.size) - start)

    # Caching and copy-on-read

    def cache(self, offset: int, length: int) -> None:
        """Have the range at hand: copied into the overlay with ``cow_on_cache``, otherwise read ahead.

        :raises OverlayFullError: no room to copy it.
        """
        first, last = offset >> self.shift, ((offset + length - 1) >> self.shift) + 1
        if self.cow_on_cache:
            self._copy_up(first, last)
            return
        for run_first, run_last, owner in self.map.runs(first, last):
            if owner == BASE and (run_first << self.shift) < self.base.size:
                start = run_first << self.shift
                self.base.will_need(start, min(run_last << self.shift, self.base.size) - start)

    def _copy_on_read(self, offset: int, length: int) -> None:
        try:
            self._copy_up(offset >> self.shift, ((offset + length - 1) >> self.shift) + 1)
        except DiskError:
            pass  # a read never fails for want of overlay space: the bytes are still in the base

    def _copy_up(self, first: int, last: int) -> None:
        """Copy those of the blocks that the base owns into the top layer."""
        if all(owner != BASE for _, _, owner in self.map.runs(first, last)):
            return
        step = max(1, _COPY_PIECE >> self.shift)
        for piece in range(first, last, step):
            stop = min(piece + step, last)
            self._change(piece, stop, partial(self._copy_up_claimed, piece, stop))

    def _copy_up_claimed(self, first: int, last: int) -> None:
        for run_first, run_last, owner in list(self.map.runs(first, last)):
            if owner == BASE:
                start, stop = run_first << self.shift, min(run_last << self.shift, self.size)
                self._top_layer().write(self._old_bytes(start, stop), start)
                self.map.set(run_first, run_last, self.top)

    # Stripes and layers

    def _claim(self, first: int, last: int, work: Callable[[], T]) -> T:
        """Carry out ``work`` while nobody else changes the owners of the blocks ``first`` up to ``last``.

        Each lock is taken by a ``with`` of its own, which an interrupt cannot part from the release (see gate.py).
        """
        low, high = first >> _REGION_SHIFT, (last - 1) >> _REGION_SHIFT
        if low == high:
            with self._stripes[low % _STRIPES]:
                return work()
        # Always upwards, so that two claims cannot wait for each other.
        everything = high - low >= _STRIPES - 1
        wanted = range(_STRIPES) if everything else sorted({i % _STRIPES for i in range(low, high + 1)})
        return self._claim_all(list(wanted), 0, work)

    def _claim_all(self, wanted: list[int], index: int, work: Callable[[], T]) -> T:
        if index == len(wanted):
            return work()
        with self._stripes[wanted[index]]:
            return self._claim_all(wanted, index + 1, work)

    def _top_layer(self) -> Layer:
        if self.top == NO_LAYER:
            with self._growing:
                if self.top == NO_LAYER:
                    self._push_layer()
        return self.layers[self.top]

    def _push_layer(self) -> None:
        number = next(n for n in range(FIRST_LAYER, LAST_LAYER + 1) if n not in self.layers)
        self._recycled = self._spare is not None
        layer, self._spare = self._spare or Layer(self.size, self.directory), None
        self.layers[number] = self.sources[number] = layer
        # In this order, for who looks without a lock (block_status.py), and see _repair.
        self.top = number
        self.stack.append(number)

    # What follows is called with the gate shut.

    def _repair(self) -> None:
        """End what an interrupt may have stopped in the middle: a new layer that is the top, and not on the stack yet."""
        if self.top != NO_LAYER and self.top not in self.stack:
            self.stack.append(self.top)

    def seal(self) -> int:
        """Freeze the top layer: what is written next goes to a new one. Returns how many layers there are now.

        :raises CheckpointError: there could be no new one; nothing has changed.
        """
        self._repair()
        if len(self.layers) >= MOST_LAYERS:
            raise CheckpointError(
                f"the disk has {MOST_LAYERS} layers, the most it can have: roll back to an earlier checkpoint, or reset it"
            )
        self.top = NO_LAYER
        return len(self.stack)

    def unseal(self, depth: int) -> None:
        """The oldest ``depth`` layers are still needed as they are; if there is just one more, it may be written again."""
        if len(self.stack) == depth + 1:
            self.top = self.stack[-1]

    def drop_layers(self, depth: int) -> list[Layer]:
        """Take away all but the oldest ``depth`` layers, which no block is owned by any more.

        The caller releases them when the gate is open again: closing a large file takes its time.
        """
        self._repair()
        self.top = NO_LAYER
        del self.stack[depth:]
        # Not what the stack has just lost, but what it has not: an interrupt may have parted the two.
        return [self._drop(number) for number in list(self.layers) if number not in self.stack]

    def put_away(self, layers: list[Layer]) -> None:
        """Release dropped layers, but keep a small one for the next time a layer is needed.

        Closing a file of 100 MiB takes ext4 some 70 ms, which is most of what a rollback would cost, and writing to space
        that is there already is quicker than to new space. What the file holds does no harm: no block is owned by it.
        """
        for layer in layers:
            fit = layer.unshared and layer.space() <= _LARGEST_SPARE and layer.unmap()
            with self._growing:
                if fit and self._spare is None and not self._closed:
                    self._spare = layer
                    continue
            layer.release()

    def _release_spare(self) -> None:
        with self._growing:
            spare, self._spare = self._spare, None
        if spare is not None:
            spare.release()

    def close(self) -> list[Layer]:
        """Let go of everything; the caller releases the layers that come back. With the gate shut."""
        with self._growing:
            self._closed = True
        self._release_spare()
        dropped = self.drop_layers(0)
        self.views.clear()  # the base's mapping has a descriptor of its own
        return dropped

    def _reclaim(self) -> bool:
        """There is no room: give back what is kept of dropped layers, or was found for writes to come. Whether there was anything."""

        def give_back() -> bool:
            ahead = self.top != NO_LAYER and self.layers[self.top].gives_up_room()
            found = self._spare is not None or self._recycled or ahead
            self._release_spare()
            if (self._recycled or ahead) and self.top != NO_LAYER:
                for first, last, owner in self.map.runs(0, self.map.blocks):
                    if owner != self.top:
                        self.layers[self.top].punch(first << self.shift, (last - first) << self.shift)
            self._recycled = False
            return found

        return self._claim(0, self.map.blocks, give_back)  # nobody is just filling blocks that have no owner yet

    def _drop(self, number: int) -> Layer:
        self.sources[number] = self.views[number] = None
        return self.layers.pop(number)

    def merge(self, depth: int, most: int) -> bool:
        """Bring the layers above the oldest ``depth`` nearer to being one, copying at most ``most`` bytes; True when done.

        Of the two newest the smaller moves into the larger. Without room for that, they stay two.
        """
        self._repair()
        if len(self.stack) < depth + 2:
            self.unseal(depth)
            return True
        newest, older = self.stack[-1], self.stack[-2]
        small, large = sorted((newest, older), key=self.map.blocks_of)
        left = most >> self.shift
        for first, last, owner in list(self.map.runs(0, self.map.blocks)):
            if owner != small:
                continue
            if left <= 0:
                self.top = newest
                return False
            last = min(last, first + left)
            left -= last - first
            try:
                self._move(first, last, small, large)
            except DiskError:
                self.top = newest
                return True
        self.stack.remove(small)
        self._drop(small).release()
        self.top = self.stack[-1]
        return len(self.stack) == depth + 1

    def _move(self, first: int, last: int, source: int, target: int) -> None:
        step = max(1, _COPY_PIECE >> self.shift)
        for piece in range(first, last, step):
            stop = min(piece + step, last)
            start = piece << self.shift
            buffer = memoryview(bytearray(min(stop << self.shift, self.size) - start))
            self.layers[source].read_into(buffer, start)
            self.layers[target].write([buffer], start)
            self.map.set(piece, stop, target)

    # Looking

    def allocation(self, offset: int, end: int) -> Iterator[Extent]:
        """What the range consists of: ``DATA``, ``ZERO`` (zeroed here) or ``HOLE`` (of the base, or beyond its end)."""
        return allocation(self.map, self.base, self.shift, offset, end)
