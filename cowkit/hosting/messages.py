"""What a process and its host say to each other over a channel."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from cowkit.hosting.errors_in_transit import ErrorInTransit
from cowkit.hosting.surroundings import Surroundings


class Request(NamedTuple):
    """A call: what to do, with which disk, and with what. Bytes and descriptors go beside it."""

    operation: str
    disk: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    surroundings: Surroundings | None
    """For what opens or makes files: those of the caller."""
    located: bool
    """Whether the last descriptor is the caller's working directory."""
    reports: bool
    """Whether the caller wants to hear how far it has got."""


class Reply(IntEnum):
    """What a message from the host is; it goes with a value."""

    RESULT = 0
    ERROR = 1
    PROGRESS = 2
    """How far it has got: it waits to be told, by a boolean, whether to go on."""


class Closed(NamedTuple):
    """What is still to be known of a disk that is closed."""

    error: ErrorInTransit | None
    """Why closing it failed: the base changed."""
    overlay_failure: ErrorInTransit | None
    server_errors: list[ErrorInTransit]
    errors_by_server: dict[int, list[ErrorInTransit]]
    last_dirty_bytes: int | None = None
    """How many bytes were dirty, where the host keeps the last state; None where it does not."""
