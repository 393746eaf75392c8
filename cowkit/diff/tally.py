"""What is counted while a difference is looked for."""

from __future__ import annotations

from cowkit.disk.extent import Extent, Kind


class Tally:
    """What was counted on the way, in bytes and extents."""

    def __init__(self) -> None:
        self.dirty_bytes = 0
        self.dirty_extents = 0
        self.bytes_read = 0
        self.changed: list[Extent] = []
        self._offset = self._end = 0
        self._kind = Kind.DATA

    def mark(self, offset: int, length: int, kind: Kind) -> None:
        """Note that a range is changed; ranges come in order."""
        if offset == self._end and kind is self._kind:
            self._end += length
            return
        if self._end > self._offset:
            self.changed.append(Extent(self._offset, self._end - self._offset, self._kind))
        self._offset, self._end, self._kind = offset, offset + length, kind

    def finish(self) -> None:
        """Put down the range at hand."""
        if self._end > self._offset:
            self.changed.append(Extent(self._offset, self._end - self._offset, self._kind))
        self._offset = self._end
