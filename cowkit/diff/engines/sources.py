"""Where QEMU's programs find the two states that a difference is of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Readable(NamedTuple):
    """A state of a disk that qemu-img can open."""

    filename: str
    """An absolute path, or an NBD URI."""
    format: str
    """As QEMU names it."""


class Sources(NamedTuple):
    """Both states, and a place for what the programs need meanwhile."""

    now: str | None
    """The NBD URI of the state now; None where the engine is fed."""
    before: Readable | None
    """The state before; None: zeroes."""
    socket_before: str | None
    """The path of the Unix socket where the state before is served; None where it is zeroes, or not served."""
    directory: str
    """A private directory (mode 0700), which somebody removes with the files in it."""
    bytes_served: Callable[[], int]
    """How much of the two states the programs have read through cowkit, in bytes."""
