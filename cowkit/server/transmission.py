"""The transmission phase of one connection: requests in, replies out, in batches.

The way of a request: whatever the client has sent is received into one large buffer; every whole request in it is carried
out, inside one pass of the disk's gate; all the replies leave in one gathered send. The data of a READ are not copied: the
send is given views of the base's and the layers' mappings, which the kernel reads. A WRITE's data go from the buffer to
the layer's file; a long one's that follows another goes there through a pipe (:mod:`cowkit.server.piped_writes`).

The gate is never held while waiting for the client, so a client that stalls holds up nobody. Only :meth:`Transmission.run`
is hot; what is rare or wrong is for :mod:`cowkit.server.requests`, and for :mod:`cowkit.server.sending`.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
from socket import MSG_DONTWAIT, MSG_WAITALL

from cowkit.disk import Disk, ZeroBase
from cowkit.disk.base import FileBase
from cowkit.disk.gate import Pass
from cowkit.disk.owner_map import CHUNK_MASK, CHUNK_SHIFT, NO_LAYER
from cowkit.errors import ProtocolError
from cowkit.server import wire
from cowkit.server.channel import Channel
from cowkit.server.gathering import Gathering
from cowkit.server.piped_writes import LONG, PipedWrites
from cowkit.server.pool import Need, Steps, drive
from cowkit.server.replies import Buffers, Dialect, Extended, Simple, Structured
from cowkit.server.requests import FAILURES, MAXIMUM_PAYLOAD, RequestError, Requests
from cowkit.server.sending import IOV_MAX, Sender, make_room, unsent
from cowkit.server.wire import (
    CMD_DISC,
    CMD_READ,
    CMD_WRITE,
)

_BUFFER = 2 << 20

_FEW = 4
_DEEP = 64
"""A client that had more than ``_FEW`` buffers of replies at once, within so many batches, has many requests under way: it is still
at the last replies, and the longer the next batch takes to begin, the more it holds. Others wait for us."""

_HARDLY_ANY = 4
"""Requests that are worth waiting for others, while the client has enough to do."""
_SHORT = 4096
"""Where a batch had no more bytes for each buffer, its replies were short: the client's time went into reading each, not into copying."""

_MOST_BUFFERS = 512
_MOST_BYTES = 4 << 20
"""What may gather up before it is sent. Some data of READs have to be copied; a buffer full of such READs must not fill the memory."""

