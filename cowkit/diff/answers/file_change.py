"""What became of a file of a file system on the disk."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

ChangeKind = Literal["added", "removed", "changed", "renamed"]


class FileChange(NamedTuple):
    """One path that is not what it was. Bytes of a name that are no UTF-8 are surrogates, as in :func:`os.fsdecode`."""

    path: str
    """From the root of its file system, with a slash first."""
    change: ChangeKind
    type: str
    """``"file"``, ``"directory"``, ``"symlink"``, ``"fifo"``, ``"socket"``, ``"block device"`` or ``"character device"``."""
    what: tuple[str, ...] = ()
    """What changed of it: of ``"content"``, ``"type"``, ``"mode"``, ``"owner"``, ``"times"``, ``"target"``, ``"device"``,
    ``"attributes"`` (extended ones) and ``"flags"``."""
    size: int | None = None
    """In bytes, now; of files."""
    size_before: int | None = None
    renamed_from: str | None = None
    """The path that it had."""

    def to_json(self) -> dict[str, object]:
        """The same as JSON has it."""
        return {**self._asdict(), "what": list(self.what)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What :meth:`to_json` made."""
        return cls(**{**data, "what": tuple(data["what"])})

    def __str__(self) -> str:
        mark = {"added": "A", "removed": "D", "changed": "M", "renamed": "R"}[self.change]
        name = f"{self.renamed_from} -> {self.path}" if self.renamed_from is not None else self.path
        slash = "/" if self.type == "directory" and not name.endswith("/") else ""
        return f"{mark} {name}{slash}" + (f"  ({', '.join(self.what)})" if self.what else "")


class FileSystemChanges(NamedTuple):
    """What became of the files of one file system."""

    partition: int | None
    """The number of its partition; None where it takes the whole disk."""
    file_system: str | None
    """``"ext4"`` and so on, now; what it was, where there is none any more; None where nothing known is or was."""
    changes: tuple[FileChange, ...]
    """In the order of paths."""
    problem: str | None = None
    """Why its files cannot be told; then there are no ``changes``."""

    def to_json(self) -> dict[str, object]:
        """The same as JSON has it."""
        return {**self._asdict(), "changes": [each.to_json() for each in self.changes]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What :meth:`to_json` made."""
        return cls(**{**data, "changes": tuple(map(FileChange.from_json, data["changes"]))})
