"""docs/protocol.md stays true: each of its rows has a test, and each test that it names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import pytest

from cowkit.server import wire

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent.parent / "docs" / "protocol.md"


def rows() -> Iterator[tuple[str, list[str]]]:
    """First cell of each row below a table's head, and the tests named in its last one."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        is_head = number + 1 < len(lines) and lines[number + 1].startswith("|---")
        if line.startswith("|") and not line.startswith("|---") and not is_head:
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            yield cells[0], re.findall(r"`(test_\w+)`", cells[-1])


def existing_tests() -> set[str]:
    return {
        node.name
        for path in HERE.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_row_names_a_test() -> None:
    found = [*rows()]
    assert len(found) > 90
    assert [row for row, tests in found if not tests] == []


def test_every_test_that_is_named_exists() -> None:
    there = existing_tests()
    assert [(row, test) for row, tests in rows() for test in tests if test not in there] == []


def test_every_test_of_what_broke_others_is_named() -> None:
    named = {test for _, tests in rows() for test in tests}
    tree = ast.parse((HERE / "test_what_broke_others.py").read_text(encoding="utf-8"))
    there = {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and re.match("test_(nbd|qemu)", node.name)
    }
    assert there - named == set()


@pytest.mark.parametrize(
    "family", [wire.Option, wire.Command, wire.NbdError, wire.TransmissionFlag, wire.CommandFlag, wire.Chunk]
)
def test_every_number_of_the_protocol_is_mentioned(family: type[Enum]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [member.name for member in family if not re.search(rf"\b{member.name}\b", text)] == []


def test_every_error_reply_is_mentioned() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [reply.name for reply in wire.Reply if reply.name.startswith("ERR_") and reply.name not in text] == []