_LONGEST_DRAIN = 1 << 32


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
        self._dialect: Dialect = Extended() if extended else Structured() if structured else Simple()
        self._writable = -1 if read_only else disk.size  # where the quick ways of a WRITE end
        self._write_flags = wire.FLAG_FUA | wire.FLAG_PAYLOAD_LEN if extended else wire.FLAG_FUA
        self._requests = Requests(disk, self._dialect, dict(contexts), read_only=read_only)
        self._sender = Sender(sock, self._dialect)
        self._piped_writes: PipedWrites | None = None
        if isinstance(sock, socket.socket):
            make_room(sock)
            self._piped_writes = PipedWrites(
                sock, disk, self._dialect, self._requests, writable=self._writable, flags=self._write_flags
            )
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
            if self._piped_writes is not None:
                self._piped_writes.close()

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
        writable, other_flags = self._writable, ~self._write_flags
        pwrite, quick_writes = os.pwrite, self._disk.trace is None
        gate, lock = self._disk.gate, gate_pass.lock
        receive_into, sendmsg = self._sock.recv_into, self._sock.sendmsg
        start, end = 0, self._received  # what was received and not dealt with
        wanted = head
        ended = False
        bytes_needed, soon, next_one = (
            Need.BYTES,
            Need.SOON,
            Need.NEXT,
        )  # looking up an enumeration's member takes 0.1 microseconds
        need = bytes_needed
        deep = 0
        short = False  # whether the last replies were
        gathering, hardly_any = Gathering(self._sock), _HARDLY_ANY * head
        piped_writes = self._piped_writes
        after_long = False  # whether long requests came last: then the next one's head is received by itself
        pooled: bool | None = None  # whether this is another connection's thread, which must not wait for our client
        while not ended:
            if wanted > LONG and end == start + head and piped_writes and piped_writes.usable:
                view[:head] = view[start:end]
                start, end = 0, head
                if piped_writes.takes(view):
                    end = yield from piped_writes.carry_out(gate_pass, view)
                    wanted = head
                    after_long = True
            while end - start < wanted <= _BUFFER:
                if start == end:
                    start = end = 0
                elif start + wanted > _BUFFER:
                    view[: end - start] = view[start:end]
                    start, end = 0, end - start
                pooled = yield need
                # Of a long payload no more than its end: what came behind it would have to be moved to make room.
                count = receive_into(view[end : start + wanted if wanted > LONG or after_long else _BUFFER])
                if not count:
                    return
                end += count
            if deep and short and end - start < hardly_any and wanted == head and not pooled and gathering.nap():
                try:
                    end += receive_into(view[end:], 0, MSG_DONTWAIT)
                except OSError:
                    pass  # nothing came; or the client has gone, as the next receive will find
            wanted = head
            begun = start
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
                top = overlay.top if quick_writes else NO_LAYER
                fd = overlay.layers[top].fd if top != NO_LAYER else -1
                while end - start >= head:
                    magic, flags, command, cookie, offset, length = unpack(buffer, start)
                    if magic != magic_wanted:
                        if out:
                            break  # what came before has its replies first
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
                            # Overlay.write for what is written again, in the same way: it saves 0.8 of 2.4 microseconds.
                            first = offset >> shift
                            more = ((offset + length - 1) >> shift) - first
                            chunk = chunks[first >> CHUNK_SHIFT]
                            first &= CHUNK_MASK
                            data = view[start + head : after]
                            count = 0
                            if chunk[first] == top and (not more or chunk.count(top, first, first + more + 1) > more):
                                try:
                                    count = pwrite(fd, data, offset)
                                except OSError:
                                    pass  # once more, by who can say what is wrong
                            try:
                                if count != length:
                                    write(data, offset)
                                reply = done(cookie, offset)
                            except FAILURES as error:
                                reply = self._requests.failed(cookie, offset, error)
                            append(reply)
                            gathered += len(reply)
                            start = after
                            continue
                    if flags & wire.FLAG_PAYLOAD_LEN and dialect.extended and start + head + length > end:
                        wanted = head + length
                        break
                    if command == CMD_DISC:
                        ended = True
                        break
                    before = len(out)
                    body = start + head
                    has_payload = command == CMD_WRITE or (dialect.extended and flags & wire.FLAG_PAYLOAD_LEN)
                    start = body + length if has_payload else body
                    self._requests.carry_out(view[body:start], flags, command, cookie, offset, length, out)
                    gathered += sum(map(len, out[before:]))
                    if len(out) >= _MOST_BUFFERS or gathered >= _MOST_BYTES:
                        break
            after_long = start - begun > len(out) * LONG and piped_writes is not None and piped_writes.usable
            if len(out) > _FEW:
                deep = _DEEP
            elif deep:
                deep -= 1
            if deep:
                need = bytes_needed
            elif out and start == end and not after_long and start - begun == head + (command == CMD_WRITE and length):
                need = next_one
            else:
                need = soon
            short = gathered <= len(out) * _SHORT
            if out:
                try:
                    batch = out if len(out) <= IOV_MAX else out[:IOV_MAX]
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
                    self._sender.send(unsent(out, sent))
            if wanted > _BUFFER:
                pooled = yield Need.THREAD
                self._long_request(gate_pass, start, end)
                start = end
                wanted = head

    # What is long

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
            self._requests.check(flags, command, offset, length)
            if command != CMD_WRITE:
                raise RequestError(
                    wire.NbdError.EINVAL, f"{length} bytes are more payload than any command {command} has a use for"
                )
        except RequestError as error:
            self._drain(length - len(arrived))
            out.append(self._dialect.failed(cookie, offset, error.error, str(error)))
        else:
            if len(self._long) < length:
                self._long = memoryview(_anonymous_memory(length))
            payload = self._long[:length]
            payload[: len(arrived)] = arrived
            self._receive_all(payload[len(arrived) :])
            with gate_pass:
                self._requests.carry_out(payload, flags, command, cookie, offset, length, out)
        self._sender.send(out)

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


def _anonymous_memory(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
