"""What BLOCK_STATUS tells of a disk: one list of descriptors for each metadata context.

==============================  =======================================================================
``base:allocation``             bit 0 HOLE, bit 1 ZERO
``qemu:dirty-bitmap:cow``       bit 0: the overlay owns it, or it was zeroed
``qemu:dirty-bitmap:NAME``      the same, since the checkpoint of that name
``qemu:allocation-depth``       0: a hole of the base; 1: the newest layer, zeroed too; 2: the next; ...; the base
==============================  =======================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from cowkit.disk import Disk, Kind
from cowkit.disk.disk import WHOLE_NAME
from cowkit.disk.owner_map import BASE, ZERO
from cowkit.errors import CheckpointError
from cowkit.server import wire

Descriptor = tuple[int, int]
"""``(length, flags)``; the length is never 0."""

WHOLE_OVERLAY = WHOLE_NAME
"""The dirty bitmap of everything since the beginning."""

MOST_DESCRIPTORS = 1 << 16
"""In one reply, for all contexts together. A client asks on from where they end; the protocol's own bound, 2**20 for each
context, is a second's work."""

_ALLOCATION = {Kind.DATA: 0, Kind.ZERO: wire.STATE_HOLE | wire.STATE_ZERO, Kind.HOLE: wire.STATE_HOLE | wire.STATE_ZERO}


def contexts_of(disk: Disk) -> tuple[str, ...]:
    """The names of the contexts that a disk has at the moment."""
    bitmaps = [WHOLE_OVERLAY, *(point.name for point in disk.checkpoints)]
    return (wire.BASE_ALLOCATION, wire.ALLOCATION_DEPTH, *(wire.DIRTY_BITMAP + name for name in bitmaps))


def describe(disk: Disk, context: str, offset: int, length: int, most: int) -> Sequence[Descriptor]:
    """At most ``most`` descriptors of a context, from the beginning of a range of at least one byte on; inside a pass of the
    disk's gate.

    :raises CheckpointError: the disk was rolled back past the checkpoint that the context is about.
    """
    if context == wire.BASE_ALLOCATION:
        found = _allocation(disk, offset, offset + length)
    elif context == wire.ALLOCATION_DEPTH:
        found = _depth(disk, offset, offset + length)
    else:
        found = _dirty(disk, context.removeprefix(wire.DIRTY_BITMAP), offset, offset + length)
    return list(islice(_joined(found), most))


def _joined(descriptors: Iterator[Descriptor]) -> Iterator[Descriptor]:
    length, flags = next(descriptors)
    for more, others in descriptors:
        if others == flags:
            length += more
        else:
            yield length, flags
            length, flags = more, others
    yield length, flags


def _allocation(disk: Disk, offset: int, end: int) -> Iterator[Descriptor]:
    for extent in disk.overlay.allocation(offset, end):
        yield extent.length, _ALLOCATION[extent.kind]


def _dirty(disk: Disk, name: str, offset: int, end: int) -> Iterator[Descriptor]:
    since = None
    if name != WHOLE_OVERLAY:
        try:
            since = disk.find_checkpoint(name)
        except CheckpointError as error:
            raise CheckpointError(f"dirty bitmap {name!r}: {error}") from error
    for extent in disk.dirty_in_pass(offset, end, since):
        if extent.offset > offset:
            yield extent.offset - offset, 0
        yield extent.length, wire.STATE_DIRTY
        offset = extent.end
    if offset < end:
        yield end - offset, 0


def _depth(disk: Disk, offset: int, end: int) -> Iterator[Descriptor]:
    overlay = disk.overlay
    # Other connections write meanwhile, and the first write after a checkpoint adds a layer.
    stack, top = list(overlay.stack), overlay.top
    # A checkpoint was just taken, or nothing was ever written: the newest layer is there, and empty.
    newest = 1 if stack and stack[-1] == top else 2
    depth_of = {number: newest + index for index, number in enumerate(reversed(stack))}
    depth_of[ZERO] = 1
    below = newest + len(stack)
    for first, last, owner in overlay.map.runs(offset >> overlay.shift, ((end - 1) >> overlay.shift) + 1):
        start, stop = max(first << overlay.shift, offset), min(last << overlay.shift, end)
        if owner != BASE:
            yield stop - start, depth_of.get(owner, 1)  # a layer that was not there yet is the newest
            continue
        for extent in overlay.allocation(start, stop):
            yield extent.length, 0 if extent.kind is Kind.HOLE else below
