"""The asserts themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TypeAlias

from cowkit.cow_disk import CowDisk
from cowkit.disk import Base, Checkpoint
from cowkit.disk.sizes import parse_size
from cowkit.disk.view_base import ViewBase
from cowkit.errors import UsageError
from cowkit.testing.contents import (
    Comparable,
    HostedContent,
    PaddedContent,
    open_base_of,
    open_checkpoint_of,
    open_content,
    what_may_differ,
)
from cowkit.testing.differences import Differences, find_differences
from cowkit.testing.hexdump import hexdump
from cowkit.testing.structures import structure_at

Range: TypeAlias = tuple[int | str, int | str]
"""Offset and length, in bytes or as sizes such as ``"1M"``."""


def assert_same(disk: Comparable, other: Comparable, ranges: Sequence[Range] | None = None) -> None:
    """That ``disk`` holds the very bytes that ``other`` does, and is as large.

    Only what can differ is read: holes are not, and of two disks of one base (or a disk and its base) what was written.

    :param ranges: compare only these, which both must have; then their sizes may differ.
    :raises AssertionError: they differ; it says where, in which structure of the disk, and shows the bytes.
    :raises UsageError: there is no range, or one is not within both, or what was given cannot be compared.
    :raises CowkitError: one cannot be opened or read.
    """
    __tracebackhide__ = True
    with ExitStack() as opened:
        actual, expected = (_entered(open_content(each), opened) for each in (disk, other))
        message = _compare(actual, expected, ranges, _name(disk, actual), _name(other, expected))
    if message is not None:
        raise AssertionError(message)


def assert_unchanged(
    disk: CowDisk, ranges: Sequence[Range] | None = None, *, since: Checkpoint | str | None = None
) -> None:
    """That ``disk`` is as its base is (a blank one: zeroes), whether it was written to or not.

    :param ranges: only in these; in all of it unless given.
    :param since: as it was at this checkpoint, instead.
    :raises AssertionError: something changed; it says where, in which structure of the disk, and shows the bytes.
    :raises UsageError: it is no disk of cowkit's, or there is no range, or one is not within it.
    :raises CheckpointError: the disk has no such checkpoint.
    """
    __tracebackhide__ = True
    if not isinstance(disk, CowDisk):
        raise UsageError(f"only a CowDisk knows what it was: compare {disk!r} with something else, by assert_same")
    with ExitStack() as opened:
        if since is None:
            actual, expected = _entered(open_content(disk), opened), _entered(open_base_of(disk), opened)
            name = "its base"
        else:
            point = since if isinstance(since, str) else since.name
            name = f"checkpoint {point!r}"
            if disk._hosted is not None:
                expected = _entered(open_checkpoint_of(disk, since, opened), opened)
                actual = _entered(open_content(disk), opened)
            else:
                earlier, later = disk.engine.freeze_both(since)
                expected = _entered(ViewBase(earlier, name), opened)
                actual = _entered(ViewBase(later, disk.name), opened)
        written = None
        if isinstance(actual, HostedContent):
            written = [(each.offset, each.end) for each in disk.dirty_extents(since=since)]
        message = _compare(actual, PaddedContent(expected, disk.size), ranges, disk.name, name, written)
    if message is not None:
        raise AssertionError(message)


def _entered(content: Base, opened: ExitStack) -> Base:
    opened.callback(content.release)
    return content


def _name(thing: Comparable, content: Base) -> str:
    return thing.name if isinstance(thing, CowDisk) else content.given or type(thing).__name__


def _compare(
    actual: Base,
    expected: Base,
    ranges: Sequence[Range] | None,
    name: str,
    other: str,
    parts: Iterable[tuple[int, int]] | None = None,
) -> str | None:
    """What to say about how they differ; None: they do not.

    :param parts: where they may differ, if that is known.
    """
    if name == other:
        name, other = f"{name} (the disk)", f"{other} (the other)"
    smaller = min(actual.size, expected.size)
    wanted = [(0, smaller)] if ranges is None else _checked(ranges, smaller)
    if parts is None:
        parts = what_may_differ(actual, expected)
    found = find_differences(actual, expected, _within(parts, wanted))
    lines = []
    if ranges is None and actual.size != expected.size:
        lines.append(f"the size of {name} is {actual.size} bytes, and that of {other} {expected.size}")
    if found is not None:
        lines += _described(found, actual, expected, name, other)
    return "\n".join(lines) or None


def _checked(ranges: Sequence[Range], size: int) -> list[tuple[int, int]]:
    given = list(ranges)
    if not given:
        raise UsageError("ranges is empty, so nothing would be compared: give some, or leave it out to compare all")
    found = []
    for each in given:
        try:
            offset, length = each
        except (TypeError, ValueError):
            raise UsageError(f"a range is a pair of offset and length, not {each!r}") from None
        start, count = parse_size(offset, what="offset of a range"), parse_size(length, what="length of a range")
        if start + count > size:
            raise UsageError(f"range {each!r} ends at byte {start + count}, and there are {size}")
        if count:
            found.append((start, start + count))
    return sorted(found)


def _within(parts: Iterable[tuple[int, int]], ranges: list[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """What ``parts`` and ``ranges`` have in common; both are in order."""
    done = 0
    for start, end in parts:
        for first, last in ranges:
            low, high = max(start, first, done), min(end, last)
            if low < high:
                yield low, high
                done = high


def _described(found: Differences, actual: Base, expected: Base, name: str, other: str) -> Iterable[str]:
    runs = "1 extent" if found.total == 1 else f"{found.total} extents"
    count = "1 byte differs" if found.differing == 1 else f"{found.differing} bytes differ"
    so_far = "" if found.looked_to is None else f", up to byte {found.looked_to}, where looking ended"
    yield f"{name} is not as {other}: {count} in {runs}{so_far}"
    for (offset, length), differing in zip(found.extents, found.counts, strict=True):
        # Few equal bytes between ones that differ are part of an extent.
        where = f"{length} at" if differing == length else f"{differing} of the {length} from"
        yield f"  {where} byte {offset} (0x{offset:x}){_structure(actual, expected, offset)}"
    if found.total > len(found.extents):
        yield f"  and {found.total - len(found.extents)} more"
    yield f"the first, - {other}, + {name}:"
    yield from hexdump(actual, expected, found.first)


def _structure(actual: Base, expected: Base, offset: int) -> str:
    """By what was expected, if that tells: on the other one the structures themselves may be what is wrong."""
    found = structure_at(expected, offset) or structure_at(actual, offset)
    return "" if found is None else f": {found}"
