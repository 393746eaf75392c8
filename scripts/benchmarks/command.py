"""The command: its arguments, and what is printed and written."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scripts.benchmarks import markdown, picture
from scripts.benchmarks.bench import Bench
from scripts.benchmarks.catalog import choose
from scripts.benchmarks.interrupts import raised
from scripts.benchmarks.model import BenchError, Experiment
from scripts.benchmarks.results import Results
from scripts.benchmarks.runner import run, turns_of
from scripts.benchmarks.table import print_table

_DESCRIPTION = (
    "Measure cowkit beside nbdkit's cow filter, qemu-nbd --snapshot and nbd-server, in turn within one run: same image, same "
    "client, medians of alternating rounds. docs/speed.md tells what each row is."
)
_SECONDS, _QUICK_SECONDS = 0.5, 0.4
_ROUNDS, _QUICK_ROUNDS = 5, 2


def main(arguments: Sequence[str]) -> int:
    """Carry the command out.

    :returns: 0 done; 1 with `--check`: a target is missed; 2 it could not be done; 130 or 143 ended by a signal.
    """
    given = _parser().parse_args(arguments)
    try:
        experiments, wanted = choose(given.only, quick=given.quick)
        if given.list:
            for row in (row for one in experiments for row in one.rows if row.name in wanted):
                targets = "; ".join(target.text(row) for target in row.targets)
                print(f"{row.name:22} {row.title} [{row.unit}]" + (f"; target {targets}" if targets else ""))
            return 0
        outputs = _outputs(given)
        with raised():
            results = _measure(given, experiments, wanted)
        # A pipe has no width of its own: rows are not to be broken there.
        console = Console() if sys.stdout.isatty() else Console(width=240)
        print_table(console, results)
        for path, text in outputs:
            _write(path, text(results))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
    for failure in results.failures:
        print(f"bench: {failure}", file=sys.stderr)
    if results.failures:
        return 2
    if given.check and results.missed:
        print(f"bench: below target: {', '.join(results.missed)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=_DESCRIPTION)
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer rows, shorter and less often: under two minutes")
    add(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="rows of that name, beginning or pattern (repeatable)",
    )
    add("--list", action="store_true", help="list the rows and their targets, and measure nothing")
    add("--rounds", type=_positive, metavar="N",
        help=f"how often each is measured (default: {_ROUNDS}, but every third time where no target is at stake)")  # fmt: skip
    add("--seconds", type=_seconds, metavar="S", help=f"how long fio runs each time (default: {_SECONDS:g})")
    add("--dir", default=tempfile.gettempdir() if "TMPDIR" in os.environ else "/var/tmp", metavar="DIR",
        help="where image and overlays are, 6 GiB at most (default: $TMPDIR, or /var/tmp)")  # fmt: skip
    add("--json", metavar="FILE", help="write all figures as JSON")
    add("--svg", metavar="FILE", help="draw the picture")
    add("--markdown", metavar="FILE", help="write the table, between the two markers if FILE has them")
    add("--check", action="store_true", help="exit with 1 if a target is missed")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is no number of rounds: at least 1")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not math.isfinite(number) or not 0.05 <= number <= 600:
        raise argparse.ArgumentTypeError(f"{text} is no length of time from 0.05 to 600 seconds")
    return number


Writer = Callable[[Results], str]


def _outputs(given: argparse.Namespace) -> list[tuple[str, Writer]]:
    """The files to write, and how. Looked at before minutes of measuring.

    :raises BenchError: one could not be written.
    """
    found: list[tuple[str, Writer]] = []
    if given.json is not None:
        found.append((given.json, lambda results: json.dumps(results.to_json(), indent=1) + "\n"))
    if given.svg is not None:
        found.append((given.svg, picture.draw))
    if given.markdown is not None:
        found.append((given.markdown, lambda results: markdown.put(_read(given.markdown), results)))
        markdown.check(_read(given.markdown), given.markdown)
    for path, _ in found:
        folder = os.path.dirname(path) or "."
        if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
            raise BenchError(f"{path} cannot be written: its folder must exist and be writable")
    return found


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from None


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from None


def _measure(given: argparse.Namespace, experiments: Sequence[Experiment], wanted: set[str]) -> Results:
    rounds = given.rounds or (_QUICK_ROUNDS if given.quick else _ROUNDS)
    seconds = given.seconds or (_QUICK_SECONDS if given.quick else _SECONDS)
    sparing = given.rounds is None and not given.quick
    steps = sum(len(turns_of(one, rounds, sparing=sparing, quick=given.quick)) for one in experiments)
    with Bench(given.dir, seconds=seconds, quick=given.quick) as bench, _progress(steps) as progress:
        return run(bench, experiments, wanted, rounds=rounds, sparing=sparing, progress=progress)


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[int, str], None]]:
    """A bar on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    # Drawn when something begins, never by a thread of its own: that would take time from what is measured.
    with Progress(
        *columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=steps)

        def show(done: int, what: str) -> None:
            bar.update(task, completed=done, description=what, refresh=True)

        yield show
