"""Any options in any pieces against a simple model; any garbage."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowkit.server.exports import Export
from cowkit.server.negotiation import Negotiation, State, TlsMode
from tests.server.negotiating import (
    ABORT,
    ACK,
    EXPORT_NAME,
    EXT_HEADER_REQD,
    EXTENDED_HEADERS,
    GO,
    INFO,
    INFO_REPLY,
    INVALID,
    LIST,
    LIST_META_CONTEXT,
    META_CONTEXT,
    SERVER,
    SET_META_CONTEXT,
    STARTTLS,
    STRUCTURED_REPLY,
    TLS_REQD,
    UNKNOWN,
    UNSUP,
    Offer,
    infos,
    option,
    queries,
    replies,
)

CONTEXTS = {"a": ("base:allocation", "qemu:dirty-bitmap:cow"), "b": ("base:allocation",)}
EXPORTS = {name: Export(name=name, size=512, contexts=contexts) for name, contexts in CONTEXTS.items()}
NAMES = st.sampled_from(["a", "b", "c"])
QUERIES = st.lists(st.sampled_from(["base:allocation", "qemu:dirty-bitmap:cow", "base:", "qemu:", "x:y"]), max_size=3)

Step = tuple[int, str, list[str], bytes]
"""An option: its number, and what goes into its data: an export's name, queries, or bytes as they are."""

STEPS = st.one_of(
    st.tuples(
        st.sampled_from([LIST, STRUCTURED_REPLY, EXTENDED_HEADERS, STARTTLS]), st.just(""), st.just([]), st.just(b"")
    ),
    st.tuples(
        st.sampled_from([LIST, STRUCTURED_REPLY, STARTTLS, ABORT]), st.just(""), st.just([]), st.binary(max_size=9)
    ),
    st.tuples(st.sampled_from([4, 12, 77]), st.just(""), st.just([]), st.binary(max_size=40)),
    st.tuples(st.sampled_from([INFO, INFO, GO, EXPORT_NAME]), NAMES, st.just([]), st.just(b"")),
    st.tuples(st.sampled_from([LIST_META_CONTEXT, SET_META_CONTEXT, SET_META_CONTEXT]), NAMES, QUERIES, st.just(b"")),
    st.tuples(st.sampled_from([SET_META_CONTEXT, GO]), st.just(""), st.just([]), st.binary(min_size=1, max_size=3)),
)


def spoken(step: Step) -> bytes:
    number, name, wanted, data = step
    if data:
        return option(number, data)
    if number in (INFO, GO):
        return option(number, infos(name))
    if number in (LIST_META_CONTEXT, SET_META_CONTEXT):
        return option(number, queries(name, *wanted))
    return option(number, name.encode())


@dataclass
class Model:
    """The table of the protocol, told once more as a list of ifs."""

    tls: TlsMode
    in_tls: bool = False
    mode: int = 0
    contexts: dict[str, list[str]] = field(default_factory=dict)
    state: State = State.NEGOTIATING
    answered: list[int] = field(default_factory=list)

    def hear(self, step: Step) -> None:
        self.answered += self.answer(step)

    def answer(self, step: Step) -> list[int]:
        number, name, wanted, data = step
        if number == SET_META_CONTEXT:
            self.contexts = {}
        if self.tls == "require" and not self.in_tls and number not in (STARTTLS, ABORT):
            if number == EXPORT_NAME:
                self.state = State.ENDED
                return []
            return [TLS_REQD]
        if number == ABORT:
            self.state = State.ENDED
            return [ACK]
        if number in (4, 12, 77) or (number == STARTTLS and self.tls == "off"):
            return [UNSUP]
        if data:
            return [INVALID]
        if number == LIST:
            return [SERVER] * len(EXPORTS) + [ACK]
        if number in (STRUCTURED_REPLY, EXTENDED_HEADERS):
            return [self.upgrade(number)]
        if number == STARTTLS:
            return [self.start_tls()]
        if number == EXPORT_NAME:
            self.state = State.CHOSEN if name in EXPORTS and self.mode < 2 else State.ENDED
            return []
        if number == SET_META_CONTEXT and not self.mode:
            return [INVALID]
        if name not in EXPORTS:
            return [UNKNOWN]
        if number in (INFO, GO):
            self.state = State.CHOSEN if number == GO else self.state
            return [INFO_REPLY, ACK]
        found = [context for context in CONTEXTS[name] if self.means(number, wanted, context)]
        if number == SET_META_CONTEXT:
            self.contexts = {name: found}
        return [META_CONTEXT] * len(found) + [ACK]

    def upgrade(self, number: int) -> int:
        if self.mode == 2:
            return INVALID if number == EXTENDED_HEADERS else EXT_HEADER_REQD
        if self.mode == 1 and number == STRUCTURED_REPLY:
            return INVALID
        self.mode = 2 if number == EXTENDED_HEADERS else 1
        return ACK

    def start_tls(self) -> int:
        if self.in_tls:
            return INVALID
        self.mode = 0
        self.contexts = {}
        self.state = State.UPGRADE_TLS
        return ACK

    def means(self, number: int, wanted: list[str], context: str) -> bool:
        if number == SET_META_CONTEXT:
            return context in wanted
        return not wanted or context in wanted or context.partition(":")[0] + ":" in wanted


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """``data`` in pieces that have the lengths ``cuts``, over and over."""
    if not cuts:
        return [data]
    cut = []
    turn = 0
    while data:
        length = cuts[turn % len(cuts)]
        cut.append(data[:length])
        data = data[length:]
        turn += 1
    return cut


