"""A strip of characters that shows where on a disk something changed."""

from __future__ import annotations

from collections.abc import Iterable

from cowkit.disk.extent import Extent, Kind

_SHADES = "·▁▂▃▄▅▆▇█"
_ZERO = "0"


def strip(extents: Iterable[Extent], size: int, width: int) -> str:
    """``width`` cells that stand for ``size`` bytes, each as full as the part of it that changed.

    ``·`` is unchanged, ``▁`` to ``█`` a little to all of it; ``0`` a cell in which most of what changed reads as zeroes now.
    """
    if not size:
        return _SHADES[0] * width
    changed, zeroed = [0.0] * width, [0.0] * width
    for extent in extents:
        first, last = extent.offset * width // size, (extent.end - 1) * width // size
        for cell in range(first, last + 1):
            start, stop = max(extent.offset, cell * size / width), min(extent.end, (cell + 1) * size / width)
            changed[cell] += max(0.0, stop - start)
            if extent.kind is Kind.ZERO:
                zeroed[cell] += max(0.0, stop - start)
    return "".join(_cell(part, zero, size / width) for part, zero in zip(changed, zeroed, strict=True))


def _cell(changed: float, zeroed: float, whole: float) -> str:
    if not changed:
        return _SHADES[0]
    if zeroed > changed / 2:
        return _ZERO
    return _SHADES[max(1, min(len(_SHADES) - 1, round(changed / whole * (len(_SHADES) - 1))))]
