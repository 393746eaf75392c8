"""ctrl-C and requests to end: raised as `KeyboardInterrupt`, and held back while something is begun or ended that must be whole."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _State:
    held = 0
    pending: int | None = None


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within the block each of the signals raises ``KeyboardInterrupt(number)``. For the main thread."""
    before = {number: signal.signal(number, _handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.held:
        _State.pending = number
    else:
        raise KeyboardInterrupt(number)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal that comes within the block is raised at its end. Masks would not do: children inherit them."""
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
        pending = _State.pending
        if pending is not None and not _State.held:
            _State.pending = None
            raise KeyboardInterrupt(pending)
