"""JSON without the module: the same as the module's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowkit import quick_json

REFUSAL = r"JSON|char|utf-8"

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_what_is_written_is_what_json_writes(value: Any) -> None:
    assert quick_json.dumps(value) == json.dumps(value)


@given(VALUES, st.sampled_from([None, 1]), st.booleans())
def test_what_is_read_is_what_json_reads(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert quick_json.loads(f" {text}\r\n") == value
    assert quick_json.loads(text.encode()) == value


@given(st.text(alphabet='{}[]",:0123456789.eE+-truefalsn\\ \n', max_size=30))
def test_what_json_refuses_is_refused(text: str) -> None:
    try:
        wanted = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError, match=REFUSAL):
            quick_json.loads(text)
    else:
        assert quick_json.loads(text) == wanted


@pytest.mark.parametrize("text", ["", "  ", "[1] 2", "{", "nul", "NaN", "[Infinity]", "-Infinity", b"\xff"])
def test_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=REFUSAL):
        quick_json.loads(text)


def test_a_text_that_is_nested_too_deeply_is_a_recursion_error() -> None:
    with pytest.raises(RecursionError):
        quick_json.loads("[" * 200_000)


@pytest.mark.parametrize("value", [math.nan, [math.inf]])
def test_a_number_without_a_form_is_a_value_error(value: object) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        quick_json.dumps(value)


@pytest.mark.parametrize("value", [b"x", {"a": {1, 2}}, object()])
def test_a_value_without_a_form_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError):
        quick_json.dumps(value)


@pytest.mark.parametrize("broken", ["None", "types.ModuleType('_json')"], ids=["no C code", "other C code"])
def test_a_python_without_that_c_code_has_json_itself(broken: str) -> None:
    code = (
        f"import sys, types\nsys.modules['_json'] = {broken}\nfrom cowkit import quick_json\n"
        "assert quick_json._quick is None\n"
        "assert quick_json.loads(b'[1, \"\\xc3\\xa4\"]') == [1, '\\xe4']\n"
        "assert quick_json.dumps(['\\xe4', 1]) == '[\"\\\\u00e4\", 1]'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
