"""The engine disk: a writable view of a read-only base, with checkpoints, to be thrown away."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar
from weakref import WeakKeyDictionary

from cowkit.disk.base import Base
from cowkit.disk.checkpoint import Checkpoint, FrozenView, extents_of_runs
from cowkit.disk.extent import Extent
from cowkit.disk.gate import Gate
from cowkit.disk.last_state import LastState
from cowkit.disk.layer import Layer, default_directory
from cowkit.disk.overlay import Overlay
from cowkit.disk.owner_map import OwnerMap
from cowkit.disk.trace import Trace
from cowkit.errors import CheckpointError, DiskClosedError, OutOfBoundsError, UsageError

Buffer = bytes | bytearray | memoryview

T = TypeVar("T")

DEFAULT_BLOCK_SIZE = 4096
SMALLEST_BLOCK_SIZE = 512
LARGEST_BLOCK_SIZE = 16 << 20

MOST_BLOCKS = 1 << 34
"""The owner map costs eight bytes for each 8,192 blocks from the start: 16 MiB for this many, which are 64 TiB of 4 KiB each."""

LONGEST_NAME = 1023
"""Of a checkpoint, in bytes: it becomes part of an NBD metadata context's name (at most 4096) and of a QEMU bitmap's (1023)."""

WHOLE_NAME = "cow"
"""No checkpoint's name: the dirty bitmap ``qemu:dirty-bitmap:cow`` is of everything since the beginning."""

_MERGE_PIECE = 8 << 20
_MERGE_ROUNDS = 64


def check_block_size(block_size: int) -> int:
    """``block_size`` if it can be one.

    :raises UsageError: it is no power of two from 512 bytes to 16 MiB.
    """
    if not SMALLEST_BLOCK_SIZE <= block_size <= LARGEST_BLOCK_SIZE or block_size & (block_size - 1):
        raise UsageError(
            f"block size {block_size} is no power of two from {SMALLEST_BLOCK_SIZE} to {LARGEST_BLOCK_SIZE} bytes (16 MiB)"
        )
    return block_size


def not_bytes(data: object) -> UsageError:
    """What is wrong with ``data`` that is to be written."""
    return UsageError(f"what is written is bytes or other contiguous memory, not {type(data).__name__}")


