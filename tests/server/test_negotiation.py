"""What each option is answered, in bytes."""

from __future__ import annotations

import struct

import pytest

from cowkit.errors import UsageError
from cowkit.server.exports import Export
from cowkit.server.negotiation import Chosen, Negotiation, State, TlsMode
from cowkit.server.wire import TransmissionFlag
from tests.server.negotiating import (
    ABORT,
    ACK,
    BLOCK_SIZE_REQD,
    EXPORT_NAME,
    EXT_HEADER_REQD,
    EXTENDED_HEADERS,
    FIXED_NEWSTYLE,
    GO,
    INFO,
    INFO_REPLY,
    INVALID,
    LIST,
    LIST_META_CONTEXT,
    META_CONTEXT,
    NO_ZEROES_TOO,
    PEEK_EXPORT,
    SERVER,
    SET_META_CONTEXT,
    SHUTDOWN,
    STARTTLS,
    STRUCTURED_REPLY,
    TLS_REQD,
    TOO_BIG,
    UNKNOWN,
    UNSUP,
    Offer,
    ask,
    begun,
    infos,
    kinds,
    option,
    queries,
    replies,
    string,
)

FLUSH_AND_TRIM = TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_TRIM
DISK = Export(
    name="disk",
    description="a disk of é",
    size=0x0123456789ABCDEF,
    flags=FLUSH_AND_TRIM,
    preferred_block=65536,
    maximum_payload=2**26,
    contexts=("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:cow", "qemu:dirty-bitmap:a:b"),
)
OTHER = Export(name="other", size=512, contexts=("base:allocation",))
ALIGNED = Export(name="aligned", size=8192, minimum_block=4096)

FIXED_FLAGS = 1 | 1 << 2 | 1 << 5  # HAS_FLAGS, SEND_FLUSH, SEND_TRIM
SEND_DF = 1 << 7
BLOCK_STATUS_PAYLOAD = 1 << 12


@pytest.fixture
def offer() -> Offer:
    return Offer(DISK, OTHER, ALIGNED, default=DISK)


@pytest.fixture
def negotiation(offer: Offer) -> Negotiation:
    return begun(offer)


def chosen(negotiation: Negotiation) -> Chosen:
    assert negotiation.state is State.CHOSEN
    assert negotiation.chosen is not None
    return negotiation.chosen


def why_ended(negotiation: Negotiation, *, clean: bool = False) -> str:
    assert negotiation.state is State.ENDED
    assert negotiation.ended is not None
    assert negotiation.ended.clean is clean
    assert negotiation.chosen is None
    return negotiation.ended.reason


def transmission_flags(negotiation: Negotiation, name: str = "disk") -> int:
    negotiation.receive(option(INFO, infos(name)))
    (_, kind, data), _ack = replies(negotiation.take_output())
    assert kind == INFO_REPLY
    return int(struct.unpack(">HQH", data)[2])


# Greeting and client flags


def test_the_server_greets_with_fixed_newstyle_and_no_zeroes(offer: Offer) -> None:
    assert Negotiation(offer).greeting() == b"NBDMAGICIHAVEOPT\0\3"


@pytest.mark.parametrize("flags", [b"\0\0\0\4", b"\x80\0\0\1", b"\xff\xff\xff\xff", b"GET "])
def test_a_client_flag_that_nobody_knows_ends_the_connection(offer: Offer, flags: bytes) -> None:
    assert "unknown flags" in why_ended(begun(offer, flags=flags))


def test_a_client_without_fixed_newstyle_may_choose_by_export_name(offer: Offer) -> None:
    negotiation = begun(offer, flags=b"\0\0\0\0")
    negotiation.receive(option(EXPORT_NAME, b"disk"))
    assert chosen(negotiation).export is DISK


@pytest.mark.parametrize("number", [LIST, GO, STARTTLS, ABORT])
def test_a_client_without_fixed_newstyle_may_do_nothing_else(offer: Offer, number: int) -> None:
    negotiation = begun(offer, tls="allow", flags=b"\0\0\0\0")
    negotiation.receive(option(number))
    assert "FIXED_NEWSTYLE" in why_ended(negotiation)
    assert negotiation.take_output() == b""


def test_an_option_with_a_wrong_magic_ends_the_connection(negotiation: Negotiation) -> None:
    negotiation.receive(b"IHAVEOPS" + struct.pack(">II", LIST, 0))
    assert "IHAVEOPT" in why_ended(negotiation)


# EXPORT_NAME


