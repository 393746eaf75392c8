"""What can be compared: a disk, an image, an NBD export, or bytes; each opened as a base is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import TypeAlias

from cowkit.cow_disk import CowDisk
from cowkit.disk import Base, Checkpoint, Extent, Kind, ZeroBase
from cowkit.disk.base import FileBase
from cowkit.disk.view_base import ViewBase
from cowkit.errors import BaseOpenError, DiskClosedError, UsageError

Comparable: TypeAlias = CowDisk | str | os.PathLike[str] | bytes | bytearray | memoryview
"""A disk; the path of a raw file or of any image that can be a base, or an NBD URI; the bytes themselves."""


class BytesBase(Base):
    """Bytes that are at hand."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        super().__init__()
        self._data = memoryview(data).cast("B")
        self.size = len(self._data)
        self.given = "the bytes given"

    @property
    def view(self) -> memoryview:
        """All of them."""
        return self._data

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on."""
        buffer[:] = self._data[offset : offset + len(buffer)]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """One run of data."""
        if length:
            yield Extent(offset, length, Kind.DATA)

    def verify(self) -> None:
        """Nothing can have changed."""

    def _close(self) -> None:
        self._data.release()


class HostedContent(Base):
    """A disk in a process of its own, as it is now: it is not frozen, so nobody should write to it meanwhile."""

    sparse = True

    def __init__(self, disk: CowDisk) -> None:
        super().__init__()
        assert disk._hosted is not None
        self._disk = disk._hosted
        self.size = disk.size
        self.given = disk.name

    @property
    def view(self) -> None:
        """None: it is in another process."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on."""
        buffer[:] = self._disk.pread(len(buffer), offset)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Data, and as holes what reads as zeroes for sure."""
        return self._disk.allocation(offset, length)

    def dirty_extents(self) -> Iterator[Extent]:
        """What may differ from the base."""
        return self._disk.dirty_extents()

    def verify(self) -> None:
        """The host looks after its base."""

    def _close(self) -> None:
        """The disk stays open."""


class PaddedContent(Base):
    """``inner``, cut off at ``size`` or with zeroes up to there; releasing ``inner`` is the caller's."""

    sparse = True

    def __init__(self, inner: Base, size: int) -> None:
        super().__init__()
        self.inner = inner
        self.size = size
        self.given = inner.given

    @property
    def view(self) -> None:
        """None: it may be longer than what there is."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on."""
        inside = max(0, min(len(buffer), self.inner.size - offset))
        if inside:
            self.inner.read_into(buffer[:inside], offset)
        buffer[inside:] = bytes(len(buffer) - inside)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Those of ``inner``, and a hole behind."""
        inside = max(0, min(length, self.inner.size - offset))
        if inside:
            yield from self.inner.extents(offset, inside)
        if length > inside:
            yield Extent(offset + inside, length - inside, Kind.HOLE)

    def verify(self) -> None:
        """See ``inner``'s."""
        self.inner.verify()

    def _close(self) -> None:
        """Nothing of its own is open."""


def open_content(thing: Comparable) -> Base:
    """``thing`` as it is at this moment; release it when done.

    :raises UsageError: it is nothing that can be compared.
    :raises CowkitError: it cannot be opened.
    """
    if isinstance(thing, CowDisk):
        if thing.closed:
            raise DiskClosedError(f"the disk {thing.name!r} is closed: compare it before")
        if thing._hosted is not None:
            return HostedContent(thing)
        return ViewBase(thing.engine.freeze(), thing.name)
    if isinstance(thing, bytes | bytearray | memoryview):
        return BytesBase(thing)
    if isinstance(thing, str | os.PathLike):
        from cowkit.hosting.opening import open_exactly

        try:
            return open_exactly(thing)
        except BaseOpenError as error:  # for whoever compares, it is no base
            given = os.fsdecode(thing)
            raise BaseOpenError(str(error).replace(f"base {given}", given, 1)) from error
    raise UsageError(f"a disk, an image's path, an NBD URI or bytes can be compared, not {thing!r}")


def open_base_of(disk: CowDisk) -> Base:
    """What ``disk`` was at first; release it when done."""
    if disk._hosted is None:
        return disk.engine.base.hold()
    opened = disk.opened_as
    if disk.base is None:
        return ZeroBase(disk.size)
    from cowkit.hosting.opening import open_exactly

    return open_exactly(
        disk.base, format=opened.base_format, offset=opened.offset, partition=opened.partition, tmpdir=opened.tmpdir
    )


def open_checkpoint_of(disk: CowDisk, point: Checkpoint | str, kept: ExitStack) -> Base:
    """What a disk in a process of its own was at a checkpoint; release it when done, before ``kept`` ends.

    The other process writes the difference of then to a temporary file, which is put on top of the base here.

    :raises CheckpointError: the disk has no such checkpoint.
    :raises CowkitError: the difference cannot be written, or the base cannot be opened.
    """
    base, opened = disk.base, disk.opened_as
    folder = kept.enter_context(TemporaryDirectory(prefix="cowkit-", dir=opened.tmpdir))
    path = os.path.join(folder, "then.qcow2")
    whole = os.path.abspath(base) if base is not None and os.path.exists(base) else base
    try:
        disk.diff(path, at=point, backing_file=whole)
    except UsageError:
        if whole is None:
            raise
        # No image can stand on this base (it is compressed, or a part of a file): nobody but this process has to understand it.
        disk.diff(path, at=point, backing_file=f"{whole}.raw", backing_format="raw", hash="full")
    then = kept.enter_context(
        CowDisk(
            base,
            size=disk.size if base is None or opened.size is not None or opened.round != "exact" else None,
            block_size=disk.block_size,
            base_format=opened.base_format,
            offset=opened.offset,
            partition=opened.partition,
            tmpdir=opened.tmpdir,
            overlay=path,
        )
    )
    return open_content(then)


def what_may_differ(one: Base, other: Base) -> Iterator[tuple[int, int]]:
    """Ranges ``(start, end)`` outside of which both read the same, up to the end of the smaller one; in order."""
    size = min(one.size, other.size)
    if _is_same(_bottom(one), _bottom(other)):
        runs = [(each.offset, each.end) for part in (one, other) for each in _dirty(part)]
    else:
        runs = [
            (each.offset, each.end)
            for part in (one, other)
            for each in (part.extents(0, size) if size else ())
            if each.kind is Kind.DATA
        ]
    yield from _joined(sorted(runs), size)


def _bottom(content: Base) -> Base:
    """What shows through where nothing was written."""
    while isinstance(content, ViewBase | PaddedContent):
        content = content.shown.base if isinstance(content, ViewBase) else content.inner
    return content


def _is_same(one: Base, other: Base) -> bool:
    if one is other or (isinstance(one, ZeroBase) and isinstance(other, ZeroBase)):
        return True
    return isinstance(one, FileBase) and isinstance(other, FileBase) and one.identity == other.identity


def _dirty(content: Base) -> Iterator[Extent]:
    while isinstance(content, ViewBase | PaddedContent):
        if isinstance(content, ViewBase):
            yield from content.shown.dirty_extents()
            content = content.shown.base
        else:
            content = content.inner


def _joined(runs: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    start = end = 0
    for first, last in runs:
        if first > end:
            if start < end:
                yield start, min(end, size)
            start = first
        elif start == end:
            start = first
        end = max(end, last)
        if start >= size:
            return
    if start < min(end, size):
        yield start, min(end, size)
