"""The NBD protocol's numbers and structures, and nothing else: no logic, no I/O.

The source is ``doc/proto.md`` of NetworkBlockDevice/nbd, with its branch ``extension-ext-header``; the contexts of QEMU
are those of ``docs/interop/nbd.txt`` in QEMU. Section names below are section names of ``proto.md``. Everything on the
wire is big-endian and unpadded.

Each family of numbers is an enumeration, for names in messages and in negotiation. What transmission needs for each
request is there a second time as a plain ``int`` (``CMD_READ``, ``FLAG_FUA``, ``CHUNK_NONE``), because looking up an
enumeration's member and combining it with ``|`` costs more than the rest of a small request's bookkeeping.
"""

from __future__ import annotations

import errno as _errno
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

# Limits

MAX_STRING: Final = 4096
"""The most bytes that any string may have: names, descriptions, error messages ("Conventions")."""

MAX_MINIMUM_BLOCK: Final = 2**16
"""The largest minimum block size that a server may advertise, in bytes ("Size constraints")."""

DEFAULT_PREFERRED_BLOCK: Final = 4096
"""What a client takes the preferred block size to be when nobody told it, in bytes ("Size constraints")."""

DEFAULT_MAXIMUM_PAYLOAD: Final = 2**25
"""The longest payload that a client may send unless told otherwise, in bytes ("Size constraints")."""


# Handshake

NBD_MAGIC: Final = 0x4E42444D41474943
"""``NBDMAGIC``: the first eight bytes that a server says."""

OPTION_MAGIC: Final = 0x49484156454F5054
"""``IHAVEOPT``: the server's next eight bytes, and the first eight of each option."""

OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
"""The first eight bytes of each reply to an option."""


class HandshakeFlag(IntFlag):
    """What the server says of itself in its greeting ("Handshake flags", 16 bits)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """What the client takes up of it ("Client flags", 32 bits)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    """What a client can ask during negotiation ("Option types")."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    """What a server can answer to an option ("Option reply types"). Errors have bit 31 set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_PLATFORM = 2**31 + 4
    ERR_TLS_REQD = 2**31 + 5
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_BLOCK_SIZE_REQD = 2**31 + 8
    ERR_TOO_BIG = 2**31 + 9
    ERR_EXT_HEADER_REQD = 2**31 + 10


class Info(IntEnum):
    """What a client can ask about an export with INFO and GO ("Option reply types", ``NBD_REP_INFO``)."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What an export can do ("Transmission flags", 16 bits)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


GREETING: Final = Struct(">QQH")
"""The server's first words: NBD_MAGIC, OPTION_MAGIC, handshake flags ("Newstyle negotiation")."""

CLIENT_FLAGS: Final = Struct(">I")
"""The client's answer to them."""

OPTION_HEADER: Final = Struct(">QII")
"""An option: OPTION_MAGIC, option, length of its data in bytes. The data follows."""

OPTION_REPLY: Final = Struct(">QIII")
"""A reply to an option: OPTION_REPLY_MAGIC, the option, reply type, length of its data in bytes. The data follows."""

EXPORT_NAME_REPLY: Final = Struct(">QH")
"""The answer to EXPORT_NAME: size in bytes, transmission flags; EXPORT_NAME_ZEROES follow, unless NO_ZEROES is on."""

EXPORT_NAME_ZEROES: Final = bytes(124)

INFO_EXPORT: Final = Struct(">HQH")
"""Data of an INFO reply: Info.EXPORT, size in bytes, transmission flags."""

INFO_TYPE: Final = Struct(">H")
"""Data of an INFO reply: Info.NAME or Info.DESCRIPTION. The string follows."""

INFO_BLOCK_SIZE: Final = Struct(">HIII")
"""Data of an INFO reply: Info.BLOCK_SIZE, minimum block, preferred block, maximum payload, in bytes."""

STRING_LENGTH: Final = Struct(">I")
"""The length in bytes of a string inside an option or in a SERVER reply."""

META_CONTEXT_ID: Final = Struct(">I")
"""Data of a META_CONTEXT reply: the id. The context's name follows."""

# What clients send in transmission

REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71


class Command(IntEnum):
    """What a client can ask during transmission ("Request types")."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """How it wants that done ("Command flags", 16 bits)."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


CMD_READ: Final = int(Command.READ)
CMD_WRITE: Final = int(Command.WRITE)
CMD_DISC: Final = int(Command.DISC)
CMD_FLUSH: Final = int(Command.FLUSH)
CMD_TRIM: Final = int(Command.TRIM)
CMD_CACHE: Final = int(Command.CACHE)
CMD_WRITE_ZEROES: Final = int(Command.WRITE_ZEROES)
CMD_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)

FLAG_FUA: Final = int(CommandFlag.FUA)
FLAG_NO_HOLE: Final = int(CommandFlag.NO_HOLE)
FLAG_DF: Final = int(CommandFlag.DF)
FLAG_REQ_ONE: Final = int(CommandFlag.REQ_ONE)
FLAG_FAST_ZERO: Final = int(CommandFlag.FAST_ZERO)
FLAG_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)

REQUEST: Final = Struct(">IHHQQI")
"""A compact request: REQUEST_MAGIC, command flags, command, cookie, offset, length. The data of a WRITE follows."""

EXTENDED_REQUEST: Final = Struct(">IHHQQQ")
"""An extended request: EXTENDED_REQUEST_MAGIC, command flags, command, cookie, offset, length.

With PAYLOAD_LEN, ``length`` bytes of payload follow; without, it is the length of what the command acts on.
"""

STATUS_PAYLOAD: Final = Struct(">Q")
"""Payload of a BLOCK_STATUS with PAYLOAD_LEN: effect length in bytes. Context ids of 32 bits each follow."""