@pytest.mark.parametrize(("flags", "zeroes"), [(FIXED_NEWSTYLE, 124), (NO_ZEROES_TOO, 0), (b"\0\0\0\2", 0)])
def test_export_name_is_answered_with_size_and_flags_and_124_zeroes_unless_no_zeroes(
    offer: Offer, flags: bytes, zeroes: int
) -> None:
    negotiation = begun(offer, flags=flags)
    negotiation.receive(option(EXPORT_NAME, b"disk"))
    assert negotiation.take_output() == struct.pack(">QH", DISK.size, FIXED_FLAGS) + bytes(zeroes)
    assert chosen(negotiation) == Chosen(DISK, structured=False, extended=False, contexts=())


def test_export_name_without_a_name_chooses_the_default(negotiation: Negotiation) -> None:
    negotiation.receive(option(EXPORT_NAME))
    assert chosen(negotiation).export is DISK


@pytest.mark.parametrize("name", [b"nobody", b"di\0sk", b"\xff\xfe", b"x" * 4096, b"\xed\xa0\x80"])
def test_export_name_with_a_name_that_is_not_there_ends_the_connection(negotiation: Negotiation, name: bytes) -> None:
    negotiation.receive(option(EXPORT_NAME, name))
    assert why_ended(negotiation).startswith("EXPORT_NAME: ")
    assert negotiation.take_output() == b""


def test_export_name_longer_than_any_string_ends_the_connection_at_once(negotiation: Negotiation) -> None:
    negotiation.receive(option(EXPORT_NAME, claim=4097))
    assert "4097" in why_ended(negotiation)


def test_export_name_is_forbidden_after_extended_headers(negotiation: Negotiation) -> None:
    ask(negotiation, EXTENDED_HEADERS)
    negotiation.receive(option(EXPORT_NAME, b"disk"))
    assert "EXTENDED_HEADERS" in why_ended(negotiation)


def test_export_name_cannot_choose_what_has_a_minimum_block(negotiation: Negotiation) -> None:
    negotiation.receive(option(EXPORT_NAME, b"aligned"))
    assert "4096" in why_ended(negotiation)


def test_export_name_after_structured_replies_offers_df_and_keeps_the_contexts(negotiation: Negotiation) -> None:
    ask(negotiation, STRUCTURED_REPLY)
    ask(negotiation, SET_META_CONTEXT, queries("disk", "base:allocation"))
    negotiation.receive(option(EXPORT_NAME, b"disk"))
    assert negotiation.take_output()[:10] == struct.pack(">QH", DISK.size, FIXED_FLAGS | SEND_DF)
    assert chosen(negotiation) == Chosen(DISK, structured=True, extended=False, contexts=((0, "base:allocation"),))


# ABORT, LIST, and what nobody knows


@pytest.mark.parametrize("data", [b"", b"so long", bytes(100_000)])
def test_abort_is_acknowledged_whatever_its_data_and_ends_cleanly(negotiation: Negotiation, data: bytes) -> None:
    assert ask(negotiation, ABORT, data) == [ACK]
    assert "ABORT" in why_ended(negotiation, clean=True)


def test_nothing_is_heard_after_the_end(negotiation: Negotiation) -> None:
    ask(negotiation, ABORT)
    assert ask(negotiation, GO, infos("disk")) == []
    negotiation.receive_eof()
    assert "ABORT" in why_ended(negotiation, clean=True)


def test_list_tells_name_and_description_of_each_export(negotiation: Negotiation) -> None:
    negotiation.receive(option(LIST))
    assert replies(negotiation.take_output()) == [
        (LIST, SERVER, string("disk") + "a disk of é".encode()),
        (LIST, SERVER, string("other")),
        (LIST, SERVER, string("aligned")),
        (LIST, ACK, b""),
    ]


@pytest.mark.parametrize("number", [LIST, STRUCTURED_REPLY, EXTENDED_HEADERS, STARTTLS])
def test_data_on_an_option_that_takes_none_is_invalid_and_without_effect(offer: Offer, number: int) -> None:
    negotiation = begun(offer, tls="allow")
    assert ask(negotiation, number, b"x") == [INVALID]
    assert negotiation.state is State.NEGOTIATING
    assert ask(negotiation, GO, infos("disk"))[-1] == ACK
    assert chosen(negotiation) == Chosen(DISK, structured=False, extended=False, contexts=())


