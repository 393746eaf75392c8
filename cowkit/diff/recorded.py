"""What an image records beyond what qcow2 has a place for: who its base is, and the disk's exact size."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from cowkit.diff.identity import BLOCK, MOST_WRITTEN, BaseIdentity, Written, blocks_digest, shared
from cowkit.diff.members import members_of
from cowkit.diff.qcow2.layout import SECTOR, image_size
from cowkit.diff.qcow2.reader import Qcow2Image
from cowkit.disk.extent import Extent
from cowkit.disk.sizes import LARGEST_DISK
from cowkit.disk.view_base import ViewBase
from cowkit.errors import ImageError

if TYPE_CHECKING:
    from cowkit.diff.view import View
    from cowkit.disk import Base

VERSION = 1
_LONGEST = 2048
_HEX = re.compile("[0-9a-f]{64}")


class Recorded(NamedTuple):
    """What the header extension of cowkit's says."""

    base: BaseIdentity | None = None
    """Who the base is; None where there is none, or it was not recorded."""
    disk: int | None = None
    """The disk's size in bytes, of which qcow2 has but the sectors; None where it was not recorded."""

    def to_bytes(self) -> bytes:
        """The same as it lies in an image: JSON with a version."""
        said: dict[str, object] = {"v": VERSION}
        if self.disk is not None:
            said["disk"] = self.disk
        if self.base is not None:
            said |= {"size": self.base.size, "sampled": self.base.sampled}
            if self.base.full is not None:
                said["full"] = self.base.full
            if self.base.increment:
                said["increment"] = True
            if self.base.written is not None:
                said["written"] = self.base.written.digest
                said["blocks"] = [offset // BLOCK for offset in self.base.written.at]
        return json.dumps(said, separators=(",", ":")).encode("ascii")

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Recorded:
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
        bad = ImageError(f"image {where} is damaged: its base's identity cannot be read")
        if not isinstance(said, dict) or said.get("v") != VERSION or not said.keys() & {"disk", "size"}:
            raise bad
        size, disk, sampled, full = (said.get(name) for name in ("size", "disk", "sampled", "full"))
        if disk is not None and not _is_size(disk):
            raise bad
        if size is None:
            return cls(None, disk)
        if not _is_size(size) or not _is_digest(sampled) or not (full is None or _is_digest(full)):
            raise bad
        written, blocks = said.get("written"), said.get("blocks")
        there = None
        if written is not None:
            if not (_is_digest(written) and _are_blocks(blocks, size)):
                raise bad
            there = Written(tuple(block * BLOCK for block in blocks), written)
        return cls(BaseIdentity(size, sampled, full, said.get("increment") is True, there), disk)

    @classmethod
    def of_image(cls, image: Qcow2Image) -> Recorded:
        """What ``image`` records; nothing where another program has written it.

        :raises ImageError: it is damaged.
        """
        return cls() if image.identity is None else cls.from_bytes(image.identity, image.path)


def exact_size(base: Base) -> int:
    """The size in bytes of the disk in ``base``: as recorded, if that is a difference of cowkit's; elsewhere ``base``'s own.

    :raises BaseError: ``base`` cannot be read.
    """
    disk = recorded_size(base)
    if disk is None or disk == base.size or image_size(disk) != base.size:
        return base.size
    cut = base.pread(base.size - disk, disk)  # something there was written by others, who know of sectors alone
    return base.size if cut.strip(b"\0") else disk


def recorded_size(base: Base) -> int | None:
    """The size in bytes that the image ``base`` records as its disk's; None where it is no image that does."""
    if base.backing_refusal is not None or base.path is None or base.backing_format != "qcow2":
        return None
    try:
        with Qcow2Image(base.path) as image:
            return Recorded.of_image(image).disk
    except ImageError:  # QEMU reads it, whatever it is
        return None


def record(view: View, identity: BaseIdentity | None) -> Recorded | None:
    """What an image of ``view`` is to record; None where that is nothing.

    :param identity: who the base is, if the image has one and it is known.
    :raises BaseError: the base cannot be read.
    """
    if identity is not None and (before := members_of(view.base)):
        identity = identity._replace(increment=_is_kept(view.base), written=_written(view, before))
    if identity is None and not (view.size % SECTOR or view.base.size % SECTOR):
        return None
    return Recorded(identity, view.size)


def _written(view: View, before: list[list[Extent]]) -> Written | None:
    after = list(view.dirty_extents()) if view.dirty_is_known else []
    at = tuple(offset for offset in shared([after, *before], MOST_WRITTEN) if offset < view.base.size)
    return Written(at, blocks_digest(view.base, view.base.size, at)) if at else None


def _is_kept(base: Base) -> bool:
    """Whether ``base`` is a state of a disk, or a difference that was kept of one."""
    if isinstance(base, ViewBase):
        return True
    if base.backing_refusal is not None or base.path is None or base.backing_format != "qcow2":
        return False
    try:
        with Qcow2Image(base.path) as image:
            return Recorded.of_image(image).base is not None
    except ImageError:  # QEMU reads it, whatever it is
        return False


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_DISK


def _is_digest(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None


def _are_blocks(value: object, size: int) -> TypeGuard[list[int]]:
    """Whether these are the numbers of blocks of ``size`` bytes, in order."""
    return (
        isinstance(value, list)
        and len(value) <= MOST_WRITTEN
        and all(_is_size(each) and each * BLOCK < image_size(size) for each in value)
        and value == sorted({*value})
    )