@given(
    steps=st.lists(STEPS, max_size=12),
    tls=st.sampled_from(["off", "allow", "require"]),
    cuts=st.lists(st.integers(1, 60), max_size=5),
)
def test_any_options_in_any_pieces_are_answered_as_the_protocol_says(
    steps: list[Step], tls: TlsMode, cuts: list[int]
) -> None:
    model = Model(tls)
    negotiation = Negotiation(Offer(*EXPORTS.values()), tls=tls)
    output = b""
    for piece in pieces(b"\0\0\0\3", cuts):
        negotiation.receive(piece)
    name = ""
    for step in steps:
        for piece in pieces(spoken(step), cuts):
            negotiation.receive(piece)
            output += negotiation.take_output()
        model.hear(step)
        name = step[1]
        assert negotiation.state is model.state
        if model.state is State.UPGRADE_TLS:
            negotiation.tls_started()
            model.state, model.in_tls = State.NEGOTIATING, True
        if model.state is not State.NEGOTIATING:
            break
    if model.state is State.CHOSEN:
        assert negotiation.chosen is not None
        assert negotiation.chosen.export is EXPORTS[name]
        assert (negotiation.chosen.structured, negotiation.chosen.extended) == (model.mode > 0, model.mode > 1)
        assert [context for _, context in negotiation.chosen.contexts] == model.contexts.get(name, [])
        if step[0] == EXPORT_NAME:
            assert output[-10:-2] == struct.pack(">Q", 512)
            output = output[:-10]
    assert [kind for _, kind, _ in replies(output)] == model.answered


@given(
    steps=st.lists(STEPS, max_size=8),
    garbage=st.binary(max_size=40),
    where=st.integers(0, 400),
    cuts=st.lists(st.integers(1, 200), min_size=1, max_size=5),
)
def test_the_same_bytes_in_other_pieces_come_to_the_same(
    steps: list[Step], garbage: bytes, where: int, cuts: list[int]
) -> None:
    data = b"\0\0\0\3" + b"".join(spoken(step) for step in steps)
    data = data[:where] + garbage + data[where:]
    whole = Negotiation(Offer(*EXPORTS.values()), tls="allow")
    whole.receive(data)
    cut = Negotiation(Offer(*EXPORTS.values()), tls="allow")
    for piece in pieces(data, cuts):
        cut.receive(bytearray(piece))
    assert (cut.state, cut.chosen, cut.ended) == (whole.state, whole.chosen, whole.ended)
    assert cut.trailing() == whole.trailing()
    assert cut.take_output() == whole.take_output()
    whole.receive_eof()
    cut.receive_eof()
    assert (cut.state, cut.ended) == (whole.state, whole.ended)


@given(garbage=st.binary(min_size=20, max_size=200), flags=st.binary(max_size=4))
def test_garbage_ends_the_connection_and_never_raises(garbage: bytes, flags: bytes) -> None:
    negotiation = Negotiation(Offer(*EXPORTS.values()), tls="allow")
    negotiation.receive(flags)
    negotiation.receive(garbage)
    if b"IHAVEOPT" not in garbage:
        assert negotiation.state is State.ENDED
        assert negotiation.take_output() == b""
    negotiation.receive_eof()
    assert negotiation.state is not State.NEGOTIATING


@given(number=st.integers(1, 12), data=st.binary(max_size=60), structured=st.booleans())
def test_garbage_in_an_option_never_raises_and_leaves_both_sides_in_step(
    number: int, data: bytes, *, structured: bool
) -> None:
    negotiation = Negotiation(Offer(*EXPORTS.values()))
    negotiation.receive(b"\0\0\0\1" + (option(STRUCTURED_REPLY) if structured else b"") + option(number, data))
    if negotiation.state is State.NEGOTIATING:
        negotiation.take_output()
        negotiation.receive(option(GO, infos("a")))
        assert [kind for _, kind, _ in replies(negotiation.take_output())] == [INFO_REPLY, ACK]
        assert negotiation.chosen is not None


@pytest.mark.parametrize("number", [77, INFO, SET_META_CONTEXT])
def test_a_megabyte_byte_by_byte_is_looked_at_once(number: int) -> None:
    """What is taken off the stream is copied once: the buffer is never searched or rebuilt for each piece."""
    negotiation = Negotiation(Offer(*EXPORTS.values()))
    negotiation.receive(b"\0\0\0\1" + option(number, claim=2**20))
    steps = 0
    step = negotiation._step

    def counted(data: bytes) -> None:
        nonlocal steps
        steps += 1
        step(data)

    negotiation._step = counted  # type: ignore[method-assign]
    for _ in range(2**20):
        negotiation.receive(b"x")
    assert steps == 1
    assert len(replies(negotiation.take_output())) == 1