@pytest.mark.parametrize("number", [PEEK_EXPORT, 0, 12, 99, 2**32 - 1])
@pytest.mark.parametrize("data", [b"", b"IHAVEOPT", bytes(70_000)])
def test_an_unknown_option_is_unsupported_and_both_sides_stay_in_step(
    negotiation: Negotiation, number: int, data: bytes
) -> None:
    negotiation.receive(option(number, data) + option(LIST))
    answered = replies(negotiation.take_output())
    assert [(number, kind) for number, kind, _ in answered] == [(number, UNSUP), *[(LIST, SERVER)] * 3, (LIST, ACK)]


# INFO and GO


@pytest.mark.parametrize("number", [INFO, GO])
def test_info_and_go_tell_size_and_flags_though_nobody_asked(negotiation: Negotiation, number: int) -> None:
    negotiation.receive(option(number, infos("disk")))
    assert replies(negotiation.take_output()) == [
        (number, INFO_REPLY, struct.pack(">HQH", 0, DISK.size, FIXED_FLAGS)),
        (number, ACK, b""),
    ]


@pytest.mark.parametrize("number", [INFO, GO])
def test_info_and_go_tell_what_was_asked_once_and_ignore_what_they_do_not_know(
    negotiation: Negotiation, number: int
) -> None:
    negotiation.receive(option(number, infos("", 3, 77, 2, 1, 0, 0xFFFF, 1)))
    told = replies(negotiation.take_output())
    assert told[0] == (number, INFO_REPLY, struct.pack(">HQH", 0, DISK.size, FIXED_FLAGS))
    assert sorted(told[1:-1]) == [
        (number, INFO_REPLY, b"\0\1disk"),
        (number, INFO_REPLY, b"\0\2" + "a disk of é".encode()),
        (number, INFO_REPLY, struct.pack(">HIII", 3, 1, 65536, 2**26)),
    ]
    assert told[-1] == (number, ACK, b"")


def test_an_export_without_description_tells_none(negotiation: Negotiation) -> None:
    assert ask(negotiation, INFO, infos("other", 2)) == [INFO_REPLY, ACK]


def test_every_possible_information_request_at_once_is_answered(negotiation: Negotiation) -> None:
    assert ask(negotiation, GO, infos("disk", *range(65535))) == [INFO_REPLY] * 4 + [ACK]


@pytest.mark.parametrize("number", [INFO, GO])
def test_an_unknown_export_is_unknown_and_the_client_may_try_another(negotiation: Negotiation, number: int) -> None:
    assert ask(negotiation, number, infos("nobody", 0)) == [UNKNOWN]
    assert ask(negotiation, GO, infos("other"))[-1] == ACK
    assert chosen(negotiation).export is OTHER


def test_without_a_default_export_the_empty_name_is_unknown() -> None:
    negotiation = begun(Offer(DISK))
    negotiation.receive(option(GO, infos("")))
    assert replies(negotiation.take_output()) == [(GO, UNKNOWN, b"there is no default export here")]


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        string("disk"),
        string("disk") + b"\0",
        string("disk") + b"\0\1",
        string("disk") + b"\0\1\0",
        infos("disk", 1) + b"\0",
        infos("disk") + b"\0\0",
        string("disk", claim=5) + b"\0\0",
        string("disk", claim=7) + b"\0\0",
        infos(b"di\0sk"),
        infos(b"\xc3"),
        infos("x" * 4097),
    ],
)
def test_info_and_go_whose_data_does_not_add_up_are_invalid(negotiation: Negotiation, number: int, data: bytes) -> None:
    assert ask(negotiation, number, data) == [INVALID]
    assert ask(negotiation, INFO, infos("disk")) == [INFO_REPLY, ACK]


@pytest.mark.parametrize("number", [INFO, GO])
def test_a_minimum_block_must_be_asked_for_and_is_told_even_so(negotiation: Negotiation, number: int) -> None:
    negotiation.receive(option(number, infos("aligned", 1)))
    told = replies(negotiation.take_output())
    assert [kind for _, kind, _ in told] == [INFO_REPLY, INFO_REPLY, INFO_REPLY, BLOCK_SIZE_REQD]
    assert told[2][2] == struct.pack(">HIII", 3, 4096, 4096, 2**25)
    assert negotiation.state is State.NEGOTIATING
    assert ask(negotiation, number, infos("aligned", 3)) == [INFO_REPLY, INFO_REPLY, ACK]


