"""Figures as people read them: three digits, thousands as k."""

from __future__ import annotations

MISSING = "–"


def short(value: float | None) -> str:
    """A figure without its unit, such as 1.23, 45.6, 789, 12.3k; a dash for none."""
    if value is None:
        return MISSING
    if abs(value) >= 9999.5:
        thousands = value / 1000
        return f"{thousands:.0f}k" if thousands >= 99.95 else f"{thousands:.1f}k"
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def times(ratio: float | None) -> str:
    """How many times better, such as 2.51×. Cut, not rounded: what misses its target must not look as if it met it."""
    if ratio is None:
        return MISSING
    return f"{int(ratio)}×" if ratio >= 10 else f"{int(ratio * 100 + 1e-9) / 100:.2f}×"


def verdict(met: bool | None) -> str:
    """A target's mark."""
    return {True: "met", False: "MISSED", None: "not judged"}[met]
