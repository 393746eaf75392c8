"""Sizes as people write them: ``65536``, ``"64K"``, ``"1.5G"``; the units are powers of 1024."""

from __future__ import annotations

import re

from cowkit.errors import UsageError

_UNITS = "BKMGTPE"
_SIZE = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*(?:([BKMGTPE])(?:iB|B)?)?\s*", re.IGNORECASE)

LARGEST_DISK = 2**63 - 1
"""The largest offset that NBD clients and the operating system's file offsets can carry, in bytes."""


def parse_size(size: int | str, *, what: str = "size") -> int:
    """``size`` in bytes: an integer, or a string such as ``"64K"``, ``"64KiB"`` or ``"1.5G"``.

    :param what: what the size is of, for the error message.
    :raises UsageError: it is no size, is negative, is no whole number of bytes or is over 2**63 - 1.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise UsageError(f"{what} must be a number of bytes or a string such as '64M', not {size!r}")
    number, rest = size if isinstance(size, int) else 0, 0
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None:
            raise UsageError(
                f"{what} {size!r} is no size: give a number of bytes, or one with K, M, G, T, P or E, such as '64M'"
            )
        whole, _, decimals = match[1].partition(".")
        unit = 1024 ** _UNITS.index((match[2] or "B").upper())
        number, rest = divmod(int(whole + decimals) * unit, 10 ** len(decimals))
    if rest:
        raise UsageError(f"{what} {size!r} is no whole number of bytes")
    if not 0 <= number <= LARGEST_DISK:
        shown = repr(size) if isinstance(size, str) or abs(size) < 2**128 else "of so many digits"
        raise UsageError(f"{what} {shown} is out of range: 0 to {LARGEST_DISK} bytes (2**63 - 1)")
    return number


def format_size(size: int) -> str:
    """``size`` for people: ``"0 B"``, ``"4 KiB"``, ``"1.5 GiB"``; at most one decimal, and exact where it shows none."""
    for exponent in range(len(_UNITS) - 1, 0, -1):
        unit = 1024**exponent
        if size >= unit:
            number = size / unit
            shown = f"{size // unit}" if size % unit == 0 else f"{number:.1f}"
            return f"{shown} {_UNITS[exponent]}iB"
    return f"{size} B"