def test_an_info_does_not_stand_in_for_a_go_that_asks_for_block_sizes(negotiation: Negotiation) -> None:
    ask(negotiation, INFO, infos("aligned", 3))
    assert ask(negotiation, GO, infos("aligned"))[-1] == BLOCK_SIZE_REQD


def test_bytes_behind_go_belong_to_transmission(negotiation: Negotiation) -> None:
    negotiation.receive(option(GO, infos("disk")) + b"first")
    negotiation.receive(b" and second")
    assert kinds(negotiation.take_output()) == [INFO_REPLY, ACK]
    assert negotiation.trailing() == b"first and second"
    negotiation.receive(b"third")
    assert negotiation.trailing() == b"third"
    assert negotiation.take_output() == b""


# STRUCTURED_REPLY and EXTENDED_HEADERS


def test_structured_replies_are_on_once(negotiation: Negotiation) -> None:
    assert ask(negotiation, STRUCTURED_REPLY) == [ACK]
    assert ask(negotiation, STRUCTURED_REPLY) == [INVALID]
    ask(negotiation, GO, infos("disk"))
    assert chosen(negotiation) == Chosen(DISK, structured=True, extended=False, contexts=())


@pytest.mark.parametrize("first", [False, True])
def test_extended_headers_imply_structured_replies_and_rule_them_out(negotiation: Negotiation, *, first: bool) -> None:
    if first:
        assert ask(negotiation, STRUCTURED_REPLY) == [ACK]
    assert ask(negotiation, EXTENDED_HEADERS) == [ACK]
    assert ask(negotiation, EXTENDED_HEADERS) == [INVALID]
    assert ask(negotiation, STRUCTURED_REPLY) == [EXT_HEADER_REQD]
    ask(negotiation, GO, infos("disk"))
    assert chosen(negotiation) == Chosen(DISK, structured=True, extended=True, contexts=())


def test_df_needs_structured_replies_and_status_payload_needs_extended_headers_and_contexts(
    negotiation: Negotiation,
) -> None:
    assert transmission_flags(negotiation) == FIXED_FLAGS
    ask(negotiation, STRUCTURED_REPLY)
    ask(negotiation, SET_META_CONTEXT, queries("disk", "base:allocation"))
    assert transmission_flags(negotiation) == FIXED_FLAGS | SEND_DF
    ask(negotiation, EXTENDED_HEADERS)
    assert transmission_flags(negotiation) == FIXED_FLAGS | SEND_DF | BLOCK_STATUS_PAYLOAD
    assert transmission_flags(negotiation, "other") == 1 | SEND_DF
    ask(negotiation, SET_META_CONTEXT, queries("disk"))
    assert transmission_flags(negotiation) == FIXED_FLAGS | SEND_DF


# Metadata contexts


def listed(negotiation: Negotiation, *wanted: str) -> list[str]:
    negotiation.receive(option(LIST_META_CONTEXT, queries("disk", *wanted)))
    *found, last = replies(negotiation.take_output())
    assert last == (LIST_META_CONTEXT, ACK, b"")
    assert all(kind == META_CONTEXT and data[:4] == bytes(4) for _, kind, data in found)
    return [data[4:].decode() for _, _, data in found]


def selected(negotiation: Negotiation, *wanted: str, name: str = "disk") -> dict[int, str]:
    negotiation.receive(option(SET_META_CONTEXT, queries(name, *wanted)))
    *found, last = replies(negotiation.take_output())
    assert last == (SET_META_CONTEXT, ACK, b"")
    ids = {int.from_bytes(data[:4], "big"): data[4:].decode() for _, _, data in found}
    assert len(ids) == len(found)
    return ids


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([], DISK.contexts),
        (["base:"], DISK.contexts[:1]),
        (["qemu:"], DISK.contexts[1:]),
        (["qemu:dirty-bitmap:"], DISK.contexts[2:]),
        (["qemu:dirty-bitmap:a:"], []),
        (["qemu:dirty-bitmap:a:b"], DISK.contexts[3:]),
        (["base:allocation", "base:", "base:allocation"], DISK.contexts[:1]),
        (["qemu:", "base:"], DISK.contexts),
        (["base:nothing", "x-mine:", "y:z", "qemu:dirty"], []),
        (["x-mine:all", "qemu:allocation-depth"], DISK.contexts[1:2]),
    ],
)
@pytest.mark.parametrize("structured", [False, True])
def test_contexts_are_listed_by_name_and_by_wildcard(
    negotiation: Negotiation, wanted: list[str], found: list[str], *, structured: bool
) -> None:
    if structured:
        ask(negotiation, STRUCTURED_REPLY)
    assert listed(negotiation, *wanted) == list(found)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([], ()),
        (["base:"], ()),
        (["qemu:", "qemu:dirty-bitmap:"], ()),
        (["nobody:knows"], ()),
        (["qemu:dirty-bitmap:cow", "base:allocation", "base:allocation"], ("base:allocation", "qemu:dirty-bitmap:cow")),
        (list(DISK.contexts), DISK.contexts),
    ],
)
def test_contexts_are_selected_by_name_alone_and_have_ids_of_their_own(
    negotiation: Negotiation, wanted: list[str], found: tuple[str, ...]
) -> None:
    ask(negotiation, STRUCTURED_REPLY)
    ids = selected(negotiation, *wanted)
    assert tuple(ids.values()) == found
    ask(negotiation, GO, infos("disk"))
    assert chosen(negotiation).contexts == tuple(ids.items())


