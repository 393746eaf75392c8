"""How much of a part of a disk is dirty, changed, and so on: bytes and runs of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

from cowkit.disk.extent import Extent, Kind
from cowkit.disk.sizes import format_size


class Amount(NamedTuple):
    """So many bytes, in so many runs."""

    bytes: int = 0
    extents: int = 0

    def __str__(self) -> str:
        return f"{format_size(self.bytes)} in {self.extents} extent{'' if self.extents == 1 else 's'}"


class Amounts(NamedTuple):
    """What became of a disk or a part of it. Runs of *changed* and *identical* bytes are the longest ones, whatever their kind."""

    dirty: Amount
    """Written or zeroed; neighbours that were written and neighbours that were zeroed count apart."""
    changed: Amount
    """Of what is dirty: what differs from the state before."""
    identical: Amount
    """Of what is dirty: what is the same as before."""
    zeroed: Amount
    """Of what changed: what reads as zeroes now."""
    trimmed: Amount
    """Of what is dirty: what was zeroed or trimmed by whole blocks, so that it takes no room in the overlay."""

    def to_json(self) -> dict[str, int]:
        """``dirty_bytes``, ``dirty_extents`` and so on."""
        return {
            f"{name}_{unit}": value for name, each in self._asdict().items() for unit, value in each._asdict().items()
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What :meth:`to_json` made."""
        return cls(*(Amount(data[f"{name}_bytes"], data[f"{name}_extents"]) for name in cls._fields))


def amounts(dirty: Sequence[Extent], changed: Sequence[Extent], start: int = 0, end: int | None = None) -> Amounts:
    """What of ``dirty`` and ``changed``, both in order, lies from ``start`` on and before ``end``, in bytes."""
    dirty, changed = list(clipped(dirty, start, end)), list(clipped(changed, start, end))
    runs = list(joined(changed))
    return Amounts(
        dirty=_sum(dirty),
        changed=_sum(runs),
        identical=_sum(without(joined(dirty), runs)),
        zeroed=_sum(each for each in changed if each.kind is Kind.ZERO),
        trimmed=_sum(each for each in dirty if each.kind is Kind.ZERO),
    )


def total(parts: Iterable[Amounts]) -> Amounts:
    """All of ``parts`` together."""
    sums = [[0, 0] for _ in Amounts._fields]
    for part in parts:
        for so_far, amount in zip(sums, part, strict=True):
            so_far[0] += amount.bytes
            so_far[1] += amount.extents
    return Amounts(*(Amount(*each) for each in sums))


def clipped(extents: Iterable[Extent], start: int, end: int | None) -> Iterator[Extent]:
    """What of ``extents`` lies from ``start`` on and before ``end``."""
    for extent in extents:
        first = max(extent.offset, start)
        last = extent.end if end is None else min(extent.end, end)
        if first < last:
            yield Extent(first, last - first, extent.kind)


def joined(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same bytes, neighbours joined whatever their kind; all are ``DATA`` then."""
    start = end = -1
    for extent in extents:
        if extent.offset == end:
            end = extent.end
            continue
        if end > start:
            yield Extent(start, end - start, Kind.DATA)
        start, end = extent.offset, extent.end
    if end > start:
        yield Extent(start, end - start, Kind.DATA)


def without(extents: Iterable[Extent], others: Iterable[Extent]) -> Iterator[Extent]:
    """What of ``extents`` is not in ``others``; both are in order."""
    rest = iter(others)
    other = next(rest, None)
    for extent in extents:
        at = extent.offset
        while other is not None and other.end <= at:
            other = next(rest, None)
        while other is not None and other.offset < extent.end:
            if at < other.offset:
                yield Extent(at, other.offset - at, extent.kind)
            at = max(at, other.end)
            if at >= extent.end:
                break
            other = next(rest, None)
        if at < extent.end:
            yield Extent(at, extent.end - at, extent.kind)


def _sum(extents: Iterable[Extent]) -> Amount:
    length = count = 0
    for extent in extents:
        length += extent.length
        count += 1
    return Amount(length, count)
