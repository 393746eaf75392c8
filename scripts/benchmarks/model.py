"""The words of the benchmark: rows, targets, experiments. Data alone; nothing here runs anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from scripts.benchmarks.bench import Bench

COWKIT = "cowkit"
NBDKIT = "nbdkit-cow"
NBDKIT_4K = "nbdkit-cow-4k"
QEMU = "qemu-nbd"

Better = Literal["higher", "lower"]


class UnavailableError(Exception):
    """A contender cannot take part in a row; the text says why, and what to install."""


class BenchError(Exception):
    """Something that should have worked did not; the text says what."""


def times_better(row: Row, medians: Mapping[str, float], peer: str) -> float | None:
    """How many times better cowkit is than ``peer``: over 1 where it is ahead. None where either was not measured."""
    ours, theirs = medians.get(COWKIT), medians.get(peer)
    if ours is None or theirs is None:
        return None
    over, under = (ours, theirs) if row.better == "higher" else (theirs, ours)
    return over / under if under else None


class Target(Protocol):
    """What a row is to reach."""

    def text(self, row: Row) -> str:
        """The target in a few words."""

    def is_met(self, row: Row, medians: Mapping[str, float]) -> bool | None:
        """Whether it is met by the medians of one run, by contender; None where what it needs was not measured."""

    @property
    def contenders(self) -> tuple[str, ...]:
        """Whose figures decide it."""


@dataclass(frozen=True)
class Times:
    """cowkit is at least ``factor`` times better than ``peer``."""

    factor: float
    peer: str

    def text(self, row: Row) -> str:
        """See :class:`Target`."""
        return f"{self.factor:g}× {self.peer}"

    def is_met(self, row: Row, medians: Mapping[str, float]) -> bool | None:
        """See :class:`Target`."""
        ratio = times_better(row, medians, self.peer)
        return None if ratio is None else ratio >= self.factor

    @property
    def contenders(self) -> tuple[str, ...]:
        """See :class:`Target`."""
        return COWKIT, self.peer


@dataclass(frozen=True)
class Limit:
    """cowkit's value, in the row's unit, is no worse than ``value``."""

    value: float

    def text(self, row: Row) -> str:
        """See :class:`Target`."""
        return f"{'≥' if row.better == 'higher' else '≤'} {self.value:g} {row.unit}".rstrip()

    def is_met(self, row: Row, medians: Mapping[str, float]) -> bool | None:
        """See :class:`Target`."""
        ours = medians.get(COWKIT)
        if ours is None:
            return None
        return ours >= self.value if row.better == "higher" else ours <= self.value

    @property
    def contenders(self) -> tuple[str, ...]:
        """See :class:`Target`."""
        return (COWKIT,)


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure of each contender."""

    name: str
    """What `--only` takes: letters, digits and dashes."""
    title: str
    unit: str
    better: Better = "higher"
    targets: tuple[Target, ...] = ()
    picture: bool = False
    """Whether the picture shows it."""


Measure = Callable[["Bench", str], Mapping[str, float]]
"""Measures one contender once: the value of each row, by its name."""


@dataclass(frozen=True)
class Experiment:
    """Something that is measured at once, and gives one or more rows."""

    group: str
    rows: tuple[Row, ...]
    contenders: tuple[str, ...]
    """In the order of a round; cowkit first."""
    measure: Measure
    programs: tuple[str, ...] = ()
    """What it needs besides the contenders' own programs, from PATH."""
    quick: bool = False
    """Whether `--quick` has it."""
    rounds: int | None = None
    """At most so many; as many as asked for, unless given."""

    @property
    def judged(self) -> frozenset[str]:
        """The contenders whose figures decide a target."""
        return frozenset(name for row in self.rows for target in row.targets for name in target.contenders)