def test_an_id_means_the_same_context_however_often_it_is_selected(negotiation: Negotiation) -> None:
    ask(negotiation, EXTENDED_HEADERS)
    all_ids = selected(negotiation, *DISK.contexts)
    for number, name in all_ids.items():
        assert selected(negotiation, name) == {number: name}


def test_selecting_before_structured_replies_is_invalid(negotiation: Negotiation) -> None:
    assert ask(negotiation, SET_META_CONTEXT, queries("disk", "base:allocation")) == [INVALID]


@pytest.mark.parametrize("number", [LIST_META_CONTEXT, SET_META_CONTEXT])
@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"", INVALID),
        (string("disk"), INVALID),
        (string("disk") + b"\0\0\0", INVALID),
        (string("disk", claim=0xFFFFFFFF) + bytes(4), INVALID),
        (queries("disk") + b"x", INVALID),
        (string("disk") + b"\0\0\0\2" + string("base:allocation"), INVALID),
        (string("disk") + b"\0\0\0\1" + string("base:allocation", claim=16), INVALID),
        (string("disk") + b"\0\0\0\1" + string("base:allocation", claim=14), INVALID),
        (string("disk") + b"\xff\xff\xff\xff", INVALID),
        (string("disk") + b"\xff\xff\xff\xff" + bytes(4096), INVALID),
        (queries("disk", b"base:\xff"), INVALID),
        (queries("disk", b"base:\0"), INVALID),
        (queries("disk", "base:" + "x" * 4092), INVALID),
        (queries("disk", "base"), INVALID),
        (queries("disk", ""), INVALID),
        (queries("disk", ":allocation"), INVALID),
        (queries(b"di\0sk", "base:allocation"), INVALID),
        (queries("nobody", "base:allocation"), UNKNOWN),
        (queries("disk", *["base:allocation"] * 1025), TOO_BIG),
        (bytes(2**20 + 1), TOO_BIG),
    ],
)
def test_a_failing_context_option_says_why_and_selecting_forgets_the_earlier_set(
    negotiation: Negotiation, number: int, data: bytes, answer: int
) -> None:
    ask(negotiation, STRUCTURED_REPLY)
    earlier = selected(negotiation, "base:allocation")
    assert ask(negotiation, number, data) == [answer]
    ask(negotiation, GO, infos("disk"))
    assert chosen(negotiation).contexts == (() if number == SET_META_CONTEXT else tuple(earlier.items()))


def test_1024_queries_at_once_are_answered(negotiation: Negotiation) -> None:
    assert listed(negotiation, *["qemu:"] * 1024) == list(DISK.contexts[1:])


@pytest.mark.parametrize(
    ("selected_for", "gone_for", "kept"), [("disk", "other", 0), ("other", "other", 1), ("", "", 1)]
)
def test_contexts_are_void_when_another_export_is_chosen(
    negotiation: Negotiation, selected_for: str, gone_for: str, kept: int
) -> None:
    ask(negotiation, STRUCTURED_REPLY)
    assert len(selected(negotiation, "base:allocation", name=selected_for)) == 1
    ask(negotiation, GO, infos(gone_for))
    assert len(chosen(negotiation).contexts) == kept


# STARTTLS


def test_without_tls_starttls_is_unsupported(negotiation: Negotiation) -> None:
    assert ask(negotiation, STARTTLS) == [UNSUP]
    assert ask(negotiation, STARTTLS, b"x") == [UNSUP]
    assert negotiation.state is State.NEGOTIATING


