"""A window of a base: some of its bytes, as a base of their own."""

from __future__ import annotations

from collections.abc import Iterator

from cowkit.disk.base import Base
from cowkit.disk.extent import Extent
from cowkit.errors import BaseOpenError, UsageError


class WindowBase(Base):
    """``size`` bytes of ``inner`` from ``offset`` on; it holds ``inner`` and lets go of it when it is closed.

    :param size: up to the end of ``inner``, unless given.
    :param what: the window in words for messages, such as ``"partition 1"``.
    :raises UsageError: the offset or the size is negative.
    :raises BaseOpenError: the window reaches beyond the end of ``inner``. ``inner`` is still the caller's then.
    """

    def __init__(self, inner: Base, offset: int, size: int | None, what: str) -> None:
        super().__init__()
        if offset < 0 or (size is not None and size < 0):
            raise UsageError(f"{what} of base {inner.given}: neither an offset nor a size can be negative")
        end = inner.size if size is None else offset + size
        if offset > inner.size or end > inner.size:
            raise BaseOpenError(
                f"{what} of base {inner.given} would reach byte {max(offset, end)}, and the base has only {inner.size}: "
                "give an offset and a size within it"
            )
        self._inner = inner
        self._offset = offset
        self.size = end - offset
        self.path = inner.path
        self.given = inner.given
        self.identity = inner.identity
        self.sparse = inner.sparse
        self.scattered_reads_are_slow = inner.scattered_reads_are_slow
        self.backing_refusal = (
            f"{what} of {inner.given} cannot be a qcow2 backing file, since that is always a whole file or device: copy the "
            "window to a file of its own and name that one (--backing COPY)"
        )

    @property
    def view(self) -> memoryview | None:
        """The window's part of the base's mapping; see :class:`cowkit.disk.source.Source`."""
        whole = self._inner.view
        return None if whole is None else whole[self._offset : self._offset + self.size]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` of the window on.

        :raises BaseError: the base cannot be read.
        """
        self._inner.read_into(buffer, self._offset + offset)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The base's extents within the range, at the window's offsets."""
        for extent in self._inner.extents(self._offset + offset, length):
            yield extent._replace(offset=extent.offset - self._offset)

    def will_need(self, offset: int, length: int) -> None:
        """Pass the hint on."""
        self._inner.will_need(self._offset + offset, length)

    def interrupt(self) -> None:
        """See :meth:`cowkit.disk.base.Base.interrupt`."""
        self._inner.interrupt()

    def verify(self) -> None:
        """See :meth:`cowkit.disk.base.Base.verify`: the whole base is compared, not only the window."""
        self._inner.verify()

    def verify_path(self) -> None:
        """See :meth:`cowkit.disk.base.Base.verify_path`."""
        self._inner.verify_path()

    def _close(self) -> None:
        self._inner.release()
