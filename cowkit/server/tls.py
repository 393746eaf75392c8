"""TLS: which credentials the server has, and a channel over which everything is encrypted.

Design note. The TLS engine is fed through memory (``ssl.MemoryBIO``) and never sees the connection itself. So waiting,
deadlines and :meth:`NbdServer.stop` work as without TLS: whoever shuts the connection down from another thread touches no
state of TLS.

The data of a READ are views of mapped files, which Python must not touch: the engine reads them as Python would, and a file
that was cut short would end the process (SIGBUS). So the kernel copies them into a piece of memory first, through a memfd,
and a mapping that cannot be read is an EFAULT, as it is with a plain socket.
"""

from __future__ import annotations

import binascii
import errno
import mmap
import os
import ssl
from collections.abc import Iterable
from contextlib import suppress
from typing import Literal, NamedTuple, cast, get_args

from cowkit.errors import ProtocolError, UsageError
from cowkit.server.channel import Buffer, Channel
from cowkit.server.option_answers import TlsMode

TlsChoice = Literal["on", "require"]
"""``"on"``: clients may use TLS; ``"require"``: they must."""

_PIECE = 1 << 20
"""How many bytes are encrypted at once."""
_RECEIVE = 1 << 18


class Tls(NamedTuple):
    """How a server does TLS."""

    mode: TlsMode
    context: ssl.SSLContext


def load_tls(
    *,
    certs: str | os.PathLike[str] | None = None,
    psk: str | os.PathLike[str] | None = None,
    verify_peer: bool = False,
    choice: TlsChoice | None = None,
) -> Tls:
    """Read the server's credentials.

    :param certs: a directory laid out as QEMU's and nbdkit's: ``server-cert.pem`` (the certificate, and those between it and
        the authority's), ``server-key.pem`` (without a password), and for ``verify_peer`` ``ca-cert.pem`` and, if it is there,
        ``ca-crl.pem``.
    :param psk: a file of pre-shared keys as GnuTLS' psktool makes it: lines of ``NAME:KEY``, the key in hexadecimal digits.
    :param verify_peer: turn away clients that have no certificate of the authority in ``ca-cert.pem``, or a revoked one.
    :param choice: whether clients may or must use TLS; they must, unless given.
    :raises UsageError: the arguments do not go together, or a file is missing or no good.
    """
    if choice is not None and choice not in get_args(TlsChoice):
        raise UsageError(f"TLS is one of {', '.join(get_args(TlsChoice))}, not {choice!r}")
    if verify_peer and choice == "on":
        raise UsageError(
            "clients that may do without TLS show no certificate to verify: leave out `on`, or the verifying"
        )
    mode: TlsMode = "allow" if choice == "on" else "require"
    if certs is not None and psk is not None:
        raise UsageError("TLS goes by certificates or by pre-shared keys: give one of the two")
    if psk is not None:
        if verify_peer:
            raise UsageError(
                "with pre-shared keys there is no certificate of the client's to verify: it has the key, or not"
            )
        return Tls(mode, _psk_context(os.fsdecode(psk)))
    if certs is None:
        what = "verifying clients" if verify_peer else "TLS"
        raise UsageError(
            f"{what} needs the server's credentials: a directory of certificates, or a file of pre-shared keys"
        )
    return Tls(mode, _certificates_context(os.fsdecode(certs), verify_peer))


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0  # nobody resumes a session of NBD
    return context


