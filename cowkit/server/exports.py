"""What a server offers to its clients: pure data, looked up by name.

A client may list exports, ask for details of any of them, and leave; the server must not have opened, created or
allocated anything for it by then (nbdkit let clients do that: CVE-2019-14850, CVE-2019-14851). So negotiation sees an
:class:`Export`, which only *describes* a disk, and whoever serves the disk (shares.py) opens what it needs, once
the client has chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from cowkit.disk.sizes import LARGEST_DISK
from cowkit.errors import UsageError
from cowkit.server.wire import (
    DEFAULT_MAXIMUM_PAYLOAD,
    DEFAULT_PREFERRED_BLOCK,
    MAX_MINIMUM_BLOCK,
    MAX_STRING,
    TransmissionFlag,
)

NO_FLAGS: Final = TransmissionFlag(0)

NEGOTIATED_FLAGS: Final = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STATUS_PAYLOAD
"""The transmission flags that negotiation adds itself: they depend on what the client negotiated, not on the export."""


class Export:
    """One disk that a server offers.

    Not a dataclass: importing those takes 9 ms, and `cowkit serve` is to be ready in 120.

    :param name: the canonical name; UTF-8, at most 4096 bytes, no NUL. ``""`` is a name like any other.
    :param description: for people; as long as a name at most. Empty: there is none.
    :param size: in bytes, 0 to 2**63 - 1.
    :param flags: what the disk can do, without :data:`NEGOTIATED_FLAGS`.
    :param minimum_block: what offsets and lengths must be multiples of: a power of two, 1 to 65536 bytes ("Size
        constraints" in proto.md). Over 1, clients that do not ask for the block sizes are turned away.
    :param preferred_block: what offsets and lengths should be multiples of: a power of two, at least 512 and the minimum
        block, in bytes.
    :param maximum_payload: the longest data of one READ or WRITE: from the preferred block to 2**32 - 1, in bytes.
    :param contexts: the names of the metadata contexts, such as ``"base:allocation"`` or ``"qemu:dirty-bitmap:cow"``, each
        once.
    :raises UsageError: a value that could not go on the wire.
    """

    __slots__ = (
        "contexts",
        "description",
        "flags",
        "maximum_payload",
        "minimum_block",
        "name",
        "preferred_block",
        "size",
    )

    def __init__(
        self,
        *,
        name: str,
        size: int,
        description: str = "",
        flags: TransmissionFlag = NO_FLAGS,
        minimum_block: int = 1,
        preferred_block: int = DEFAULT_PREFERRED_BLOCK,
        maximum_payload: int = DEFAULT_MAXIMUM_PAYLOAD,
        contexts: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.description = description
        self.size = size
        self.flags = flags
        self.minimum_block = minimum_block
        self.preferred_block = preferred_block
        self.maximum_payload = maximum_payload
        self.contexts = contexts
        _check_string(self.name, "the export name")
        _check_string(self.description, "the export's description")
        if not 0 <= self.size <= LARGEST_DISK:
            raise UsageError(f"the export's size {self.size} is out of range: 0 to {LARGEST_DISK} bytes (2**63 - 1)")
        self._check_flags()
        self._check_block_sizes()
        for context in self.contexts:
            _check_string(context, "the metadata context")
            if context.find(":") < 1:
                raise UsageError(f"the metadata context {context!r} has no namespace: name it like 'base:allocation'")
        if len(set(self.contexts)) != len(self.contexts):
            raise UsageError(f"a metadata context is offered twice: {', '.join(self.contexts)}")

    def _check_flags(self) -> None:
        if self.flags & NEGOTIATED_FLAGS:
            raise UsageError(
                f"{self.flags & NEGOTIATED_FLAGS!r} is for negotiation to add: leave it out of the export's flags"
            )
        if self.flags & TransmissionFlag.SEND_FAST_ZERO and not self.flags & TransmissionFlag.SEND_WRITE_ZEROES:
            raise UsageError("SEND_FAST_ZERO says how fast WRITE_ZEROES is: give the export SEND_WRITE_ZEROES, too")

    def _check_block_sizes(self) -> None:
        if not (_is_power_of_two(self.minimum_block) and self.minimum_block <= MAX_MINIMUM_BLOCK):
            raise UsageError(
                f"the minimum block {self.minimum_block} must be a power of two from 1 to {MAX_MINIMUM_BLOCK} bytes"
            )
        smallest = max(self.minimum_block, 512)
        if not (_is_power_of_two(self.preferred_block) and smallest <= self.preferred_block < 2**32):
            raise UsageError(
                f"the preferred block {self.preferred_block} must be a power of two from {smallest} to 2**31 bytes"
            )
        if not self.preferred_block <= self.maximum_payload < 2**32:
            raise UsageError(
                f"the maximum payload {self.maximum_payload} must be from the preferred block,"
                f" {self.preferred_block}, to 2**32 - 1 bytes"
            )


class Exports(Protocol):
    """The exports of a server, as negotiation asks for them.

    Both methods are called for clients that may be nobody: they must be cheap and open nothing.
    """

    def list(self) -> Sequence[tuple[str, str]]:
        """Name and description of each export, for clients that ask what there is."""
        ...

    def find(self, name: str) -> Export | None:
        """The export called ``name``, or None. ``""`` asks for the default export ("Option types" in proto.md)."""
        ...


def _check_string(text: str, what: str) -> None:
    try:
        length = len(text.encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} {text[:80]!r} cannot be written as UTF-8, which NBD wants: change it") from error
    if length > MAX_STRING:
        raise UsageError(f"{what} {text[:80]!r}... has {length} bytes: NBD allows {MAX_STRING}")
    if "\0" in text:
        raise UsageError(f"{what} {text[:80]!r} contains a NUL, which NBD forbids: change it")


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
