"""What came of a run, and its form as JSON."""

from __future__ import annotations

import os
import platform
import re
import statistics
from dataclasses import dataclass, field

from scripts.benchmarks.model import COWKIT, Row, times_better

SCHEMA = 1
"""The version of what :meth:`Results.to_json` returns; new keys do not change it."""


@dataclass
class Line:
    """A row with its figures."""

    group: str
    row: Row
    samples: dict[str, list[float]] = field(default_factory=dict)
    """By contender, in the order of the rounds."""
    notes: dict[str, str] = field(default_factory=dict)
    """By contender: why it has no figure."""

    @property
    def shown(self) -> set[str]:
        """Who has a figure, or a reason why there is none."""
        return {*self.samples, *self.notes}

    @property
    def medians(self) -> dict[str, float]:
        """By contender."""
        return {name: statistics.median(values) for name, values in self.samples.items() if values}

    def ratio(self, peer: str) -> float | None:
        """How many times better cowkit is than ``peer``."""
        return times_better(self.row, self.medians, peer)

    def verdicts(self) -> list[tuple[str, bool | None]]:
        """Each target in words, and whether it is met; None where that cannot be said."""
        medians = self.medians
        return [(target.text(self.row), target.is_met(self.row, medians)) for target in self.row.targets]


@dataclass
class Results:
    """A whole run."""

    date: str
    """When it began: ISO 8601."""
    quick: bool
    rounds: int
    seconds: float
    versions: dict[str, str]
    lines: list[Line] = field(default_factory=list)
    elapsed: float = 0.0
    """How long it took, in seconds."""

    @property
    def missed(self) -> list[str]:
        """The names of the rows with a target that is not met."""
        return [line.row.name for line in self.lines if any(met is False for _, met in line.verdicts())]

    @property
    def failures(self) -> list[str]:
        """What of cowkit's own could not be measured."""
        return [f"{line.row.name}: {line.notes[COWKIT]}" for line in self.lines if COWKIT in line.notes]

    @property
    def notes(self) -> list[str]:
        """Why figures are missing, each reason once."""
        found: dict[str, None] = {}
        for line in self.lines:
            for contender, note in line.notes.items():
                found[f"{contender}: {note}"] = None
        return list(found)

    def machine(self) -> dict[str, object]:
        """What the figures depend on."""
        return {
            "cores": len(os.sched_getaffinity(0)),
            "system": " ".join([platform.system(), *re.findall(r"^\d+\.\d+", platform.release())]),
            "python": platform.python_version(),
            "machine": platform.machine(),
        }

    def to_json(self) -> dict[str, object]:
        """The run as JSON has it: numbers, strings, lists and dictionaries."""
        return {
            "schema": SCHEMA,
            "date": self.date,
            "elapsed_seconds": round(self.elapsed, 1),
            "quick": self.quick,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "machine": self.machine(),
            "versions": self.versions,
            "rows": [_line_to_json(line) for line in self.lines],
        }


def _line_to_json(line: Line) -> dict[str, object]:
    medians = line.medians
    return {
        "name": line.row.name,
        "group": line.group,
        "title": line.row.title,
        "unit": line.row.unit,
        "better": line.row.better,
        "medians": medians,
        "samples": line.samples,
        "times_better": {peer: line.ratio(peer) for peer in medians if peer != COWKIT},
        "targets": [{"target": text, "met": met} for text, met in line.verdicts()],
        "notes": line.notes,
    }
