"""JSON for commands that are to be quick, by the C code of the module ``json`` without that module.

``import json`` brings regular expressions and enumerations along, and ``cowkit diff`` had from them 12 of the 40 ms that a small
difference took. What is read and written is the same. A Python whose ``json`` has no such C code, or another, gets ``json`` itself.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which takes longer to import than all that is here
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    _Scan = Callable[[str, int], tuple[Any, int]]
    _Encode = Callable[[object, int], Any]

_BLANK = " \t\n\r"


class _Context:
    """What :class:`json.JSONDecoder` tells its scanner: nothing but the defaults."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int

    @staticmethod
    def parse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def _c_code() -> tuple[_Scan, _Encode] | None:
    try:
        from _json import encode_basestring_ascii, make_encoder, make_scanner

        scan: _Scan = make_scanner(_Context)  # type: ignore[arg-type]  # has what it looks for
        encode: _Encode = make_encoder(None, _refuse, encode_basestring_ascii, None, ": ", ", ", False, False, False)
        if scan('{"a": [1, "\\u00e4"]}', 0)[0] != {"a": [1, "\xe4"]} or "".join(encode(["\xe4"], 0)) != '["\\u00e4"]':
            return None
    except (ImportError, TypeError, AttributeError, ValueError):
        return None
    return scan, encode


_quick = _c_code()


def loads(text: str | bytes) -> Any:
    """The value of a JSON text, in UTF-8 if it is bytes.

    :raises ValueError: it is no JSON text.
    :raises RecursionError: it is nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode()
    if _quick is None:
        from json import loads as slow

        return slow(text)
    text = text.strip(_BLANK)
    try:
        value, end = _quick[0](text, 0)
    except StopIteration as stop:
        raise ValueError(f"no JSON value at character {stop.value}") from None
    if end != len(text):
        raise ValueError(f"more behind the JSON value, at character {end}")
    return value


def dumps(value: object) -> str:
    """``value`` as a JSON text of one line, in ASCII.

    :raises ValueError: a number has no form in JSON (NaN).
    :raises TypeError: neither has something of another type.
    """
    if _quick is None:
        from json import dumps as slow

        return slow(value, allow_nan=False)
    return "".join(_quick[1](value, 0))
