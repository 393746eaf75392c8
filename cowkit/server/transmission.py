"""The transmission phase of one connection: requests in, replies out, in batches.

The way of a request: whatever the client has sent is received into one large buffer; every whole request in it is carried
out, inside one pass of the disk's gate; all the replies leave in one gathered send. The data of a READ are not copied: the
send is given views of the base's and the layers' mappings, which the kernel reads. A WRITE's data go from the buffer to
the layer's file.

The gate is never held while waiting for the client, so a client that stalls holds up nobody. Only :meth:`Transmission.run`
is hot; whatever is rare, wrong or long is carried out by the methods behind it.
"""

from __future__ import annotations

import errno
import mmap
import os
from socket import MSG_DONTWAIT, MSG_WAITALL

from cowkit.disk import Disk, ZeroBase
from cowkit.disk.base import FileBase
from cowkit.disk.gate import Pass
from cowkit.disk.owner_map import CHUNK_MASK, CHUNK_SHIFT
from cowkit.errors import CowkitError, DiskError, ProtocolError
from cowkit.server import wire
from cowkit.server.block_status import MOST_DESCRIPTORS, describe
from cowkit.server.channel import Channel
from cowkit.server.pool import Need, Steps, drive
from cowkit.server.replies import Buffers, Dialect, Extended, Simple, Status, Structured
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

_BUFFER = 2 << 20

_LONG = 128 << 10
"""Bytes of a request with its payload from which on it is received by itself."""

_FEW = 4
_DEEP = 64
"""A client that had more than ``_FEW`` buffers of replies at once, within so many batches, has many requests under way: it is still
at the last replies, and the longer the next batch takes to begin, the more it holds. Others wait for us."""

_MOST_BUFFERS = 512
_MOST_BYTES = 4 << 20
"""What may gather up before it is sent. Some data of READs have to be copied; a buffer full of such READs must not fill the memory."""

_LONGEST_DRAIN = 1 << 32
_IOV_MAX = 1024  # Linux, UIO_MAXIOV

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

_FAILURES = (CowkitError, OSError, MemoryError)
"""What carrying out a request may raise, and its reply can tell. Nothing of the connection's is touched meanwhile."""


class _RequestError(Exception):
    """A request that is answered with an error."""

    def __init__(self, error: int, message: str) -> None:
        super().__init__(message)
        self.error = error


