"""A disk that begins with what an earlier difference holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

from cowkit.diff.chain import DiffChain
from cowkit.diff.qcow2.layout import down, image_size
from cowkit.disk import Disk, Extent, Kind
from cowkit.errors import UsageError, WrongBaseError

OVERLAY = "overlay"
"""The checkpoint at which such a disk begins."""

_PIECE = 1 << 20


def check_overlay(chain: DiffChain, *, size: int | None) -> int:
    """The size in bytes of a disk that begins as ``chain`` is, which stands on its base.

    :param size: the size that was asked for, or None.
    :raises WrongBaseError: the base cannot be told to be the right one: no identity is recorded, and another name.
    :raises UsageError: the difference does not fit into ``size``.
    """
    if chain.recognised == "no":
        assert chain.base is not None
        assert chain.below is not None
        raise WrongBaseError(
            f"{chain.images[-1].path} is a difference to {chain.below.name} and does not record who that is, so {chain.base.given} "
            "may be another base: if it is the right one, say so in the difference (qemu-img rebase -u -b BASE -F FORMAT)"
        )
    if size is None:
        return chain.disk_size
    if chain.exact_size is None and image_size(size) == chain.size and (chain.base is None or size >= chain.base.size):
        return size  # it has it in whole sectors
    if size < chain.disk_size:
        raise UsageError(f"size {size} is below that of {chain.path}, {chain.disk_size}: it can only be larger")
    return size


def lay_over(disk: Disk, path: str | os.PathLike[str]) -> None:
    """Write what the difference at ``path`` changes, or the chain that it is the top of, to a disk of the base that it was made of.

    That is blocks of the disk that are not as the base has them. An image holds whole clusters, and of the base what else is in
    them; that is not written, since something else may have been by now.

    :raises WrongBaseError: it is a difference to another base, or of a disk of another size.
    :raises OverlayFullError: there is no room for it; part of it may be written.
    :raises ImageError: it is damaged, or no qcow2 image that cowkit reads.
    """
    base = None if disk.base.given is None else disk.base
    with DiffChain(path, base) as chain:
        chain.stand_on(base)
        size = check_overlay(chain, size=None)
        if image_size(disk.size) != chain.size or disk.size < (chain.exact_size or 0):
            raise WrongBaseError(
                f"{chain.path} is a difference of a disk of {size} bytes, and this one has {disk.size}"
            )
        _write_changed(disk, chain)


def load_overlay(disk: Disk, chain: DiffChain) -> None:
    """Make ``disk`` what ``chain`` is: all that its images hold becomes dirty. Then the images are not needed any more.

    The disk has a checkpoint then, :data:`OVERLAY`, to go back to, and to take an increment from; and whoever gets a disk of
    its own from a server of this one gets it as it is there.

    :raises OverlayFullError: there is no room for it.
    :raises ImageError: an image is damaged.
    """
    _write_held(disk, chain)
    disk.beginning = disk.checkpoint(OVERLAY)
    disk.spared = tuple(os.path.abspath(image.path) for image in chain.images[1:])


def _write_held(disk: Disk, chain: DiffChain) -> None:
    for extent in chain.held():
        end = min(extent.end, disk.size)
        if extent.kind is Kind.ZERO:
            end = min(end, disk.base.size)  # beyond that there is nothing to zero
            disk.zero(max(0, end - extent.offset), min(extent.offset, end))
        elif extent.kind is Kind.DATA:
            for offset in range(extent.offset, end, _PIECE):
                disk.pwrite(chain.pread(min(_PIECE, end - offset), offset), offset)
    _cut_off(disk, chain)


def _write_changed(disk: Disk, chain: DiffChain) -> None:
    for extent in chain.held():
        if extent.kind is Kind.HOLE:
            continue
        for start, end in _pieces(disk, extent):
            content = bytes(end - start) if extent.kind is Kind.ZERO else chain.pread(end - start, start)
            before = bytearray(end - start)
            inside = max(0, min(end, disk.base.size) - start)
            disk.base.read_into(memoryview(before)[:inside], start)
            for first, last in _where_different(content, before, -start % disk.block_size, disk.block_size):
                if extent.kind is Kind.ZERO:
                    disk.zero(last - first, start + first)
                else:
                    disk.pwrite(content[first:last], start + first)
    _cut_off(disk, chain)


def _pieces(disk: Disk, extent: Extent) -> Iterator[tuple[int, int]]:
    """``extent`` in pieces that may differ from the base: of what reads as zeroes, where the base has anything."""
    ranges = [(extent.offset, min(extent.end, disk.size))]
    if extent.kind is Kind.ZERO:
        length = max(0, min(extent.end, disk.base.size) - extent.offset)
        found = disk.base.extents(extent.offset, length) if length else iter(())
        ranges = [(each.offset, each.end) for each in found if each.kind is Kind.DATA]
    for start, end in ranges:
        while start < end:
            stop = min(down(start, _PIECE) + _PIECE, end)
            yield start, stop
            start = stop


def _where_different(one: bytes, other: bytearray, first: int, block: int) -> Iterator[tuple[int, int]]:
    """The runs of blocks in which ``one`` and ``other``, which are as long, differ; ``first`` is where the first whole block begins."""
    if one == other:
        return
    begun: int | None = None
    edges = [0, *range(first or block, len(one), block), len(one)]
    for start, end in pairwise(edges):
        same = one[start:end] == other[start:end]
        if same and begun is not None:
            yield begun, start
            begun = None
        elif not same and begun is None:
            begun = start
    if begun is not None:
        yield begun, len(one)


def _cut_off(disk: Disk, chain: DiffChain) -> None:
    """What the difference cut off of its base stays away."""
    there = min(disk.size, disk.base.size) - chain.size
    for extent in disk.base.extents(chain.size, there) if there > 0 else ():
        if extent.kind is Kind.DATA:  # elsewhere it reads as zeroes anyway, and need not be dirty
            disk.zero(extent.length, extent.offset)