def _too_many_blocks(size: int, block_size: int) -> str:
    enough = 1 << max(0, (-(-size // MOST_BLOCKS) - 1).bit_length())
    if enough > LARGEST_BLOCK_SIZE:
        return f"disk size {size} is over the most that a disk can have, {MOST_BLOCKS * LARGEST_BLOCK_SIZE} bytes (256 PiB)"
    return (
        f"disk size {size} is too much for blocks of {block_size} bytes, which do for up to {MOST_BLOCKS * block_size}: "
        f"set the block size to {enough} or more (block_size=, --block-size)"
    )


class Disk:
    """A writable, throwaway view of ``base``. Safe to use from several threads.

    Order and names of arguments are libnbd's: the length or the data first, then the offset, both in bytes.

    :param base: where the bytes that nobody wrote come from; the disk closes it.
    :param block_size: the unit of copy-on-write: a power of two from 512 bytes to 16 MiB.
    :param size: the size in bytes; the base's, unless given. Beyond the base's end the disk reads as zeroes.
    :param tmpdir: where layers live; ``$TMPDIR`` or ``/var/tmp``, unless given.
    :param cow_on_read: copy what is read from the base into the overlay.
    :param cow_on_cache: copy what a cache request names into the overlay.
    :param trace: how many of the last changes to take down, at most :data:`cowkit.disk.trace.MOST_EVENTS`.
    """

    def __init__(
        self,
        base: Base,
        *,
        block_size: int = DEFAULT_BLOCK_SIZE,
        size: int | None = None,
        tmpdir: str | os.PathLike[str] | None = None,
        cow_on_read: bool = False,
        cow_on_cache: bool = False,
        trace: int = 0,
    ) -> None:
        self.base = base
        self.size = base.size if size is None else size
        self.block_size = check_block_size(block_size)
        if self.size > MOST_BLOCKS * block_size:
            raise UsageError(_too_many_blocks(self.size, block_size))
        directory = default_directory() if tmpdir is None else os.fspath(tmpdir)
        self.overlay = Overlay(
            base, self.size, block_size, directory, cow_on_read=cow_on_read, cow_on_cache=cow_on_cache
        )
        self.trace = Trace(trace) if trace else None
        if self.trace is not None:
            self.trace.watch(self.overlay)
        self.gate = Gate()
        self.closed = False
        self.beginning: Checkpoint | None = None
        """Where a disk begins that did not begin as its base is; see :mod:`cowkit.diff.overlay`."""
        self.spared: tuple[str, ...] = ()
        """Files that are not to be replaced by what is kept of the disk: those that such a beginning stood on."""
        self._owner = os.getpid()
        self._shift = block_size.bit_length() - 1
        self._checkpoints: list[Checkpoint] = []
        # Weak, since an interrupt may keep somebody from closing a view.
        self._views: WeakKeyDictionary[FrozenView, int] = WeakKeyDictionary()
        self.keeps_last = False
        """Whether closing leaves :attr:`last`."""
        self.last: LastState | None = None
        """With :attr:`keeps_last`: what the disk was when it was closed, for whoever takes and releases it."""

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Requests

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on.

        :raises OutOfBoundsError: the range is not within the disk.
        """
        self._check(offset, length, errno.EINVAL)
        buffer = bytearray(length)
        if length:
            self._pass(lambda: self.overlay.read_into(memoryview(buffer), offset))
        return bytes(buffer)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write ``data`` at ``offset``.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: no room; the old bytes stand.
        """
        try:
            view = memoryview(data).cast("B")
        except TypeError as error:
            raise not_bytes(data) from error
        self._check(offset, len(view), errno.ENOSPC)
        if view:
            self._pass(lambda: self.overlay.write(view, offset))

    def zero(self, length: int, offset: int) -> None:
        """Make the range read as zeroes; whole blocks of it take no space any more.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: no room for a block that is zeroed in part; nothing has changed.
        """
        self._check(offset, length, errno.ENOSPC)
        if length:
            self._pass(lambda: self.overlay.zero(offset, length))

    def trim(self, length: int, offset: int) -> None:
        """Give up the range: it reads as zeroes from then on; whole blocks of it take no space any more.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: no room for a block that is trimmed in part; nothing has changed.
        """
        self._check(offset, length, errno.EINVAL)
        if length:
            self._pass(lambda: self.overlay.zero(offset, length))

    def cache(self, length: int, offset: int) -> None:
        """Have the range at hand: copied into the overlay with ``cow_on_cache``, otherwise read ahead.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: with ``cow_on_cache``: no room for the copy; what the disk reads has not changed.
        """
        self._check(offset, length, errno.EINVAL)
        if length:
            self._pass(lambda: self.overlay.cache(offset, length))

    def flush(self) -> None:
        """Nothing is left to do: what was acknowledged is in the overlay, which lives as long as the disk does."""
        self._open()
        self._note("flush")

    def _note(self, what: str, name: str | None = None) -> None:
        if self.trace is not None:
            self.trace.note(what, name)

    def _check(self, offset: int, length: int, code: int) -> None:
        try:
            outside = (offset | length) < 0 or offset + length > self.size  # `|`: floats are no offsets
        except TypeError as error:
            wrong = f"length {length!r}" if not isinstance(length, int) else f"offset {offset!r}"
            raise UsageError(f"{wrong} is no whole number of bytes") from error
        if outside:
            raise OutOfBoundsError(
                f"{length} bytes at offset {offset} are not within the disk, which has {self.size} bytes", errno=code
            )

    @property
    def foreign(self) -> bool:
        """Whether this process was forked from the one that the disk belongs to."""
        return os.getpid() != self._owner

    def _open(self) -> None:
        if self.closed:
            raise DiskClosedError("the disk is closed")
        if os.getpid() != self._owner:
            raise DiskClosedError(
                f"the disk belongs to process {self._owner}, which this one was forked from: make a disk of its own here"
            )

    def _pass(self, work: Callable[[], T]) -> T:
        """Carry out ``work`` inside a pass of the gate."""
        self._open()
        borrowed = self.gate.borrow()
        try:
            with borrowed.lock:
                self._open()
                return work()
        finally:
            self.gate.give_back(borrowed)

    def _shut(self, work: Callable[[], T]) -> T:
        """Carry out ``work`` with the gate shut."""
        self._open()

        def checked() -> T:
            self._open()
            return work()

        return self.gate.shut(checked)

    # Checkpoints

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints, oldest first."""
        return list(self._checkpoints)

    def checkpoint(self, name: str | None = None) -> Checkpoint:
        """Freeze this moment, so that the disk can be rolled back to it.

        :param name: for :meth:`rollback` and for people; ``checkpoint-1`` and so on, unless given.
        :raises CheckpointError: a checkpoint of that name exists.
        :raises UsageError: the name is no printable text, too long, or ``"cow"``.
        """
        return self._shut(lambda: self._checkpoint(name))

    def _checkpoint(self, name: str | None) -> Checkpoint:
        free = self._free_name(name)
        depth = self.overlay.seal()
        point = Checkpoint(free, self.overlay.map.freeze(), depth)
        self._checkpoints.append(point)
        self._note("checkpoint", free)
        return point

    def _free_name(self, name: str | None) -> str:
        taken = {point.name for point in self._checkpoints}
        if name is None:
            number = next(n for n in itertools.count(len(taken) + 1) if f"checkpoint-{n}" not in taken)
            return f"checkpoint-{number}"
        if (
            not isinstance(name, str)
            or not name
            or "\0" in name
            or len(name.encode(errors="surrogatepass")) > LONGEST_NAME
            or not name.isprintable()
        ):
            raise UsageError(f"checkpoint name {name!r} is no printable text of 1 to {LONGEST_NAME} bytes")
        if name == WHOLE_NAME:
            raise UsageError(
                f"no checkpoint can be called {name!r}: over NBD, qemu:dirty-bitmap:{name} is what was written since the beginning; "
                "choose another name"
            )
        if name in taken:
            raise CheckpointError(f"there is a checkpoint {name!r} already: choose another name, or roll back past it")
        return name

    def find_checkpoint(self, point: Checkpoint | str) -> Checkpoint:
        """The checkpoint of that name, or that very one.

        :raises CheckpointError: the disk has no such checkpoint, or was rolled back past it.
        """
        for each in self._checkpoints:
            if each is point or each.name == point:
                return each
        name = point.name if isinstance(point, Checkpoint) else point
        known = ", ".join(repr(each.name) for each in self._checkpoints) or "none"
        other = ""
        if any(each.name == name for each in self._checkpoints):
            other = f"; that {name!r} is another one than was given: give the name to mean it"
        raise CheckpointError(f"the disk has no checkpoint {name!r} (any more); it has: {known}{other}")

    def rollback(self, point: Checkpoint | str) -> None:
        """Be as at ``point``, which stays; later checkpoints are gone.

        :raises CheckpointError: the disk has no such checkpoint, or was rolled back past it.
        """
        self.overlay.put_away(self._shut(lambda: self._rollback(point)))

    def _rollback(self, point: Checkpoint | str) -> list[Layer]:
        found = self.find_checkpoint(point)
        self._note("rollback", found.name)
        del self._checkpoints[self._checkpoints.index(found) + 1 :]
        self._forget_views_above(found._depth)
        self.overlay.map.restore(found._map)
        return self.overlay.drop_layers(found._depth)

    def reset(self) -> None:
        """Be as the base is; all checkpoints are gone."""
        self.overlay.put_away(self._shut(self._reset))

    def _reset(self) -> list[Layer]:
        self._note("reset")
        self._checkpoints.clear()
        self._forget_views_above(0)
        self.overlay.map.restore(OwnerMap(self.overlay.map.blocks))
        return self.overlay.drop_layers(0)

    def freeze(self, at: Checkpoint | str | None = None) -> FrozenView:
        """A read-only view of this moment, or of a checkpoint; the disk goes on. Close it when done.

        :raises CheckpointError: the disk has no such checkpoint, or was rolled back past it.
        """
        return self._shut(lambda: self._freeze(at))

    def freeze_both(self, since: Checkpoint | str, at: Checkpoint | str | None = None) -> tuple[FrozenView, FrozenView]:
        """A view of the checkpoint ``since``, and one of this moment or of the later checkpoint ``at``. Close both when done.

        :raises CheckpointError: the disk has no such checkpoint, or ``since`` is the later of the two.
        """

        def both() -> tuple[FrozenView, FrozenView]:
            then = self.find_checkpoint(since)
            if at is not None:
                now = self.find_checkpoint(at)
                if self._checkpoints.index(now) < self._checkpoints.index(then):
                    raise CheckpointError(
                        f"checkpoint {now.name!r} is older than {then.name!r}: give the older one as the one to begin from"
                    )
            earlier = self._freeze(then)
            return earlier, self._freeze(at)

        return self._shut(both)

    def _freeze(self, at: Checkpoint | str | None) -> FrozenView:
        overlay = self.overlay
        if at is None:
            depth, map = overlay.seal(), overlay.map.freeze()
        else:
            point = self.find_checkpoint(at)
            depth, map = point._depth, point._map
        view = FrozenView(
            map,
            base=self.base,
            size=self.size,
            block_size=self.block_size,
            sources=list(overlay.sources),
            layers=list(overlay.layers.values())
            if at is None
            else [overlay.layers[each] for each in overlay.stack[:depth]],
            on_close=self._view_closed,
        )
        self._views[view] = depth
        return view

    def _forget_views_above(self, depth: int) -> None:
        """Views that need layers which the disk drops: they hold them by themselves and are no concern of ours any more."""
        self._views = WeakKeyDictionary({view: needed for view, needed in self._views.items() if needed <= depth})

    def _view_closed(self, view: FrozenView) -> None:
        # What was written while the view was open lies in a layer of its own. Bring the two together again, in steps
        # that each hold up the clients for a few milliseconds, so that a thousand diffs do not make a thousand layers.
        if self.foreign:
            return
        for attempt in range(_MERGE_ROUNDS):
            most = _MERGE_PIECE if attempt < _MERGE_ROUNDS - 1 else self.size + self.block_size
            if self.gate.shut(lambda most=most: self._merge(view, most)):  # type: ignore[misc]
                return

    def _merge(self, view: FrozenView, most: int) -> bool:
        self._views.pop(view, None)
        if self.closed:
            return True
        depth = max([*(point._depth for point in self._checkpoints), *self._views.values(), 0])
        return self.overlay.merge(depth, most)

    # What changed

    @property
    def dirty_bytes(self) -> int:
        """How many bytes a layer holds or were zeroed."""
        return sum(extent.length for extent in self.dirty_extents())

    def dirty_extents(
        self, offset: int = 0, length: int | None = None, *, since: Checkpoint | str | None = None
    ) -> Iterator[Extent]:
        """The longest runs within a range that a layer holds (``DATA``) or that were zeroed (``ZERO``), in order.

        :param length: up to the end of the disk, unless given.
        :param since: only what was written or zeroed since that checkpoint.
        :raises OutOfBoundsError: the range is not within the disk.
        """
        if length is None:
            self._check(offset, 0, errno.EINVAL)
            length = self.size - offset
        self._check(offset, length, errno.EINVAL)
        if not length:
            return iter(())

        def look() -> list[Extent]:
            point = None if since is None else self.find_checkpoint(since)
            return list(self.dirty_in_pass(offset, offset + length, point))

        return iter(self._pass(look))

    def dirty_in_pass(self, offset: int, end: int, since: Checkpoint | None) -> Iterator[Extent]:
        """What :meth:`dirty_extents` tells, for who is inside a pass of the gate already; ``end`` is over ``offset``."""
        then = None if since is None else since._map
        runs = self.overlay.map.dirty_runs(offset >> self._shift, ((end - 1) >> self._shift) + 1, then)
        for extent in extents_of_runs(runs, self._shift, self.size):
            start = max(extent.offset, offset)
            yield Extent(start, min(extent.end, end) - start, extent.kind)

    def allocation(self, offset: int, length: int) -> Iterator[Extent]:
        """The whole range as extents: ``DATA``, ``ZERO`` (zeroed here) or ``HOLE`` (a hole of the base, or beyond its end).

        :raises OutOfBoundsError: the range is not within the disk.
        """
        self._check(offset, length, errno.EINVAL)
        if not length:
            return iter(())
        return iter(self._pass(lambda: list(self.overlay.allocation(offset, offset + length))))

    def close(self) -> None:
        """Throw away what was written and let go of the base; may be called again.

        :raises BaseChangedError: the base is not what it was at opening. The disk is closed all the same.
        """
        if self.foreign:
            self._forget()
            return
        dropped = self.gate.shut(self._close)
        if dropped is None:
            return
        if self.last is not None:  # it lets go of them
            self.base.verify()
            return
        for layer in dropped:
            layer.release()
        try:
            self.base.verify()
        finally:
            self.base.release()

    def _close(self) -> list[Layer] | None:
        if self.closed:
            return None
        self.closed = True
        self._checkpoints.clear()
        self._views.clear()
        if self.trace is not None:
            self.trace.leave(self.overlay)
        if not self.keeps_last:
            return self.overlay.close()
        sources = list(self.overlay.sources)
        layers = self.overlay.close()
        self.last = LastState(
            self.overlay.map,
            base=self.base,
            size=self.size,
            block_size=self.block_size,
            sources=sources,
            layers=layers,
        )
        return layers

    def _forget(self) -> None:
        """In a forked child: let go of its copies of the descriptors. No lock is taken, since a thread that the child does not
        have may have held it.
        """
        self.closed = True
        self._checkpoints.clear()
        self._views.clear()
        self.overlay.layers.clear()
        self.overlay.sources.clear()
        self.overlay.views.clear()