class Transmission:
    """Serves ``disk`` to the client at the other end of ``sock``, until it disconnects.

    :param read_only: refuse what would change the disk.
    :param contexts: what was negotiated: id and name of each metadata context.
    :param received: what the client sent behind its last negotiated option.
    """

    def __init__(
        self,
        sock: Channel,
        disk: Disk,
        *,
        structured: bool,
        extended: bool,
        contexts: tuple[tuple[int, str], ...],
        received: bytes,
        read_only: bool = False,
    ) -> None:
        self._sock = sock
        self._disk = disk
        self._read_only = read_only
        self._dialect: Dialect = Extended() if extended else Structured() if structured else Simple()
        self._contexts = dict(contexts)
        # Anonymous memory takes room only where it is touched: a client that sends small requests costs a page or two.
        self._buffer = _anonymous_memory(_BUFFER)
        self._long = memoryview(b"")
        self._view = memoryview(self._buffer)
        self._received = len(received)
        self._view[: self._received] = received

    def run(self) -> None:
        """Serve until the client disconnects.

        :raises ProtocolError: the client broke the protocol in a way that cannot be answered.
        :raises OSError: the connection broke.
        """
        gate_pass = self._disk.gate.new_pass()
        try:
            # A base behind a program or another server may keep a read waiting for long, even for a client of this process.
            quick = isinstance(self._disk.base, FileBase | ZeroBase)
            drive(self._steps(gate_pass), self._sock, may_join=quick)
        finally:
            self._disk.gate.discard(gate_pass)

    def _steps(self, gate_pass: Pass) -> Steps:
        """Carry out what has come, and yield what is needed to go on."""
        buffer, view, dialect = self._buffer, self._view, self._dialect
        head = dialect.request.size
        unpack = dialect.request.unpack_from
        magic_wanted, data_head, done = dialect.magic, dialect.data_head, dialect.done
        size = self._disk.size
        overlay = self._disk.overlay
        write, shift, sparse_from = overlay.write, overlay.shift, overlay.look_from
        longest, data_head_size = MAXIMUM_PAYLOAD, len(data_head(0, 0, 0))
        readable = -1 if overlay.cow_on_read else size  # where the quick way of a READ ends
        other_flags = ~(wire.FLAG_FUA | wire.FLAG_PAYLOAD_LEN if dialect.extended else wire.FLAG_FUA)
        writable = -1 if self._read_only else size  # where the quick way of a WRITE ends
        gate, lock = self._disk.gate, gate_pass.lock
        receive_into, sendmsg = self._sock.recv_into, self._sock.sendmsg
        start, end = 0, self._received  # what was received and not dealt with
        wanted = head
        ended = False
        need = Need.BYTES
        deep = 0
        pooled: bool | None = None  # whether this is another connection's thread, which must not wait for our client
        while not ended:
            while end - start < wanted <= _BUFFER:
                if start == end:
                    start = end = 0
                elif start + wanted > _BUFFER:
                    view[: end - start] = view[start:end]
                    start, end = 0, end - start
                pooled = yield need
                # Of a long payload no more than its end: what came behind it would have to be moved to make room.
                count = receive_into(view[end : start + wanted if wanted > _LONG else _BUFFER])
                if not count:
                    return
                end += count
            wanted = head
            out: Buffers = []
            gathered = 0
            append = out.append
            if gate.closed:
                if pooled:
                    pooled = yield Need.THREAD
                gate.wait_until_open()
            with lock:  # of the pass, without the steps of Pass.__enter__
                if gate.closed:
                    continue
                chunks, views = overlay.map.chunks, overlay.views
                while end - start >= head:
                    magic, flags, command, cookie, offset, length = unpack(buffer, start)
                    if magic != magic_wanted:
                        raise ProtocolError(
                            f"a request begins with {magic:#x} instead of {magic_wanted:#x}: the client is out of step"
                        )
                    if command == CMD_READ:
                        # Overlay.segments for what is nearly always the case: one owner, whose bytes are mapped. Written out
                        # here, it saves 0.4 of 1.4 microseconds.
                        stop = offset + length
                        if not flags and offset < stop <= readable and length <= longest:
                            first = offset >> shift
                            more = ((stop - 1) >> shift) - first
                            chunk = chunks[first >> CHUNK_SHIFT]
                            first &= CHUNK_MASK
                            owner = chunk[first]
                            if not more or (
                                chunk.count(owner, first, first + more + 1) > more and length < sparse_from
                            ):
                                data = views[owner]
                                if data is not None:
                                    append(data_head(cookie, offset, length))
                                    append(data[offset:stop])
                                    gathered += data_head_size + length
                                    start += head
                                    if len(out) >= _MOST_BUFFERS:
                                        break
                                    continue
                    elif command == CMD_WRITE:
                        after = start + head + length
                        if after > end:
                            wanted = head + length
                            break
                        if not flags & other_flags and length > 0 and offset + length <= writable:
                            try:
                                write(view[start + head : after], offset)
                                reply = done(cookie, offset)
                            except _FAILURES as error:
                                reply = self._failed(cookie, offset, error)
                            append(reply)
                            gathered += len(reply)
                            start = after
                            continue
                    elif flags & wire.FLAG_PAYLOAD_LEN and dialect.extended and start + head + length > end:
                        wanted = head + length
                        break
                    elif command == CMD_DISC:
                        ended = True
                        break
                    before = len(out)
                    body = start + head
                    has_payload = command == CMD_WRITE or (dialect.extended and flags & wire.FLAG_PAYLOAD_LEN)
                    start = body + length if has_payload else body
                    self._carry_out(view[body:start], flags, command, cookie, offset, length, out)
                    gathered += sum(map(len, out[before:]))
                    if len(out) >= _MOST_BUFFERS or gathered >= _MOST_BYTES:
                        break
            if len(out) > _FEW:
                deep = _DEEP
            elif deep:
                deep -= 1
            need = Need.BYTES if deep else Need.SOON
            if out:
                try:
                    batch = out if len(out) <= _IOV_MAX else out[:_IOV_MAX]
                    sent = sendmsg(batch, (), MSG_DONTWAIT) if pooled else sendmsg(batch)  # type: ignore[call-arg]  # a socket
                except BlockingIOError:
                    sent = 0
                except OSError as error:
                    if error.errno != errno.EFAULT:
                        raise
                    sent = 0
                if sent != gathered:
                    if pooled:
                        pooled = yield Need.THREAD
                    self._send(_unsent(out, sent))
            if wanted > _BUFFER:
                pooled = yield Need.THREAD
                self._long_request(gate_pass, start, end)
                start = end
                wanted = head

    # What is rare, wrong or long

    def _carry_out(
        self, payload: memoryview, flags: int, command: int, cookie: int, offset: int, length: int, out: Buffers
    ) -> None:
        """Carry out one request, whose payload is there, and append its reply."""
        before = len(out)
        try:
            self._check(flags, command, offset, length)
            if command == CMD_BLOCK_STATUS and flags & wire.FLAG_PAYLOAD_LEN:
                self._status_with_payload(payload, flags, cookie, offset, out)
            elif length or command in (CMD_FLUSH, CMD_BLOCK_STATUS):
                self._request(flags, command, cookie, offset, length, payload, out)
            else:
                out.append(self._dialect.done(cookie, offset))
        except _RequestError as error:
            out[before:] = [self._dialect.failed(cookie, offset, error.error, str(error))]
        except _FAILURES as error:
            out[before:] = [self._failed(cookie, offset, error)]

    def _failed(self, cookie: int, offset: int, error: CowkitError | OSError | MemoryError) -> bytes:
        """The reply that tells ``error``."""
        number = errno.EIO
        if isinstance(error, DiskError | OSError):
            number = error.errno or errno.EIO
        elif isinstance(error, MemoryError):
            number = errno.ENOMEM
        return self._dialect.failed(cookie, offset, wire.nbd_error(number), str(error))

    def _check(self, flags: int, command: int, offset: int, length: int) -> None:
        """Whether the request makes sense ("Request types").

        :raises _RequestError: it does not.
        """
        allowed = _FLAGS_OF.get(command)
        if allowed is None:
            raise _RequestError(wire.NbdError.EINVAL, f"there is no command {command}")
        if not self._dialect.extended:
            allowed &= ~wire.FLAG_PAYLOAD_LEN
        if not self._dialect.structured:
            allowed &= ~wire.FLAG_DF
        if flags & ~allowed:
            raise _RequestError(
                wire.NbdError.EINVAL, f"command {command} does not take the flags {flags & ~allowed:#x} here"
            )
        if command == CMD_FLUSH:
            return
        if self._read_only and command in _CHANGE_THE_DISK:
            raise _RequestError(wire.NbdError.EPERM, "the export is read-only")
        if command in (CMD_READ, CMD_WRITE) and length > MAXIMUM_PAYLOAD:
            raise _RequestError(
                wire.NbdError.EINVAL, f"{length} bytes are more than one request may carry, {MAXIMUM_PAYLOAD}"
            )
        if command == CMD_BLOCK_STATUS and flags & wire.FLAG_PAYLOAD_LEN:
            return
        if offset + length > self._disk.size:
            code = wire.NbdError.ENOSPC if command in _ENOSPC_BEYOND else wire.NbdError.EINVAL
            raise _RequestError(
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
            raise _RequestError(wire.NbdError.EINVAL, "no metadata context was negotiated, or none is named")
        if not length:
            raise _RequestError(wire.NbdError.EINVAL, "a block status of no bytes has no answer")
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
            raise _RequestError(
                wire.NbdError.EINVAL, f"a payload of {len(payload)} bytes is not 8 and 4 for each context"
            )
        (length,) = wire.STATUS_PAYLOAD.unpack_from(payload)
        chosen: dict[int, str] = {}
        for index in range(count):
            (number,) = wire.META_CONTEXT_ID.unpack_from(
                payload, wire.STATUS_PAYLOAD.size + index * wire.META_CONTEXT_ID.size
            )
            if number not in self._contexts or number in chosen:
                raise _RequestError(
                    wire.NbdError.EINVAL, f"metadata context {number} was not negotiated, or is named twice"
                )
            chosen[number] = self._contexts[number]
        self._check(flags & ~wire.FLAG_PAYLOAD_LEN, CMD_BLOCK_STATUS, offset, length)
        out.extend(self._status(chosen, flags, cookie, offset, length))

    def _long_request(self, gate_pass: Pass, start: int, end: int) -> None:
        """A request whose payload does not fit the buffer, and begins at ``start`` of it: receive it whole, or drain it.

        Whole, because it must be wholly before or after a checkpoint, and fail wholly where there is no room. Writing the
        parts as they come would need the gate held while waiting for the client.
        """
        head = self._dialect.request.size
        _, flags, command, cookie, offset, length = self._dialect.request.unpack_from(self._buffer, start)
        if length > _LONGEST_DRAIN:
            raise ProtocolError(
                f"a request announces a payload of {length} bytes: more than is worth receiving to refuse it"
            )
        arrived = self._view[start + head : end]
        out: Buffers = []
        try:
            self._check(flags, command, offset, length)
            if command != CMD_WRITE:
                raise _RequestError(
                    wire.NbdError.EINVAL, f"{length} bytes are more payload than any command {command} has a use for"
                )
        except _RequestError as error:
            self._drain(length - len(arrived))
            out.append(self._dialect.failed(cookie, offset, error.error, str(error)))
        else:
            if len(self._long) < length:
                self._long = memoryview(_anonymous_memory(length))
            payload = self._long[:length]
            payload[: len(arrived)] = arrived
            self._receive_all(payload[len(arrived) :])
            with gate_pass:
                self._carry_out(payload, flags, command, cookie, offset, length, out)
        self._send(out)

    def _drain(self, length: int) -> None:
        while length:
            part = self._view[: min(length, _BUFFER)]
            self._receive_all(part)
            length -= len(part)

    def _receive_all(self, into: memoryview) -> None:
        while into:
            count = self._sock.recv_into(into, 0, MSG_WAITALL)
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "the client left in the middle of a request")
            into = into[count:]

    # Sending

    def _send(self, out: Buffers) -> None:
        try:
            while out:
                out = _unsent(out, self._sock.sendmsg(out[:_IOV_MAX]))
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            self._send_carefully(out)

    def _send_carefully(self, out: Buffers) -> None:
        """A mapping cannot be read, since its file was cut short or its disk fails: answer those READs with an error.

        A head is ``bytes``, the data behind it are views. What is left begins with a head, unless sending stopped within the
        data of a reply, whose head has promised all of them: then only ending the connection is left. In place of a chunk of
        several comes the error, which is the reply's last chunk: those that were to follow it are left out.
        """
        if not isinstance(out[0], bytes):
            raise self._unreadable()
        spare = os.memfd_create("cowkit-unreadable")
        try:
            index = 0
            while index < len(out):
                stop = index + 1
                while stop < len(out) and not isinstance(out[stop], bytes):
                    stop += 1
                reply = out[index:stop]
                if all(_readable(part, spare) for part in reply[1:]):
                    self._send_all(b"".join(reply[:1]), reply[1:])
                else:
                    self._send_all(self._refusal(reply[0]), [])
                    while not self._ends_reply(out[index]):
                        index, stop = stop, stop + 1
                        while stop < len(out) and not isinstance(out[stop], bytes):
                            stop += 1
                index = stop
        finally:
            os.close(spare)

    def _refusal(self, head: bytes | memoryview) -> bytes:
        if isinstance(self._dialect, Extended):
            _, _, _, cookie, offset, _ = wire.EXTENDED_REPLY.unpack_from(head)
        elif isinstance(self._dialect, Structured):
            _, _, _, cookie, _ = wire.STRUCTURED_REPLY.unpack_from(head)
            offset = 0
        else:
            _, _, cookie = wire.SIMPLE_REPLY.unpack_from(head)
            offset = 0
        return self._dialect.failed(
            cookie, offset, wire.NbdError.EIO, "the base or the overlay cannot be read any more"
        )

    def _ends_reply(self, head: bytes | memoryview) -> bool:
        """Whether this head is that of a reply's last or only chunk."""
        if not self._dialect.structured:
            return True
        _, flags, *_ = wire.STRUCTURED_REPLY.unpack_from(head)  # the beginning is that of an extended head, too
        return bool(flags & wire.REPLY_FLAG_DONE)

    def _send_all(self, head: bytes, parts: Buffers) -> None:
        try:
            self._sock.sendall(head)
            for part in parts:
                self._sock.sendall(part)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            raise self._unreadable() from error  # it was readable a moment ago, and its head is on its way

    @staticmethod
    def _unreadable() -> ConnectionAbortedError:
        return ConnectionAbortedError(errno.ECONNABORTED, "the base or the overlay cannot be read any more")


def _unsent(out: Buffers, sent: int) -> Buffers:
    """What is left of ``out`` when its first ``sent`` bytes have gone."""
    for index, part in enumerate(out):
        if sent < len(part):
            return [memoryview(part)[sent:], *out[index + 1 :]] if sent else out[index:]
        sent -= len(part)
    return []


def _anonymous_memory(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _readable(part: bytes | memoryview, spare: int) -> bool:
    """Have the kernel copy it elsewhere: that fails where Python's touching it would end the process."""
    try:
        done = 0
        while done < len(part):
            done += os.pwrite(spare, memoryview(part)[done:], 0)
    except OSError:
        return False
    return True
