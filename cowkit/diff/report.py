"""What came of a difference: how much was dirty, how much of it really changed, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from cowkit.diff.report_parts import extents_to_json, resize_note
from cowkit.disk.extent import Extent, Kind
from cowkit.disk.sizes import format_size

if TYPE_CHECKING:
    from cowkit.diff.answers.report import ChangesReport

SCHEMA = 1
"""The version of what :meth:`DiffReport.to_json` returns; new keys do not change it."""


class DiffReport(NamedTuple):
    """A difference that was written. All amounts are in bytes unless they say otherwise.

    *Dirty* was written or zeroed; *changed* differs from the base, in blocks of the disk (or clusters of the image,
    where those are smaller): what of the base is data is read to know it, also under what was zeroed.
    """

    path: str
    """Where the image is, as it was asked for."""
    backing_file: str | None
    """The name of the base as it is recorded in the image; None for a blank disk."""
    backing_format: str | None
    virtual_size: int
    """The disk's size as the image has it: rounded up to 512 bytes."""
    cluster_size: int
    dirty_bytes: int
    dirty_extents: int
    """How many runs: neighbours that were written and neighbours that were zeroed count apart."""
    changed_bytes: int
    """What differs from the base, what is zeroed included."""
    changed_extents: int
    zeroed_bytes: int
    """The part of what is changed that reads as zeroes now."""
    zeroed_extents: int
    bytes_read: int
    """From the base and from what was written; at most 256 KiB of it to recognise the base by. What QEMU's programs read of
    the base's own file they do not tell."""
    bytes_written: int
    """To the image; holes of its file are not counted. What QEMU's programs wrote: the room that the file takes."""
    seconds: float
    changed: tuple[Extent, ...]
    """What differs, in order: ``ZERO`` where it reads as zeroes now, ``DATA`` elsewhere."""
    engine: str = "native"
    """Who wrote the image."""
    format: str = "qcow2"
    """The image's format as QEMU names it."""
    changes: ChangesReport | None = None
    """More about the very same moment, where that was asked for."""
    size: int = 0
    """Of the disk, to the byte."""
    base_size: int | None = None
    """Of the state before; None for a blank disk, which has none."""
    subclusters: bool = False
    """Whether the image's clusters are divided by 32: QEMU before 5.2 cannot read it then."""
    since: str | None = None
    """The checkpoint that is the state before: what is said here of the base is said of it. None: the base, or a blank disk."""
    resized: bool = False
    """Whether the disk has another size than the state before, which is a change, too: to the byte, where both are known to it."""

    @property
    def identical_bytes(self) -> int:
        """What is dirty and yet the same as in the state before."""
        return self.dirty_bytes - self.changed_bytes

    def to_json(self) -> dict[str, object]:
        """The report as JSON has it: numbers, strings, lists and dictionaries; ``schema`` is the version of its form."""
        return {
            "schema": SCHEMA,
            "path": self.path,
            "backing_file": self.backing_file,
            "backing_format": self.backing_format,
            "virtual_size": self.virtual_size,
            "size": self.size,
            "base_size": self.base_size,
            "resized": self.resized,
            "since": self.since,
            "cluster_size": self.cluster_size,
            "subclusters": self.subclusters,
            "dirty_bytes": self.dirty_bytes,
            "dirty_extents": self.dirty_extents,
            "changed_bytes": self.changed_bytes,
            "changed_extents": self.changed_extents,
            "zeroed_bytes": self.zeroed_bytes,
            "zeroed_extents": self.zeroed_extents,
            "identical_bytes": self.identical_bytes,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 6),
            "engine": self.engine,
            "format": self.format,
            "changed": extents_to_json(self.changed),
            **({} if self.changes is None else {"changes": self.changes.to_json()}),
        }

    def summary(self) -> str:
        """A few lines for people."""
        on = f" on top of {self.backing_file}" if self.backing_file is not None else ""
        lines = [f"{self.path}: {format_size(self.changed_bytes)} changed in {_extents(self.changed_extents)}{on}"]
        if self.resized:
            lines.append(f"  {resize_note(self.size, self.base_size)}")
        if self.zeroed_bytes:
            lines.append(f"  {format_size(self.zeroed_bytes)} of it zeroed in {_extents(self.zeroed_extents)}")
        if self.identical_bytes:
            lines.append(f"  {format_size(self.identical_bytes)} more were written but are {self._as_before}")
        if self.subclusters:
            lines.append("  with subclusters, for QEMU 5.2 and later")
        lines.append(
            f"  read {format_size(self.bytes_read)}, wrote {format_size(self.bytes_written)} in {self.seconds:.2f} s"
        )
        return "\n".join(lines)

    @property
    def _as_before(self) -> str:
        if self.since is not None:
            return f"as at checkpoint {self.since}"
        return "zeroes, as before" if self.base_size is None else "the same as in the base"


def _extents(count: int) -> str:
    return f"{count} extent{'' if count == 1 else 's'}"


def count_changed(extents: Iterable[Extent]) -> tuple[int, int, int, int]:
    """Bytes and number of changed extents, then of those that are zeroed.

    Neighbours of different kinds count as one changed extent.
    """
    total = count = zeroed = zeroed_count = 0
    end = -1
    for extent in extents:
        total += extent.length
        count += extent.offset != end
        end = extent.end
        if extent.kind is Kind.ZERO:
            zeroed += extent.length
            zeroed_count += 1
    return total, count, zeroed, zeroed_count