def _certificates_context(directory: str, verify_peer: bool) -> ssl.SSLContext:
    context = _context()
    cert, key, authority, revoked = (
        os.path.join(directory, name) for name in ("server-cert.pem", "server-key.pem", "ca-cert.pem", "ca-crl.pem")
    )
    for path in (cert, key, authority) if verify_peer else (cert, key):
        _readable(path)

    def no_password() -> str:
        raise UsageError(f"the key in {key} has a password: take that off (openssl pkey -in {key} -out ...)")

    try:
        context.load_cert_chain(cert, key, no_password)
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"{cert} and {key} are no certificate with its key: {_reason(error)}") from error
    if not verify_peer:
        return context
    context.verify_mode = ssl.CERT_REQUIRED
    _load_authority(context, authority)
    if os.path.lexists(revoked):
        _readable(revoked)
        _load_authority(context, revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def _load_authority(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be used: {_reason(error)}") from error


def _readable(path: str) -> None:
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise UsageError(f"cannot read {path}, which TLS needs: it is no regular file")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UsageError(f"cannot read {path}, which TLS needs: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"cannot read {path!r}, which TLS needs: no file's name has a NUL") from error


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or "it is not in PEM format").lower().replace("_", " ")
    return error.strerror or str(error)


def _psk_context(path: str) -> ssl.SSLContext:
    context = _context()
    set_callback = getattr(context, "set_psk_server_callback", None)
    if set_callback is None or not getattr(ssl, "HAS_PSK", False):
        raise UsageError("pre-shared keys for TLS need Python 3.13 or newer: use that, or certificates")
    keys = _read_keys(path)
    context.set_ciphers("PSK")
    set_callback(lambda name: keys.get(name or "", b""))
    return context


def _read_keys(path: str) -> dict[str, bytes]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read the pre-shared keys in {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} holds no pre-shared keys: it is no text") from error
    keys = {}
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        name, colon, digits = line.rpartition(":")
        try:
            key = binascii.unhexlify(digits)
        except ValueError:
            key = b""
        if not name or not colon or not key:
            raise UsageError(
                f"{path}, line {number}, is no NAME:KEY with the key in hexadecimal digits, as psktool makes it"
            )
        keys[name] = key
    if not keys:
        raise UsageError(f"{path} holds no pre-shared key: make one with psktool")
    return keys


class TlsChannel:
    """A channel that encrypts what goes over ``channel``, which stays the caller's; call :meth:`finish` in the end."""

    def __init__(self, channel: Channel, context: ssl.SSLContext) -> None:
        self._channel = channel
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._received = memoryview(bytearray(_RECEIVE))
        self._memory = os.memfd_create("cowkit-tls", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._memory, _PIECE)
            self._piece = mmap.mmap(self._memory, _PIECE, prot=mmap.PROT_READ)
        except BaseException:
            os.close(self._memory)
            raise

    def handshake(self) -> None:
        """Agree with the client on keys.

        :raises ProtocolError: the client does not do TLS as it must here, or cannot prove who it is.
        :raises OSError: the connection broke.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if not self._fill():
                    raise ConnectionResetError(errno.ECONNRESET, "the client left in the TLS handshake") from None
            except ssl.SSLError as error:
                with suppress(OSError):
                    self._flush()  # the alert that tells the client why
                raise ProtocolError(f"the TLS handshake failed: {_reason(error)}") from error
            else:
                self._flush()
                return

    # Receiving

    def recv(self, bufsize: int, /) -> bytes:
        """See :meth:`Channel.recv`."""
        buffer = bytearray(bufsize)
        return bytes(buffer[: self.recv_into(memoryview(buffer))])

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """See :meth:`Channel.recv_into`."""
        wanted = nbytes or len(buffer)
        count = 0
        while count < wanted:
            try:
                # A record at a time: gather what is there, so that the requests are taken in batches.
                got = cast("int", self._tls.read(wanted - count, buffer[count:wanted]))
            except ssl.SSLWantReadError:
                self._flush()  # reading may have an answer, to a change of keys
                if count or not self._fill():
                    break
                continue
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                break
            except ssl.SSLError as error:
                raise ProtocolError(f"the client broke TLS: {_reason(error)}") from error
            if not got:
                break
            count += got
        return count

    def _fill(self) -> bool:
        """Get more of what the client sent; False at the end."""
        count = self._channel.recv_into(self._received)
        self._incoming.write(self._received[:count])
        return count > 0

    # Sending

    def sendall(self, data: Buffer, /) -> None:
        """See :meth:`Channel.sendall`."""
        left = memoryview(data)
        while left:
            left = left[self.sendmsg([left]) :]

    def sendmsg(self, buffers: Iterable[Buffer], /) -> int:
        """See :meth:`Channel.sendmsg`."""
        batch = _beginning(buffers)
        length = sum(map(len, batch))
        copied = os.pwritev(self._memory, batch, 0)
        if copied < length:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        with memoryview(self._piece) as piece:
            sent = 0
            while sent < length:
                with piece[sent:length] as part:
                    try:
                        sent += self._tls.write(part)
                    except ssl.SSLError as error:
                        raise ProtocolError(f"the client broke TLS: {_reason(error)}") from error
        self._flush()
        return length

    def _flush(self) -> None:
        while self._outgoing.pending:
            self._channel.sendall(self._outgoing.read())

    def finish(self) -> None:
        """Tell the client that this is the end, if it still listens, and give back what this held."""
        try:
            try:
                self._tls.unwrap()
            except ssl.SSLError:
                pass  # it wants to wait for the client to say the same, or there never was a session
            self._flush()
        except OSError:
            pass
        finally:
            self._piece.close()
            os.close(self._memory)


def _beginning(buffers: Iterable[Buffer]) -> list[Buffer]:
    """As many of the buffers as make up a piece, or a piece of the first one.

    A reply's head (``bytes``) is left for the next piece where its data would not come along: data that turn out unreadable
    can be replaced by an error only while their head has not been sent.
    """
    batch: list[Buffer] = []
    length = 0
    for buffer in buffers:
        if length + len(buffer) > _PIECE:
            if not batch:
                return [memoryview(buffer)[:_PIECE]]
            if len(batch) > 1 and isinstance(batch[-1], bytes) and not isinstance(buffer, bytes):
                batch.pop()
            break
        batch.append(buffer)
        length += len(buffer)
    return batch