# What servers send in transmission

SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

REPLY_FLAG_DONE: Final = 1
"""The chunk is the last one of its reply ("Structured and extended header reply flags")."""


class Chunk(IntEnum):
    """What a structured or extended reply consists of ("Structured reply types"). Errors have bit 15 set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 2**15 + 1
    ERROR_OFFSET = 2**15 + 2


CHUNK_NONE: Final = int(Chunk.NONE)
CHUNK_OFFSET_DATA: Final = int(Chunk.OFFSET_DATA)
CHUNK_OFFSET_HOLE: Final = int(Chunk.OFFSET_HOLE)
CHUNK_BLOCK_STATUS: Final = int(Chunk.BLOCK_STATUS)
CHUNK_BLOCK_STATUS_EXT: Final = int(Chunk.BLOCK_STATUS_EXT)
CHUNK_ERROR: Final = int(Chunk.ERROR)
CHUNK_ERROR_OFFSET: Final = int(Chunk.ERROR_OFFSET)

SIMPLE_REPLY: Final = Struct(">IIQ")
"""A simple reply: SIMPLE_REPLY_MAGIC, error or 0, cookie. The data of a READ that succeeded follows."""

STRUCTURED_REPLY: Final = Struct(">IHHQI")
"""A structured chunk: STRUCTURED_REPLY_MAGIC, reply flags, chunk, cookie, length of the payload."""

EXTENDED_REPLY: Final = Struct(">IHHQQQ")
"""An extended chunk: EXTENDED_REPLY_MAGIC, reply flags, chunk, cookie, offset of the request, length of the payload."""

# Payloads of chunks

OFFSET_DATA: Final = Struct(">Q")
"""Payload of OFFSET_DATA: offset. The data follows."""

OFFSET_HOLE: Final = Struct(">QI")
"""Payload of OFFSET_HOLE: offset, length of the zeroes in bytes."""

BLOCK_STATUS: Final = Struct(">I")
"""Payload of BLOCK_STATUS: context id. Descriptors follow."""

DESCRIPTOR: Final = Struct(">II")
"""A descriptor of BLOCK_STATUS: length in bytes, never 0; status flags."""

BLOCK_STATUS_EXT: Final = Struct(">II")
"""Payload of BLOCK_STATUS_EXT: context id, number of descriptors. They follow."""

DESCRIPTOR_EXT: Final = Struct(">QQ")
"""A descriptor of BLOCK_STATUS_EXT: length in bytes, never 0; status flags."""

ERROR: Final = Struct(">IH")
"""Payload of ERROR and ERROR_OFFSET: error, never 0; length of the message in bytes. The message follows."""

ERROR_OFFSET: Final = Struct(">Q")
"""What follows the message of ERROR_OFFSET: the offset that failed."""

# Headers and payloads in one, so that a chunk's head costs one call.

STRUCTURED_DATA: Final = Struct(">IHHQIQ")
"""STRUCTURED_REPLY and OFFSET_DATA; the length is that of the data and 8 more."""

EXTENDED_DATA: Final = Struct(">IHHQQQQ")
"""EXTENDED_REPLY and OFFSET_DATA; the length is that of the data and 8 more."""

# Metadata contexts

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
"""What the name of a dirty bitmap's context begins with; alone, it asks for all of them."""

STATE_HOLE: Final = 1 << 0
"""``base:allocation``: nothing is allocated there ("The base: metadata namespace")."""

STATE_ZERO: Final = 1 << 1
"""``base:allocation``: it reads as zeroes."""

STATE_DIRTY: Final = 1 << 0
"""``qemu:dirty-bitmap:NAME``: written to (QEMU, docs/interop/nbd.txt)."""

# Errors


class NbdError(IntEnum):
    """The errors that may go on the wire, with the protocol's values, whatever the system's are ("Error values")."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


_NBD_ERRORS: Final = {
    _errno.EPERM: NbdError.EPERM,
    _errno.EROFS: NbdError.EPERM,
    _errno.EIO: NbdError.EIO,
    _errno.ENOMEM: NbdError.ENOMEM,
    _errno.EINVAL: NbdError.EINVAL,
    _errno.ENOSPC: NbdError.ENOSPC,
    _errno.EDQUOT: NbdError.ENOSPC,
    _errno.EFBIG: NbdError.ENOSPC,
    _errno.EOVERFLOW: NbdError.EOVERFLOW,
    _errno.ENOTSUP: NbdError.ENOTSUP,
    _errno.EOPNOTSUPP: NbdError.ENOTSUP,
    _errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}


def nbd_error(errno: int) -> int:
    """The error that a client is answered with for the system's ``errno`` ("Error values").

    EROFS becomes EPERM, EDQUOT and EFBIG become ENOSPC, and whatever the protocol has no word for becomes EIO. So does
    0: who asks has failed, and the answer must not say that it succeeded.
    """
    return int(_NBD_ERRORS.get(errno, NbdError.EIO))


def wire_text(text: str) -> bytes:
    """``text`` as a string that may go on the wire: UTF-8, no NUL, at most MAX_STRING bytes ("Conventions").

    For messages, never for names: what is too long loses its end, between two characters; NUL, and what is not Unicode
    (the bytes of a file name that is no UTF-8), appears as an escape.
    """
    # Only so many characters can matter: cutting first keeps a huge text from being encoded whole.
    encoded = text[: MAX_STRING + 1].replace("\0", "\\0").encode("utf-8", "backslashreplace")
    if len(encoded) <= MAX_STRING:
        return encoded
    return encoded[:MAX_STRING].decode("utf-8", "ignore").encode()
