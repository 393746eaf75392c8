from __future__ import annotations

import errno
from struct import Struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowkit.server import wire

SIZES = [
    (wire.GREETING, 18),
    (wire.CLIENT_FLAGS, 4),
    (wire.OPTION_HEADER, 16),
    (wire.OPTION_REPLY, 20),
    (wire.EXPORT_NAME_REPLY, 10),
    (wire.INFO_EXPORT, 12),
    (wire.INFO_TYPE, 2),
    (wire.INFO_BLOCK_SIZE, 14),
    (wire.REQUEST, 28),
    (wire.EXTENDED_REQUEST, 32),
    (wire.STATUS_PAYLOAD, 8),
    (wire.SIMPLE_REPLY, 16),
    (wire.STRUCTURED_REPLY, 20),
    (wire.EXTENDED_REPLY, 32),
    (wire.OFFSET_DATA, 8),
    (wire.OFFSET_HOLE, 12),
    (wire.BLOCK_STATUS, 4),
    (wire.DESCRIPTOR, 8),
    (wire.BLOCK_STATUS_EXT, 8),
    (wire.DESCRIPTOR_EXT, 16),
    (wire.ERROR, 6),
    (wire.ERROR_OFFSET, 8),
    (wire.STRUCTURED_DATA, 20 + 8),
    (wire.EXTENDED_DATA, 32 + 8),
]


@pytest.mark.parametrize(("structure", "size"), SIZES)
def test_a_structure_is_big_endian_and_as_long_as_the_protocol_says(structure: Struct, size: int) -> None:
    assert structure.format.startswith(">")
    assert structure.size == size


def test_the_magics_spell_what_the_protocol_spells() -> None:
    assert wire.NBD_MAGIC.to_bytes(8, "big") == b"NBDMAGIC"
    assert wire.OPTION_MAGIC.to_bytes(8, "big") == b"IHAVEOPT"
    assert wire.OPTION_REPLY_MAGIC == 0x0003E889045565A9
    assert (wire.REQUEST_MAGIC, wire.EXTENDED_REQUEST_MAGIC) == (0x25609513, 0x21E41C71)
    assert wire.SIMPLE_REPLY_MAGIC == 0x67446698
    assert (wire.STRUCTURED_REPLY_MAGIC, wire.EXTENDED_REPLY_MAGIC) == (0x668E33EF, 0x6E8A278C)


def test_the_numbers_are_those_of_the_protocol() -> None:
    assert [option.value for option in wire.Option] == list(range(1, 12))
    assert [reply.value for reply in wire.Reply] == [1, 2, 3, 4, *(2**31 + number for number in range(1, 11))]
    assert [info.value for info in wire.Info] == [0, 1, 2, 3]
    assert [flag.value for flag in wire.TransmissionFlag] == [1 << bit for bit in range(13)]
    assert [command.value for command in wire.Command] == list(range(8))
    assert [flag.value for flag in wire.CommandFlag] == [1 << bit for bit in range(6)]
    assert [chunk.value for chunk in wire.Chunk] == [0, 1, 2, 5, 6, 0x8001, 0x8002]


@pytest.mark.parametrize(
    ("family", "prefix"),
    [(wire.Command, "CMD_"), (wire.CommandFlag, "FLAG_"), (wire.Chunk, "CHUNK_")],
)
def test_each_number_of_the_hot_path_is_there_as_a_plain_int(
    family: type[wire.Command | wire.CommandFlag | wire.Chunk], prefix: str
) -> None:
    for member in family:
        plain = getattr(wire, f"{prefix}{member.name}")
        assert type(plain) is int
        assert plain == member.value


@pytest.mark.parametrize(
    ("system", "on_the_wire"),
    [
        (errno.EPERM, 1),
        (errno.EROFS, 1),
        (errno.EIO, 5),
        (errno.ENOMEM, 12),
        (errno.EINVAL, 22),
        (errno.ENOSPC, 28),
        (errno.EDQUOT, 28),
        (errno.EFBIG, 28),
        (errno.EOVERFLOW, 75),
        (errno.ENOTSUP, 95),
        (errno.EOPNOTSUPP, 95),
        (errno.ESHUTDOWN, 108),
        (errno.EBADF, 5),
        (errno.ESTALE, 5),
        (0, 5),
    ],
)
def test_an_errno_becomes_the_error_that_the_protocol_has_for_it(system: int, on_the_wire: int) -> None:
    assert wire.nbd_error(system) == on_the_wire


@given(st.integers())
def test_no_errno_becomes_anything_but_an_error_of_the_protocol(system: int) -> None:
    assert wire.nbd_error(system) in {1, 5, 12, 22, 28, 75, 95, 108}


@given(st.text(max_size=300))
def test_a_text_that_may_go_on_the_wire_goes_as_it_is(text: str) -> None:
    if "\0" not in text:
        assert wire.wire_text(text).decode() == text


@given(st.text(st.characters(exclude_categories=()), max_size=50), st.integers(0, 300))
def test_any_text_becomes_a_string_of_the_protocol(text: str, times: int) -> None:
    encoded = wire.wire_text(text * times)
    assert len(encoded) <= 4096
    assert b"\0" not in encoded
    encoded.decode()


@pytest.mark.parametrize(("character", "bytes_each"), [("a", 1), ("é", 2), ("€", 3), ("😀", 4)])
def test_a_text_that_is_too_long_is_cut_between_two_characters(character: str, bytes_each: int) -> None:
    encoded = wire.wire_text("x" + character * 5000)
    assert encoded.decode() == "x" + character * (4095 // bytes_each)
