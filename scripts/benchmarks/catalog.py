"""All experiments, in the order of the table, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from scripts.benchmarks import busy_rows, copy_rows, diff_rows, fio_rows, life_rows
from scripts.benchmarks.model import BenchError, Experiment, Row

EXPERIMENTS: tuple[Experiment, ...] = (
    *fio_rows.EXPERIMENTS,
    *copy_rows.EXPERIMENTS,
    *life_rows.EXPERIMENTS,
    *busy_rows.EXPERIMENTS,
    *diff_rows.EXPERIMENTS,  # last: they need a larger image
)


def rows_of(experiments: Sequence[Experiment]) -> list[Row]:
    """Their rows."""
    return [row for experiment in experiments for row in experiment.rows]


def choose(patterns: Sequence[str], *, quick: bool) -> tuple[list[Experiment], set[str]]:
    """The experiments to carry out, and the names of the rows to show.

    :param patterns: names of rows, beginnings of names, or patterns with ``*``, ``?`` and ``[]``; all rows if there are none.
    :param quick: without patterns: only those that `--quick` has.
    :raises BenchError: a pattern stands for no row.
    """
    if not patterns:
        chosen = [experiment for experiment in EXPERIMENTS if experiment.quick or not quick]
        return chosen, {row.name for row in rows_of(chosen)}
    names = [row.name for row in rows_of(EXPERIMENTS)]
    wanted: set[str] = set()
    for pattern in patterns:
        # A whole name means that row alone, though others may begin with it.
        found = [name for name in names if name == pattern] or [
            name for name in names if name.startswith(pattern) or fnmatchcase(name, pattern)
        ]
        if not found:
            raise BenchError(f"no row is called {pattern!r}; there are: {', '.join(names)}")
        wanted.update(found)
    return [one for one in EXPERIMENTS if any(row.name in wanted for row in one.rows)], wanted