@pytest.mark.parametrize("tls", ["allow", "require"])
def test_starttls_is_acknowledged_and_waits_for_tls(offer: Offer, tls: TlsMode) -> None:
    negotiation = begun(offer, tls=tls)
    assert ask(negotiation, STARTTLS) == [ACK]
    assert negotiation.state is State.UPGRADE_TLS
    negotiation.tls_started()
    assert ask(negotiation, STARTTLS) == [INVALID]
    assert ask(negotiation, GO, infos("disk")) == [INFO_REPLY, ACK]
    assert chosen(negotiation).export is DISK


def test_starttls_with_data_is_invalid_where_tls_is_required_and_may_be_repeated(offer: Offer) -> None:
    negotiation = begun(offer, tls="require")
    assert ask(negotiation, STARTTLS, b"x") == [INVALID]
    assert ask(negotiation, STARTTLS) == [ACK]


@pytest.mark.parametrize(
    ("number", "data"),
    [
        (LIST, b""),
        (LIST, b"data"),
        (INFO, infos("disk")),
        (GO, infos("disk")),
        (GO, infos("nobody")),
        (GO, b"nonsense"),
        (STRUCTURED_REPLY, b""),
        (EXTENDED_HEADERS, b""),
        (LIST_META_CONTEXT, queries("disk")),
        (SET_META_CONTEXT, queries("disk", "base:allocation")),
        (PEEK_EXPORT, b""),
        (99, b"data"),
    ],
)
def test_where_tls_is_required_nothing_else_goes_and_nothing_is_told(offer: Offer, number: int, data: bytes) -> None:
    negotiation = begun(offer, tls="require")
    assert ask(negotiation, number, data) == [TLS_REQD]
    assert offer.asked == []
    assert ask(negotiation, STARTTLS) == [ACK]
    negotiation.tls_started()
    ask(negotiation, GO, infos("disk"))
    assert chosen(negotiation) == Chosen(DISK, structured=False, extended=False, contexts=())


@pytest.mark.parametrize("flags", [FIXED_NEWSTYLE, b"\0\0\0\0"])
def test_where_tls_is_required_export_name_ends_the_connection(offer: Offer, flags: bytes) -> None:
    negotiation = begun(offer, tls="require", flags=flags)
    negotiation.receive(option(EXPORT_NAME, b"disk"))
    assert "TLS" in why_ended(negotiation)
    assert negotiation.take_output() == b""
    assert offer.asked == []


def test_where_tls_is_required_abort_still_ends_cleanly(offer: Offer) -> None:
    negotiation = begun(offer, tls="require")
    assert ask(negotiation, ABORT) == [ACK]
    why_ended(negotiation, clean=True)


def test_where_tls_is_allowed_it_may_be_left_alone(offer: Offer) -> None:
    negotiation = begun(offer, tls="allow")
    assert ask(negotiation, GO, infos("disk")) == [INFO_REPLY, ACK]


@pytest.mark.parametrize("together", [False, True])
def test_bytes_in_the_clear_behind_starttls_are_never_acted_on(offer: Offer, *, together: bool) -> None:
    negotiation = begun(offer, tls="allow")
    injected = option(STRUCTURED_REPLY)
    negotiation.receive(option(STARTTLS) + (injected if together else b""))
    if not together:
        negotiation.receive(injected)
    assert kinds(negotiation.take_output()) == [ACK]
    assert "in the clear" in why_ended(negotiation)


def test_tls_does_not_start_unasked(negotiation: Negotiation) -> None:
    with pytest.raises(UsageError):
        negotiation.tls_started()


def test_an_unknown_tls_mode_is_refused(offer: Offer) -> None:
    with pytest.raises(UsageError, match="allow"):
        Negotiation(offer, tls="maybe")  # type: ignore[arg-type]


# Limits


def test_a_client_cannot_negotiate_for_ever(negotiation: Negotiation) -> None:
    for _ in range(1024):
        assert ask(negotiation, 99) == [UNSUP]
    negotiation.receive(option(GO, infos("disk")))
    assert "1024" in why_ended(negotiation)


def test_the_last_option_allowed_may_choose(negotiation: Negotiation) -> None:
    for _ in range(1023):
        ask(negotiation, LIST)
    ask(negotiation, GO, infos("disk"))
    assert chosen(negotiation).export is DISK


def test_replies_without_end_end_the_connection() -> None:
    huge = [Export(name=f"{number:04}" + "x" * 4000, description="y" * 4000, size=1) for number in range(100)]
    negotiation = begun(Offer(*huge))
    negotiation.receive(option(LIST) * 1000)
    assert "replies" in why_ended(negotiation)
    assert len(negotiation.take_output()) < 2**24 + 2**20


