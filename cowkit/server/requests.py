"""Carries out requests in a pass of the disk's gate, and makes their replies: whatever the hot loop does not do by itself."""

from __future__ import annotations

import errno

from cowkit.disk import Disk
from cowkit.errors import CowkitError, DiskError
from cowkit.server import wire
from cowkit.server.block_status import MOST_DESCRIPTORS, describe
from cowkit.server.replies import Buffers, Dialect, Simple, Status
from cowkit.server.wire import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
)

MAXIMUM_PAYLOAD = 64 << 20
"""The longest READ or WRITE that is carried out, in bytes; nbdkit's limit."""

_FLAGS_OF = {
    CMD_READ: wire.FLAG_FUA | wire.FLAG_DF,
    CMD_WRITE: wire.FLAG_FUA | wire.FLAG_PAYLOAD_LEN,
    CMD_DISC: 0xFFFF,
    CMD_FLUSH: wire.FLAG_FUA,
    CMD_TRIM: wire.FLAG_FUA,
    CMD_CACHE: wire.FLAG_FUA,
    CMD_WRITE_ZEROES: wire.FLAG_FUA | wire.FLAG_NO_HOLE | wire.FLAG_FAST_ZERO,
    CMD_BLOCK_STATUS: wire.FLAG_FUA | wire.FLAG_REQ_ONE | wire.FLAG_PAYLOAD_LEN,
}
_ENOSPC_BEYOND = frozenset({CMD_WRITE, CMD_WRITE_ZEROES})
_CHANGE_THE_DISK = frozenset({CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES})

FAILURES = (CowkitError, OSError, MemoryError)
"""What carrying out a request may raise, and its reply can tell. Nothing of the connection's is touched meanwhile."""


class RequestError(Exception):
    """A request that is answered with an error."""

    def __init__(self, error: int, message: str) -> None:
        super().__init__(message)
        self.error = error


