"""A difference with all that it stands on: other differences, and at the bottom the base. Read by cowkit's own reader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from types import TracebackType
from typing import Literal, Self

from cowkit.diff.below import Below, below_of
from cowkit.diff.identity import BaseIdentity, Progress
from cowkit.diff.qcow2.layout import image_size
from cowkit.diff.qcow2.reader import Qcow2Image
from cowkit.diff.recorded import Recorded
from cowkit.disk import Base
from cowkit.disk.extent import Extent, Kind, merged
from cowkit.disk.files import is_same_file
from cowkit.errors import ImageError, UsageError, WrongBaseError

_LONGEST = 200
_ANY_SIZE = 1 << 63

Recognised = Literal["identity", "name", "no"]
"""By what the base was found to be the right one: by its identity, by its name alone, or by nothing."""


class DiffChain:
    """The images from the one at ``path`` down to a base, which is not among them; a context manager.

    Without :meth:`stand_on` only what the images themselves hold can be asked for.

    :param base: the base that the chain is to end at, if it is known. Otherwise it ends at the first file that does not record
        the identity of a base of its own, as each difference of cowkit's does, unless what stands on that is an increment.
    :raises ImageError: an image cannot be opened, or is damaged.
    :raises WrongBaseError: the chain does not lead to ``base``.
    """

    def __init__(self, path: str | os.PathLike[str], base: Base | None = None) -> None:
        self.path = os.fspath(path)
        self.images: list[Qcow2Image] = []
        """From the difference downwards."""
        self.below: Below | None = None
        """What the lowest of them stands on; None where it stands alone."""
        self.base: Base | None = None
        self.recognised: Recognised = "no"
        """By what :meth:`stand_on` found the base to be the right one; ``"identity"`` where there is none to be wrong."""
        self.whole_base = False
        """Whether :meth:`stand_on` compared all of the base with its digest."""
        try:
            self._follow(self.path, base)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the images; the base stays the caller's."""
        for image in self.images:
            image.close()

    # Going down

    def _follow(self, path: str, base: Base | None) -> None:
        seen: list[os.stat_result] = []
        while True:
            try:
                image = Qcow2Image(path, partial(self._pread_below, len(self.images)), _ANY_SIZE)
            except ImageError:
                if base is None or not self._cut(base):
                    raise
                return
            self.images.append(image)
            status = os.fstat(image._fd)
            if len(seen) >= _LONGEST or any(os.path.samestat(status, each) for each in seen):
                raise ImageError(
                    f"image {self.path} has a chain of backing files that is endless or over {_LONGEST} long"
                )
            seen.append(status)
            self.below = below_of(image)
            if base is not None and self.below is not None and _leads_to(self.below, base):
                return
            if self.below is None or not _goes_on(image, self.below, to_a_base=base is not None):
                if base is not None:
                    self._cut(base)
                return
            assert self.below.path is not None
            path = self.below.path

    def _cut(self, base: Base) -> bool:
        """Where no name leads to ``base``, have the lowest image be the lowest that was made of it; whether there is one.

        The lowest, since an image higher up may have a base that differs from this one where no blocks are sampled.
        """
        for index in reversed(range(len(self.images))):
            image = self.images[index]
            below, identity = below_of(image), self._identity(image)
            if below is None or identity is None or below.format not in (None, base.backing_format):
                continue
            if identity.differs_from(base) is None:
                for each in self.images[index + 1 :]:
                    each.close()
                del self.images[index + 1 :]
                self.below = below
                return True
        return False

    @staticmethod
    def _identity(image: Qcow2Image) -> BaseIdentity | None:
        return Recorded.of_image(image).base

    @property
    def missing(self) -> str | None:
        """Which difference is missing, in words; None where the chain goes down to where a base is to be.

        An increment says of itself that it stands on one more difference, and that was not found as a qcow2 image. An image
        without the identity of a base may stand on anything that is one.
        """
        identity, below = self._identity(self.images[-1]), self.below
        if below is None or below.format != "qcow2" or below.path is None:
            return None
        if identity is None:
            if below.is_image:
                return None
            what = "one more image"
        elif identity.increment:
            what = "one more difference"
        else:
            return None
        return (
            f"{below.image} stands on {what}, {below.name}, which is missing: put that back, or record in "
            f"{below.image} where it is (qemu-img rebase -u -b DIFFERENCE -F qcow2)"
        )

    # Standing on a base

    def stand_on(self, base: Base | None, *, full: bool | None = None, progress: Progress | None = None) -> None:
        """Read what shows through from ``base``, after it was seen to be the one that the chain is made for.

        :param base: it stays the caller's; None for a chain that stands alone.
        :param full: compare the whole base with the digest of all its bytes, which must be recorded in one of the images, of
            what that stands on; None: where it is, since whoever wrote the difference asked for that; False: never.
        :param progress: called with the bytes of that which are read and those there are.
        :raises WrongBaseError: it is another one, or an image of the chain is not what the one on top of it was made of.
        :raises UsageError: ``full``, and that digest is not recorded.
        """
        lowest = self.images[-1]
        if base is None and self.below is not None:
            raise WrongBaseError(
                f"{self.path} is a difference to {self.below.name}, and no disk without a base: name that base"
            )
        if base is not None and self.below is None:
            if len(self.images) > 1:
                raise WrongBaseError(f"{self.path} is a difference to {lowest.path}, and not to {base.given}")
            raise WrongBaseError(
                f"{self.path} stands alone and is no difference to {base.given}: use it without a base, or as one"
            )
        missing = None if base is None or self.below is None or _leads_to(self.below, base) else self.missing
        if missing is not None and base is not None and base.backing_format != "qcow2":
            raise WrongBaseError(f"{base.given} is no base for {self.path}: {missing}")
        identities = [self._identity(image) for image in self.images]
        if full and base is not None and all(each is None or each.full is None for each in identities):
            raise UsageError(
                f"{self.path} does not record the digest of its whole base: compare without it, or write it with --hash full"
            )
        self.base = base
        for index, image in reversed(list(enumerate(self.images))):  # what is wrong below shows through above, too
            identity = identities[index]
            bottom = image is lowest
            if identity is None or (bottom and base is None):
                continue
            compare = identity.full is not None and full is not False
            slow = compare and bottom and base is not None and base.scattered_reads_are_slow
            why = identity.differs_from(_Reader(self, index), full=compare, sampled=not slow, progress=progress)
            if compare and base is not None:
                self.whole_base = True  # of a base below other images, all that shows through
            if why is not None:
                if bottom and missing is not None and base is not None:
                    raise WrongBaseError(f"{base.given} is no base for {self.path}: {missing}")
                below = base.given if bottom and base is not None else self.images[index + 1].path
                alone = bottom and base is not None and base.backing_format != "qcow2"
                raise WrongBaseError(
                    f"{image.path} is a difference to another base than {below}: {why}; it was made of {image.backing_file}, "
                    f"which{'' if alone else ', or what that stands on,'} may have been written to since"
                )
        if base is None or identities[-1] is not None or self.whole_base:
            self.recognised = "identity"
            return
        assert self.below is not None
        self.recognised = "name" if _leads_to(self.below, base) else "no"

    # Reading

    @property
    def size(self) -> int:
        """The difference's virtual size in bytes, a multiple of 512."""
        return self.images[0].size

    @property
    def exact_size(self) -> int | None:
        """The size of the disk that it is the difference of, as it is recorded; None where it is not, or somebody has resized the image."""
        disk = Recorded.of_image(self.images[0]).disk
        return disk if disk is not None and image_size(disk) == self.size else None

    @property
    def disk_size(self) -> int:
        """The same; where it is not recorded, the base's own, if that is as many sectors."""
        if (exact := self.exact_size) is not None:
            return exact
        return self.base.size if self.base is not None and image_size(self.base.size) == self.size else self.size

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on, all of them within ``size``."""
        return self.images[0].pread(length, offset)

    def held(self) -> Iterator[Extent]:
        """What the images themselves hold: ``DATA``, ``ZERO``, and ``HOLE`` where the base shows through."""
        return merged(self._held(0, 0, self.size))

    def _held(self, index: int, offset: int, end: int) -> Iterator[Extent]:
        if offset >= end:
            return
        image = self.images[index]
        inside = min(end, image.size)
        if offset < inside:
            for extent in image.extents(offset, inside - offset):
                if extent.kind is Kind.HOLE and index + 1 < len(self.images):
                    yield from self._held(index + 1, extent.offset, extent.end)
                else:
                    yield extent
        if end > max(offset, inside):
            start = max(offset, inside)
            yield Extent(start, end - start, Kind.ZERO)

    def extents(self) -> Iterator[Extent]:
        """The whole disk: ``DATA``, and ``HOLE`` or ``ZERO`` where it reads as zeroes for sure."""
        return merged(self._extents())

    def _extents(self) -> Iterator[Extent]:
        for extent in self.held():
            if extent.kind is not Kind.HOLE or self.base is None:
                yield extent
                continue
            inside = min(extent.end, self.base.size)
            if inside > extent.offset:
                yield from self.base.extents(extent.offset, inside - extent.offset)
            start = max(extent.offset, inside)
            if extent.end > start:
                yield Extent(start, extent.end - start, Kind.HOLE)

    def _pread_below(self, index: int, length: int, offset: int) -> bytes:
        """What image ``index`` stands on."""
        below: Qcow2Image | Base | None = self.images[index + 1] if index + 1 < len(self.images) else self.base
        if below is None:
            raise UsageError(f"image {self.images[index].path} needs its backing file to be read")
        inside = max(0, min(length, below.size - offset))
        return (below.pread(inside, offset) if inside else b"").ljust(length, b"\0")


class _Reader:
    """What image ``index`` of a chain stands on, for its identity."""

    def __init__(self, chain: DiffChain, index: int) -> None:
        below = chain.images[index + 1] if index + 1 < len(chain.images) else chain.base
        assert below is not None
        self._below = below
        self.size = below.size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self._below.pread(len(buffer), offset)


def _leads_to(below: Below, base: Base) -> bool:
    """Whether the name is that of ``base``, which is all of what it names, in the format that is recorded."""
    if base.backing_refusal is not None or below.format not in (None, base.backing_format):
        return False
    if below.path is None:
        return below.name == base.given
    return is_same_file(below.path, base.path)


def _goes_on(image: Qcow2Image, below: Below, *, to_a_base: bool) -> bool:
    """Whether what ``image`` stands on is one more image of the chain.

    A base may be a qcow2 image, too. A difference either has the identity of what it stands on, or is what an increment stands on.
    """
    if not below.is_image:
        return False
    assert below.path is not None
    identity = DiffChain._identity(image)
    if to_a_base or (identity is not None and identity.increment):
        return True
    try:
        with Qcow2Image(below.path) as lower:
            return DiffChain._identity(lower) is not None
    except ImageError:
        return False