# What has broken other servers


def test_a_client_that_never_negotiates_makes_nobody_look_for_anything(offer: Offer) -> None:
    """nbdkit opened the disk for it: CVE-2019-14850."""
    negotiation = Negotiation(offer)
    negotiation.greeting()
    negotiation.receive_eof()
    why_ended(negotiation, clean=True)
    assert offer.asked == []


def test_asking_about_many_exports_in_any_order_chooses_the_last_one_only(negotiation: Negotiation) -> None:
    """nbdkit stumbled over it: CVE-2019-14851. The exports' handles would fail if negotiation looked at them."""
    ask(negotiation, STRUCTURED_REPLY)
    for name in ["disk", "other", "nobody", "", "aligned", "disk", "other"]:
        ask(negotiation, INFO, infos(name, 0, 1, 2))
        ask(negotiation, SET_META_CONTEXT, queries(name, "base:allocation"))
        assert ask(negotiation, GO, infos("nobody")) == [UNKNOWN]
        assert negotiation.chosen is None
    ask(negotiation, GO, infos("other"))
    assert chosen(negotiation) == Chosen(OTHER, structured=True, extended=False, contexts=((0, "base:allocation"),))


@pytest.mark.parametrize("headers", [STRUCTURED_REPLY, EXTENDED_HEADERS])
def test_nothing_negotiated_before_tls_survives_it(offer: Offer, headers: int) -> None:
    """nbdkit kept structured replies: CVE-2021-3716."""
    negotiation = begun(offer, tls="allow")
    assert ask(negotiation, headers) == [ACK]
    assert ask(negotiation, SET_META_CONTEXT, queries("disk", "base:allocation")) == [META_CONTEXT, ACK]
    assert ask(negotiation, STARTTLS) == [ACK]
    negotiation.tls_started()
    assert transmission_flags(negotiation) == FIXED_FLAGS
    assert ask(negotiation, SET_META_CONTEXT, queries("disk", "base:allocation")) == [INVALID]
    ask(negotiation, GO, infos("disk"))
    assert chosen(negotiation) == Chosen(DISK, structured=False, extended=False, contexts=())


def test_a_client_may_hang_up_at_any_byte() -> None:
    """qemu and nbd-server did not survive it: CVE-2017-7539, CVE-2013-7441."""
    flags_and_options = [FIXED_NEWSTYLE, option(99, b"x" * 9), option(LIST), option(GO, infos("disk", 3))]
    spoken = b"".join(flags_and_options)
    ends = {0, 4, 4 + 25, 4 + 25 + 16}
    for length in range(len(spoken)):
        negotiation = begun(Offer(DISK), flags=spoken[:length])
        negotiation.receive_eof()
        assert "hung up" in why_ended(negotiation, clean=length in ends)


def test_hanging_up_before_tls_or_while_data_is_skipped_ends_the_negotiation(offer: Offer) -> None:
    negotiation = begun(offer, tls="allow")
    ask(negotiation, STARTTLS)
    negotiation.receive_eof()
    why_ended(negotiation, clean=True)
    negotiation = begun(offer)
    negotiation.receive(option(99, claim=1000))
    negotiation.receive_eof()
    why_ended(negotiation)


def test_hanging_up_after_choosing_is_for_transmission_to_notice(negotiation: Negotiation) -> None:
    ask(negotiation, GO, infos("disk"))
    negotiation.receive_eof()
    assert chosen(negotiation).export is DISK


@pytest.mark.parametrize("length", [256, 257, 1000, 4095, 4096])
def test_long_names_are_names(length: int) -> None:
    """257 bytes overflowed a buffer of qemu: CVE-2017-15118."""
    export = Export(name="n" * length, description="d" * 4096, size=1, contexts=("base:allocation",))
    for number in (EXPORT_NAME, GO):
        negotiation = begun(Offer(export))
        ask(negotiation, STRUCTURED_REPLY)
        assert ask(negotiation, LIST) == [SERVER, ACK]
        assert ask(negotiation, SET_META_CONTEXT, queries(export.name, "base:allocation")) == [META_CONTEXT, ACK]
        assert ask(negotiation, INFO, infos(export.name, 1, 2)) == [INFO_REPLY] * 3 + [ACK]
        negotiation.receive(option(number, infos(export.name) if number == GO else export.name.encode()))
        assert chosen(negotiation).export is export
        negotiation = begun(Offer(DISK))
        assert ask(negotiation, GO, infos(export.name)) == [UNKNOWN]


