"""The QMP messages, against QEMU's own monitor and against a simple model."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowkit.errors import ProtocolError
from cowkit.server.qmp import (
    DEPTH_LIMIT,
    MESSAGE_LIMIT,
    Argument,
    MessageSplitter,
    QmpSession,
    Request,
    encode,
    encode_event,
)

ID = {"id": Argument(str), "force": Argument(bool, required=False), "count": Argument(int, required=False)}


def session(*, negotiated: bool = True) -> QmpSession:
    made = QmpSession({"block-export-del": ID, "number": {"x": Argument(float)}}, "1.2.3")
    made.negotiated = negotiated
    return made


def answers(one: QmpSession, data: bytes) -> list[Any]:
    return [item if isinstance(item, Request) else json.loads(item) for item in one.feed(data)]


def description(one: QmpSession, data: bytes) -> str:
    (answer,) = answers(one, data)
    return str(answer["error"]["desc"])


# Each is asked of QEMU, too. It words errors in the JSON itself its own way; what comes before that is compared.
ASKED = [
    b'{"execute": "query-version"}',
    b'{"execute": "qmp_capabilities", "arguments": {"enable": 3}}',
    b'{"execute": "qmp_capabilities", "arguments": {"enable": ["no-such"]}}',
    b'{"execute": "qmp_capabilities"}',
    b'{"execute": "qmp_capabilities", "id": 3}',
    b'{"execute": "no-such", "id": [1, {"a": null}]}',
    b'{"foo": 1}',
    b'{"id": 1}',
    b'{"execute": 1}',
    b'{"execute": "no-such", "foo": 1}',
    b'{"execute": "query-version", "arguments": 3}',
    b'{"execute": "query-version", "arguments": {"a": 1}}',
    b'{"execute": "block-export-del", "arguments": {}}',
    b'{"execute": "block-export-del", "arguments": {"id": 3}, "id": "x"}',
    b"[]",
    b"hello",
    b'{"a": nope}',
    b'{"a": "x',
    b'{"execute": "query-version", "id": 7}',
]


@pytest.mark.requires("qemu-storage-daemon")
def test_it_answers_as_qemu_does() -> None:
    monitor = subprocess.run(
        ["qemu-storage-daemon", "--chardev", "stdio,id=m", "--monitor", "chardev=m"],
        timeout=30,
        input=b"\n".join([*ASKED, b'{"execute": "quit"}']) + b"\n",
        capture_output=True,
        check=True,
    )
    qemu = [json.loads(line) for line in monitor.stdout.splitlines()][1 : len(ASKED) + 1]
    one = session(negotiated=False)
    ours = [answer for asked in ASKED for answer in answers(one, asked + b"\n")]

    def comparable(answer: dict[str, Any]) -> dict[str, Any]:
        if "return" in answer:
            return {**answer, "return": sorted(answer["return"])}
        error = dict(answer["error"])
        if error["desc"].startswith("JSON parse error"):
            error["desc"] = "JSON parse error"
        if "no-such" in error["desc"] and error["class"] == "GenericError":
            error["desc"] = "capability"
        return {**answer, "error": error}

    assert [comparable(answer) for answer in ours] == [comparable(answer) for answer in qemu]


def test_the_greeting_has_the_version_and_no_capabilities() -> None:
    greeting = json.loads(session().greeting())["QMP"]
    assert greeting["version"] == {"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "cowkit 1.2.3"}
    assert greeting["capabilities"] == []


def test_query_commands_names_every_command() -> None:
    (answer,) = answers(session(), b'{"execute": "query-commands"}')
    names = ["block-export-del", "number", "qmp_capabilities", "query-commands", "query-version"]
    assert answer == {"return": [{"name": name} for name in names]}


def test_a_request_comes_out_with_its_arguments_and_id() -> None:
    (request,) = answers(
        session(), b'{"execute": "block-export-del", "arguments": {"id": "a", "force": true}, "id": {"b": 1}}'
    )
    assert request == Request("block-export-del", {"id": "a", "force": True}, {"id": {"b": 1}})
    assert json.loads(session().result(request, [1])) == {"return": [1], "id": {"b": 1}}
    assert json.loads(session().error(request, "no")) == {
        "error": {"class": "GenericError", "desc": "no"},
        "id": {"b": 1},
    }


def test_a_boolean_is_no_integer_and_an_integer_is_a_number() -> None:
    asked = b'{"execute": "block-export-del", "arguments": {"id": "a", "count": true}}'
    assert description(session(), asked) == "Invalid parameter type for 'count', expected: integer"
    (request,) = answers(session(), b'{"execute": "number", "arguments": {"x": 1}}')
    assert request.arguments == {"x": 1}


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, '"\\ud8"', '"\xff"'])
def test_what_only_some_json_readers_take_is_refused(text: str) -> None:
    found = answers(session(), b'{"execute": "query-version", "id": ' + text.encode("latin-1") + b"}\n")
    assert found[0]["error"]["desc"].startswith("JSON parse error")


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"execute": "query-version", "id": ' + b"[" * 90 + b'{"a":'])
def test_deep_nesting_is_refused_and_the_next_line_counts(opening: bytes) -> None:
    found = answers(session(), opening * 100_000 + b'\n{"execute": "query-version"}')
    assert f"over {DEPTH_LIMIT} deep" in found[0]["error"]["desc"]
    assert "return" in found[-1]


def test_the_deepest_id_that_is_taken_is_given_back() -> None:
    tag = b"[" * (DEPTH_LIMIT - 1) + b"]" * (DEPTH_LIMIT - 1)
    (answer,) = answers(session(), b'{"execute": "query-version", "id": ' + tag + b"}")
    assert json.dumps(answer["id"]).encode() == tag


@pytest.mark.parametrize("start", [b'{"a": "', b"{", b"hello"])
def test_a_message_over_the_limit_is_an_error_once_and_the_next_line_counts(start: bytes) -> None:
    one = session()
    found = answers(one, start)
    for _ in range(MESSAGE_LIMIT // 65536 * 3):
        found += answers(one, b"x" * 65536)
    assert [answer["error"]["desc"] for answer in found] == [f"message of over {MESSAGE_LIMIT} bytes"]
    (answer,) = answers(one, b'\n{"execute": "query-version"}')
    assert "return" in answer


def test_the_byte_ff_throws_away_what_is_unfinished() -> None:
    one = session()
    assert answers(one, b"\xff\xff") == []
    assert answers(one, b'{"execute": "query-version", {{[') == []
    assert description(one, b"\xff") == "JSON parse error, unfinished message"
    (answer,) = answers(one, b'\xff{"execute": "query-version"}')
    assert "return" in answer


def test_a_message_may_span_lines_and_lines_may_hold_several() -> None:
    one = session()
    assert len(answers(one, b'{\n "execute":\r\n\t"query-version"\n}{"execute": "query-version"} {"execute"')) == 2
    assert len(answers(one, b': "query-version"}')) == 1


def test_a_file_name_that_is_no_utf8_survives_the_way() -> None:
    name = b"caf\xe9".decode(errors="surrogateescape")
    (request,) = answers(session(), encode({"execute": "block-export-del", "arguments": {"id": name}}))
    assert request.arguments["id"].encode(errors="surrogateescape") == b"caf\xe9"


def test_an_event_has_its_time_in_whole_seconds_and_microseconds() -> None:
    event = json.loads(encode_event("X", {"a": 1}, time=12.25))
    assert event == {"event": "X", "data": {"a": 1}, "timestamp": {"seconds": 12, "microseconds": 250000}}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.dictionaries(st.text(), JSON, max_size=3) | st.lists(JSON, max_size=3)


def cut(data: bytes, draw: st.DataObject) -> list[bytes]:
    places = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=10)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


@settings(deadline=None)
@given(messages=st.lists(MESSAGES), between=st.text(" \t\r\n", max_size=2), draw=st.data())
def test_messages_come_out_whole_however_the_stream_is_cut(
    messages: list[Any], between: str, draw: st.DataObject
) -> None:
    stream = between.join(json.dumps(message, ensure_ascii=False) for message in messages).encode(
        errors="surrogatepass"
    )
    splitter = MessageSplitter()
    found = [message for piece in cut(stream, draw) for message in splitter.feed(piece)]
    assert [
        json.loads(message.decode(errors="surrogatepass")) for message in found if isinstance(message, bytes)
    ] == messages


@settings(deadline=None)
@given(
    pieces=st.lists(
        st.binary(max_size=20)
        | st.sampled_from(
            [b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b"\xff", b'{"execute": "query-version"}', b"1", b","]
        )
    ),
    draw=st.data(),
)
def test_whatever_comes_each_answer_is_json_and_the_client_gets_back_in_step(
    pieces: list[bytes], draw: st.DataObject
) -> None:
    one = session()
    for piece in cut(b"".join(pieces), draw):
        for answer in answers(one, piece):
            assert isinstance(answer, Request) or answer.keys() <= {"return", "error", "id"}
    *_, last = answers(one, b'\n\xff\n{"execute": "query-version", "id": "last"}')
    assert last["id"] == "last"


@settings(deadline=None)
@given(data=st.binary(), draw=st.data())
def test_how_the_stream_is_cut_changes_nothing(data: bytes, draw: st.DataObject) -> None:
    def split(pieces: list[bytes]) -> list[bytes | str]:
        splitter = MessageSplitter()
        found = [message for piece in pieces for message in splitter.feed(piece)]
        return [str(message) if isinstance(message, ProtocolError) else message for message in found]

    assert split(cut(data, draw)) == split([data])
