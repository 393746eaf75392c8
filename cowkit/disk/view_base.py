"""A frozen view of a disk as a base: of another disk, of a server, or of a difference since a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from cowkit.disk.base import Base
from cowkit.disk.checkpoint import FrozenView
from cowkit.disk.extent import Extent, Kind, merged


class ViewBase(Base):
    """What ``view`` shows; it lets go of it when it is closed.

    :param what: the view in words for messages, such as ``"checkpoint 'installed' of disk.img"``.
    """

    sparse = True

    def __init__(self, view: FrozenView, what: str) -> None:
        super().__init__()
        self.shown = view
        self.size = view.size
        self.given = what
        self.scattered_reads_are_slow = view.base.scattered_reads_are_slow
        self.backing_refusal = f"{what} is no file, so no image can stand on it: keep it first, and name that file"

    @property
    def view(self) -> None:
        """None: its bytes lie in several files."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on.

        :raises DiskError: the base or a layer cannot be read.
        """
        self.shown.read_into(buffer, offset)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Data, and as holes what reads as zeroes for sure."""
        return merged(
            each if each.kind is Kind.DATA else each._replace(kind=Kind.HOLE)
            for each in self.shown.extents(offset, length)
        )

    def interrupt(self) -> None:
        """Nothing: the disk that the view is of has a base of its own, and interrupts that."""

    def verify(self) -> None:
        """See :meth:`cowkit.disk.base.Base.verify`, for the base of the disk that the view is of."""
        self.shown.base.verify()

    def verify_path(self) -> None:
        """See :meth:`cowkit.disk.base.Base.verify_path`, for the base of the disk that the view is of."""
        self.shown.base.verify_path()

    def _close(self) -> None:
        self.shown.close()
