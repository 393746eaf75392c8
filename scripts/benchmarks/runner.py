"""Carries experiments out: in rounds, each contender once in each, so that what the machine does meanwhile meets all alike."""

from __future__ import annotations

import datetime as dt
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence

import cowkit
from scripts.benchmarks.bench import Bench
from scripts.benchmarks.diff_rows import RECIPE
from scripts.benchmarks.model import COWKIT, NBDKIT, QEMU, BenchError, Experiment, UnavailableError
from scripts.benchmarks.results import Line, Results
from scripts.benchmarks.servers import need

_QUICK_CONTENDERS = {COWKIT, NBDKIT, QEMU, RECIPE}
_PACKAGES = {"fio": "fio", "nbdcopy": "libnbd-bin", "qemu-img": "qemu-utils"}
_VERSIONS = ("fio", "nbdkit", "qemu-nbd", "nbdcopy", "nbd-server")


def run(
    bench: Bench,
    experiments: Sequence[Experiment],
    wanted: Iterable[str],
    *,
    rounds: int,
    sparing: bool = False,
    progress: Callable[[int, str], None],
) -> Results:
    """Carry out ``experiments``; the rows called ``wanted`` are in the results.

    :param sparing: whoever decides no target is measured in every third round only, to have time for those who do.
    :param progress: called before each measurement with the number of those that are done, and what is next.
    """
    begun = time.monotonic()
    date = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    results = Results(date, bench.quick, rounds, bench.seconds, _versions())
    names = set(wanted)
    done = 0
    for experiment in experiments:
        lines = {row.name: Line(experiment.group, row) for row in experiment.rows}
        results.lines.extend(line for name, line in lines.items() if name in names)
        out: dict[str, str] = {}
        for contender in turns_of(experiment, rounds, sparing=sparing, quick=bench.quick):
            progress(done, f"{experiment.rows[0].name}: {contender}")
            done += 1
            if contender not in out:
                _measure(bench, experiment, contender, lines, out)
        results.elapsed = time.monotonic() - begun
    return results


def turns_of(experiment: Experiment, rounds: int, *, sparing: bool, quick: bool) -> list[str]:
    """Who is measured when, round by round; see :func:`run`."""
    if experiment.rounds is not None:
        rounds = min(rounds, experiment.rounds)
    judged = experiment.judged
    return [
        name
        for number in range(rounds)
        for name in experiment.contenders
        if not quick or name in _QUICK_CONTENDERS
        if not sparing or name in judged or number % 3 == 0
    ]


def _measure(bench: Bench, experiment: Experiment, contender: str, lines: dict[str, Line], out: dict[str, str]) -> None:
    try:
        for program in experiment.programs:
            need(program, _PACKAGES[program])
        values = experiment.measure(bench, contender)
    except (UnavailableError, BenchError) as error:
        out[contender] = note = " ".join(str(error).split())
        for line in lines.values():
            line.notes[contender] = note
            line.samples.pop(contender, None)
        return
    for name, value in values.items():
        lines[name].samples.setdefault(contender, []).append(value)


def _versions() -> dict[str, str]:
    found = {"cowkit": cowkit.__version__}
    for program in _VERSIONS:
        if shutil.which(program) is None:
            continue
        try:
            done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        match = re.search(r"\d+(?:\.\d+)+", done.stdout + done.stderr)
        if match:
            found[program] = match[0]
    return found
