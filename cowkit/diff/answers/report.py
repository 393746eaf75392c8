"""All the answers about one difference, as Python, JSON and people have them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

from cowkit.diff.answers.amounts import Amounts
from cowkit.diff.answers.file_change import FileSystemChanges
from cowkit.diff.answers.image_size import Estimate
from cowkit.diff.report_parts import extents_to_json
from cowkit.disk.extent import Extent, Kind

TableState = Literal["none", "same", "changed", "added", "removed", "damaged"]
"""What became of the partition table: there is none and was none, it is as it was, and so on; damaged: it cannot be read now."""

SCHEMA = 1
"""The version of what :meth:`ChangesReport.to_json` returns; new members do not change it."""


class PartitionChanges(NamedTuple):
    """What became of a partition, of the table that is there now. Offset and size are in bytes."""

    number: int
    """As the Linux kernel counts."""
    offset: int
    size: int
    file_system: str | None
    """What lies there now, told by its magic number: ``"ext4"``, ``"swap"`` and so on; None if that is nothing known."""
    amounts: Amounts

    def to_json(self) -> dict[str, object]:
        """The same as JSON has it."""
        place = {"number": self.number, "offset": self.offset, "size": self.size, "file_system": self.file_system}
        return {**place, **self.amounts.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What :meth:`to_json` made."""
        return cls(data["number"], data["offset"], data["size"], data["file_system"], Amounts.from_json(data))


class ChangesReport(NamedTuple):
    """What is different between two states of a disk. All amounts are in bytes unless they say otherwise."""

    base: str | None
    """The earlier state as messages call it: the base, or a checkpoint; None for a blank disk."""
    size: int
    """Of the disk."""
    block_size: int
    """The unit of what is dirty."""
    amounts: Amounts
    """Of the whole disk."""
    partition_table: TableState
    file_system: str | None
    """What takes the whole disk, where there is no partition table; None if that is nothing known."""
    partitions: tuple[PartitionChanges, ...]
    """In the order of the disk."""
    unpartitioned: Amounts | None
    """Of what is in no partition: the table itself, gaps; None where there is no table."""
    dirty: tuple[Extent, ...]
    """What was written (``DATA``) or zeroed (``ZERO``), in order."""
    changed: tuple[Extent, ...]
    """What differs, in order: ``ZERO`` where it reads as zeroes now, ``DATA`` elsewhere."""
    bytes_read: int
    seconds: float
    estimate: Estimate | None = None
    """How large an image of it would be; None unless asked for."""
    files: tuple[FileSystemChanges, ...] | None = None
    """Which files changed; None unless asked for."""
    base_size: int | None = None
    """Of the earlier state; None for a blank disk, and where it is not known."""
    resized: bool = False
    """Whether the disk has another size than the earlier state, which is a change, too: to the byte, where both are known to it."""

    def to_json(self) -> dict[str, object]:
        """The report as JSON has it; ``schema`` is the version of its form (``schema.json`` here describes it)."""
        return {
            "schema": SCHEMA,
            "base": self.base,
            "size": self.size,
            "base_size": self.base_size,
            "resized": self.resized,
            "block_size": self.block_size,
            **self.amounts.to_json(),
            "partition_table": self.partition_table,
            "file_system": self.file_system,
            "partitions": [each.to_json() for each in self.partitions],
            "unpartitioned": None if self.unpartitioned is None else self.unpartitioned.to_json(),
            "estimate": None if self.estimate is None else self.estimate.to_json(),
            "files": None if self.files is None else [each.to_json() for each in self.files],
            "bytes_read": self.bytes_read,
            "seconds": round(self.seconds, 6),
            "dirty": extents_to_json(self.dirty),
            "changed": extents_to_json(self.changed),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What :meth:`to_json` made."""
        loose, estimate, files = data["unpartitioned"], data["estimate"], data["files"]
        return cls(
            base=data["base"],
            size=data["size"],
            block_size=data["block_size"],
            amounts=Amounts.from_json(data),
            partition_table=data["partition_table"],
            file_system=data["file_system"],
            partitions=tuple(map(PartitionChanges.from_json, data["partitions"])),
            unpartitioned=None if loose is None else Amounts.from_json(loose),
            dirty=_extents_from_json(data["dirty"]),
            changed=_extents_from_json(data["changed"]),
            bytes_read=data["bytes_read"],
            seconds=data["seconds"],
            estimate=None if estimate is None else Estimate.from_json(estimate),
            files=None if files is None else tuple(map(FileSystemChanges.from_json, files)),
            base_size=data["base_size"],
            resized=data["resized"],
        )


def _extents_from_json(data: list[dict[str, Any]]) -> tuple[Extent, ...]:
    return tuple(Extent(each["offset"], each["length"], Kind(each["kind"])) for each in data)
