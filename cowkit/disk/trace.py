"""The last things that were done to a disk: what led to the state that it is in."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cowkit.disk.overlay import Overlay
    from cowkit.disk.piped import Piped

MOST_EVENTS = 1_000_000


class TraceEvent(NamedTuple):
    """Something that was done, or tried."""

    seconds: float
    """When it began, since the disk was opened."""
    what: str
    """``"write"``, ``"zero"`` (trimming is the same here), ``"flush"``, ``"checkpoint"``, ``"rollback"`` or ``"reset"``."""
    offset: int = 0
    """In bytes; of a write or zeroing."""
    length: int = 0
    name: str | None = None
    """The checkpoint's."""

    def __str__(self) -> str:
        what = f"{self.seconds:12.6f} {self.what}"
        if self.what in ("write", "zero"):
            what += f" {self.offset}+{self.length}"
        return what if self.name is None else f"{what} {self.name}"


class Trace:
    """The last ``most`` events of a disk, from any thread."""

    def __init__(self, most: int) -> None:
        self._begun = time.monotonic()
        self._events: deque[tuple[float, str, int, int, str | None]] = deque(maxlen=most)

    def note(self, what: str, name: str | None = None) -> None:
        """Take down what is no write."""
        self._events.append((time.monotonic(), what, 0, 0, name))

    def events(self) -> list[TraceEvent]:
        """All of them, the oldest first."""
        copied = self._events.copy()  # one call, so that nobody adds any meanwhile
        return [TraceEvent(when - self._begun, *rest) for when, *rest in copied]  # type: ignore[arg-type]

    def watch(self, overlay: Overlay) -> None:
        """Take down what ``overlay`` is asked to write and to zero.

        Its methods are replaced, since a connection looks them up once: a disk without a trace then pays nothing for it, where
        asking for each request whether there is one would cost each of them.
        """
        write, write_piped, zero = overlay.write, overlay.write_piped, overlay.zero
        append, now = self._events.append, time.monotonic

        def traced_write(data: memoryview, offset: int) -> None:
            append((now(), "write", offset, len(data), None))
            write(data, offset)

        def traced_write_piped(piped: Piped, offset: int) -> None:
            append((now(), "write", offset, piped.left, None))
            write_piped(piped, offset)

        def traced_zero(offset: int, length: int) -> None:
            append((now(), "zero", offset, length, None))
            zero(offset, length)

        overlay.write = traced_write  # type: ignore[method-assign]
        overlay.write_piped = traced_write_piped  # type: ignore[method-assign]
        overlay.zero = traced_zero  # type: ignore[method-assign]

    def leave(self, overlay: Overlay) -> None:
        """Give ``overlay`` its own methods back, which would otherwise keep it alive."""
        overlay.__dict__.pop("write", None)
        overlay.__dict__.pop("write_piped", None)
        overlay.__dict__.pop("zero", None)
