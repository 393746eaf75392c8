"""What each of the states and images that a base consists of holds itself: there it differs from another one in its place."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

from cowkit.diff.below import below_of
from cowkit.diff.qcow2.reader import Qcow2Image
from cowkit.disk import Base
from cowkit.disk.extent import Extent, Kind, merged
from cowkit.disk.view_base import ViewBase
from cowkit.errors import ImageError

_LONGEST = 200

_Held = Callable[[int, int], Iterator[Extent]]
"""What one member holds from an offset up to an end; ``HOLE`` is what the one below it shows."""


def members_of(base: Base) -> list[list[Extent]]:
    """What each member of ``base`` holds that those above it let through, from the top down.

    Members are a disk's states, and qcow2 images that have a backing file, by whomever they were written. What these stand on in
    the end is none, be it a raw file or an image.

    :param base: a base; a raw file has no members.
    """
    with ExitStack() as stack:
        members: list[list[Extent]] = []
        left = [Extent(0, base.size, Kind.HOLE)] if base.size else []
        for held in _members(base, stack):
            shown: list[Extent] = []
            below: list[Extent] = []
            members.append(shown)
            try:
                for gap in left:
                    for extent in held(gap.offset, gap.end):
                        (below if extent.kind is Kind.HOLE else shown).append(extent)
            except ImageError:  # QEMU reads it, whatever it is
                break
            left = list(merged(below))
        return members


def _members(base: Base, stack: ExitStack) -> Iterator[_Held]:
    while isinstance(base, ViewBase):
        yield partial(_held_by_state, list(base.shown.dirty_extents()))
        base = base.shown.base
    if base.backing_refusal is not None or base.path is None or base.backing_format != "qcow2":
        return
    path = base.path
    for _ in range(_LONGEST):
        try:
            image = stack.enter_context(Qcow2Image(path))
        except ImageError:
            return
        below = below_of(image)
        if below is None:
            return
        yield partial(_held_by_image, image)
        if not below.is_image:
            return
        assert below.path is not None
        path = below.path


def _held_by_image(image: Qcow2Image, offset: int, end: int) -> Iterator[Extent]:
    return image.extents(offset, max(0, min(end, image.size) - offset))


def _held_by_state(dirty: list[Extent], offset: int, end: int) -> Iterator[Extent]:
    at = bisect_right(dirty, offset, key=lambda extent: extent.end)
    while offset < end:
        extent = dirty[at] if at < len(dirty) else Extent(end, 0, Kind.HOLE)
        start = min(end, max(offset, extent.offset))
        if start > offset:
            yield Extent(offset, start - offset, Kind.HOLE)
        offset = min(end, extent.end)
        if offset > start:
            yield Extent(start, offset - start, extent.kind)
        at += 1