class Requests:
    """The requests of one connection to ``disk``.

    :param contexts: id and name of each metadata context that was negotiated.
    :param read_only: refuse what would change the disk.
    """

    def __init__(self, disk: Disk, dialect: Dialect, contexts: dict[int, str], *, read_only: bool) -> None:
        self._disk = disk
        self._dialect = dialect
        self._contexts = contexts
        self._read_only = read_only

    def carry_out(
        self, payload: memoryview, flags: int, command: int, cookie: int, offset: int, length: int, out: Buffers
    ) -> None:
        """Carry out one request, whose payload is there, and append its reply."""
        before = len(out)
        try:
            self.check(flags, command, offset, length)
            if command == CMD_BLOCK_STATUS and flags & wire.FLAG_PAYLOAD_LEN:
                self._status_with_payload(payload, flags, cookie, offset, out)
            elif length or command in (CMD_FLUSH, CMD_BLOCK_STATUS):
                self._request(flags, command, cookie, offset, length, payload, out)
            else:
                out.append(self._dialect.done(cookie, offset))
        except RequestError as error:
            out[before:] = [self._dialect.failed(cookie, offset, error.error, str(error))]
        except FAILURES as error:
            out[before:] = [self.failed(cookie, offset, error)]

    def failed(self, cookie: int, offset: int, error: CowkitError | OSError | MemoryError) -> bytes:
        """The reply that tells ``error``."""
        number = errno.EIO
        if isinstance(error, DiskError | OSError):
            number = error.errno or errno.EIO
        elif isinstance(error, MemoryError):
            number = errno.ENOMEM
        return self._dialect.failed(cookie, offset, wire.nbd_error(number), str(error))

    def check(self, flags: int, command: int, offset: int, length: int) -> None:
        """Whether the request makes sense ("Request types").

        :raises RequestError: it does not.
        """
        allowed = _FLAGS_OF.get(command)
        if allowed is None:
            raise RequestError(wire.NbdError.EINVAL, f"there is no command {command}")
        if not self._dialect.extended:
            allowed &= ~wire.FLAG_PAYLOAD_LEN
        if not self._dialect.structured:
            allowed &= ~wire.FLAG_DF
        if flags & ~allowed:
            raise RequestError(
                wire.NbdError.EINVAL, f"command {command} does not take the flags {flags & ~allowed:#x} here"
            )
        if command == CMD_FLUSH:
            return
        if self._read_only and command in _CHANGE_THE_DISK:
            raise RequestError(wire.NbdError.EPERM, "the export is read-only")
        if command in (CMD_READ, CMD_WRITE) and length > MAXIMUM_PAYLOAD:
            raise RequestError(
                wire.NbdError.EINVAL, f"{length} bytes are more than one request may carry, {MAXIMUM_PAYLOAD}"
            )
        if command == CMD_BLOCK_STATUS and flags & wire.FLAG_PAYLOAD_LEN:
            return
        if offset + length > self._disk.size:
            code = wire.NbdError.ENOSPC if command in _ENOSPC_BEYOND else wire.NbdError.EINVAL
            raise RequestError(
                code, f"{length} bytes at offset {offset} are beyond the end of the disk, {self._disk.size}"
            )

    def _request(
        self, flags: int, command: int, cookie: int, offset: int, length: int, payload: memoryview, out: Buffers
    ) -> None:
        overlay, dialect = self._disk.overlay, self._dialect
        if command == CMD_READ:
            self._read(flags, cookie, offset, length, out)
            return
        if command == CMD_BLOCK_STATUS:
            out.extend(self._status(self._contexts, flags, cookie, offset, length))
            return
        if command == CMD_WRITE:
            overlay.write(payload, offset)
        elif command in (CMD_TRIM, CMD_WRITE_ZEROES):
            # Also with FAST_ZERO: at most the two blocks at the ends are written, the rest changes owners.
            overlay.zero(offset, length)
        elif command == CMD_CACHE:
            overlay.cache(offset, length)
        elif self._disk.trace is not None:
            self._disk.trace.note("flush")
        # FLUSH, and FUA on any command: what is acknowledged is in the overlay already, for every connection to see, and
        # the overlay has no life beyond the server's.
        out.append(dialect.done(cookie, offset))

    def _read(self, flags: int, cookie: int, offset: int, length: int, out: Buffers) -> None:
        segments = list(self._disk.overlay.segments(offset, offset + length))
        if not flags & wire.FLAG_DF:
            self._dialect.read(cookie, offset, segments, out)
            return
        parts: Buffers = []
        Simple().read(cookie, offset, segments, parts)
        out.append(self._dialect.data_head(cookie, offset, length))
        out.extend(parts[1:])

    def _status(self, contexts: dict[int, str], flags: int, cookie: int, offset: int, length: int) -> Buffers:
        if not contexts:
            raise RequestError(wire.NbdError.EINVAL, "no metadata context was negotiated, or none is named")
        if not length:
            raise RequestError(wire.NbdError.EINVAL, "a block status of no bytes has no answer")
        most = 1 if flags & wire.FLAG_REQ_ONE else MOST_DESCRIPTORS // len(contexts) or 1
        statuses: list[Status] = [
            (number, describe(self._disk, name, offset, length, most)) for number, name in contexts.items()
        ]
        out: Buffers = []
        self._dialect.status(cookie, offset, statuses, out)
        return out

    def _status_with_payload(self, payload: memoryview, flags: int, cookie: int, offset: int, out: Buffers) -> None:
        """BLOCK_STATUS that names the contexts it is about (branch extension-ext-header, "NBD_CMD_BLOCK_STATUS")."""
        count, odd = divmod(len(payload) - wire.STATUS_PAYLOAD.size, wire.META_CONTEXT_ID.size)
        if count < 0 or odd:
            raise RequestError(
                wire.NbdError.EINVAL, f"a payload of {len(payload)} bytes is not 8 and 4 for each context"
            )
        (length,) = wire.STATUS_PAYLOAD.unpack_from(payload)
        chosen: dict[int, str] = {}
        for index in range(count):
            (number,) = wire.META_CONTEXT_ID.unpack_from(
                payload, wire.STATUS_PAYLOAD.size + index * wire.META_CONTEXT_ID.size
            )
            if number not in self._contexts or number in chosen:
                raise RequestError(
                    wire.NbdError.EINVAL, f"metadata context {number} was not negotiated, or is named twice"
                )
            chosen[number] = self._contexts[number]
        self.check(flags & ~wire.FLAG_PAYLOAD_LEN, CMD_BLOCK_STATUS, offset, length)
        out.extend(self._status(chosen, flags, cookie, offset, length))
