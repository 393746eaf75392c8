"""The bytes around a difference, of both sides."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cowkit.disk import Base

_ROW = 16
_BEFORE = 1
_ROWS = 8
_UNSHOWN = re.compile(rb"[^\x20-\x7e]")


def hexdump(actual: Base, expected: Base, first: int) -> Iterator[str]:
    """Rows of 16 bytes from shortly before ``first`` on: ``-`` what was expected, ``+`` what is there, nothing: both."""
    start = max(0, first - first % _ROW - _BEFORE * _ROW)
    end = start + _ROWS * _ROW
    new, old = (each.pread(max(0, min(end, each.size) - start), start) for each in (actual, expected))
    digits = max(8, len(f"{end:x}"))
    for at in range(0, max(len(new), len(old)), _ROW):
        there, wanted = new[at : at + _ROW], old[at : at + _ROW]
        where = f"{start + at:0{digits}x}"
        if there == wanted:
            yield f"  {where}  {_row(there)}"
            continue
        if wanted:
            yield f"- {where}  {_row(wanted)}"
        if there:
            yield f"+ {where}  {_row(there)}"


def _row(data: bytes) -> str:
    return f"{data.hex(' '):<{3 * _ROW - 1}}  |{_UNSHOWN.sub(b'.', data).decode('ascii')}|"