@pytest.mark.parametrize("number", [*range(12), 99])
@pytest.mark.parametrize("claim", [2**26 + 1, 2**31, 2**32 - 1])
def test_an_option_that_claims_gigabytes_ends_the_connection_at_its_header(
    negotiation: Negotiation, number: int, claim: int
) -> None:
    """qemu waited for them: CVE-2017-15119."""
    negotiation.receive(option(number, claim=claim))
    assert str(claim) in why_ended(negotiation)
    assert negotiation.take_output() == b""


@pytest.mark.parametrize(
    ("number", "answer"), [(99, UNSUP), (LIST, INVALID), (GO, TOO_BIG), (SET_META_CONTEXT, TOO_BIG), (ABORT, ACK)]
)
def test_data_that_is_too_long_is_skipped_and_never_kept(negotiation: Negotiation, number: int, answer: int) -> None:
    negotiation.receive(option(number, claim=2**25))
    piece = bytes(2**18)
    for _ in range(2**25 // len(piece)):
        assert negotiation.take_output() == b""
        assert negotiation.state is State.NEGOTIATING
        negotiation.receive(piece)
        assert len(negotiation._input) == 0
    assert kinds(negotiation.take_output()) == [answer]


def test_many_long_options_end_the_connection_as_one_would(negotiation: Negotiation) -> None:
    for _ in range(64):
        assert ask(negotiation, 99, bytes(2**20)) == [UNSUP]
    negotiation.receive(option(99, b"x"))
    assert str(2**26) in why_ended(negotiation)


@pytest.mark.parametrize("character", ["x", "é", "😀", "\n", "\x7f", "'", "\\"])
def test_an_unknown_name_of_any_length_is_not_echoed_beyond_what_a_string_may_have(
    negotiation: Negotiation, character: str
) -> None:
    """The echo of 4096 bytes ended qemu: CVE-2020-10761."""
    name = (character * 4096).encode()[:4096].decode(errors="ignore")
    for number, data in [(GO, infos(name)), (LIST_META_CONTEXT, queries(name, "base:")), (INFO, infos(name))]:
        negotiation.receive(option(number, data))
        ((_, kind, text),) = replies(negotiation.take_output())
        assert kind == UNKNOWN
        assert len(text) <= 1024
        assert text.decode().isprintable()


def test_a_query_of_any_length_is_not_echoed_either(negotiation: Negotiation) -> None:
    negotiation.receive(option(LIST_META_CONTEXT, queries("disk", "😀" * 1024)))
    ((_, kind, text),) = replies(negotiation.take_output())
    assert kind == INVALID
    assert len(text.decode()) < 1024


def test_a_server_that_stops_refuses_every_option_but_abort(offer: Offer) -> None:
    """A client still negotiating brought qemu down as it stopped: CVE-2024-7409."""
    negotiation = begun(offer, tls="allow")
    negotiation.shut_down()
    for number in (LIST, INFO, GO, STARTTLS, STRUCTURED_REPLY, SET_META_CONTEXT, 99):
        assert ask(negotiation, number, b"data") == [SHUTDOWN]
    assert offer.asked == []
    assert ask(negotiation, ABORT) == [ACK]
    why_ended(negotiation, clean=True)


def test_a_server_that_stops_lets_nobody_choose_by_export_name(offer: Offer) -> None:
    negotiation = Negotiation(offer)
    negotiation.shut_down()
    negotiation.receive(FIXED_NEWSTYLE + option(EXPORT_NAME, b"disk"))
    assert "shutting down" in why_ended(negotiation)


@pytest.mark.parametrize("number", [INFO, GO, LIST_META_CONTEXT, SET_META_CONTEXT])
@pytest.mark.parametrize("claim", [5, 6, 7, 100, 0x7FFFFFFF, 0xFFFFFFF8, 0xFFFFFFFC, 0xFFFFFFFF])
def test_a_name_longer_than_its_option_is_invalid(negotiation: Negotiation, number: int, claim: int) -> None:
    """nbd-server wrote behind its buffers: CVE-2022-26495, CVE-2022-26496."""
    ask(negotiation, STRUCTURED_REPLY)
    assert ask(negotiation, number, string("disk", claim=claim)) == [INVALID]
    assert ask(negotiation, LIST)[-1] == ACK
