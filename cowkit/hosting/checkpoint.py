"""Checkpoints of disks that are in the host."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from cowkit.disk import Checkpoint

POINTS = ("since", "at")
"""The options of methods that are checkpoints."""


class HostedCheckpoint(Checkpoint):
    """Stands for a checkpoint that is in the host, where it has a ``number``. Made by :class:`HostedCheckpoints`."""

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name


class CheckpointArgument(NamedTuple):
    """A checkpoint on its way to the host."""

    number: int
    """Its number there; 0 for one of another disk."""
    name: str


class HostedCheckpoints:
    """Those of one disk: the same object for the same checkpoint as long as anybody has it."""

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[int, HostedCheckpoint] = weakref.WeakValueDictionary()

    def of(self, number: int, name: str) -> HostedCheckpoint:
        """The checkpoint of that number."""
        return self._known.setdefault(number, HostedCheckpoint(number, name))

    def argument(self, point: Checkpoint | str | None) -> CheckpointArgument | str | None:
        """``point`` as it is sent."""
        if not isinstance(point, Checkpoint):
            return point
        if isinstance(point, HostedCheckpoint) and self._known.get(point.number) is point:
            return CheckpointArgument(point.number, point.name)
        return CheckpointArgument(0, point.name)
