"""The results as a table on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scripts.benchmarks.figures import short, times, verdict
from scripts.benchmarks.model import COWKIT
from scripts.benchmarks.results import Line, Results
from scripts.benchmarks.servers import SERVERS, label_of

_STYLES = {True: "green", False: "bold red", None: "dim"}


def columns_of(lines: Sequence[Line]) -> list[str]:
    """Who has a column: whoever took part in some row, in the order of the servers."""
    there = {name for line in lines for name in line.shown}
    known = [name for name in SERVERS if name in there]
    return known + sorted(there - set(known))


def print_table(console: Console, results: Results) -> None:
    """Print the results, and below them why figures are missing."""
    columns = columns_of(results.lines)
    group = None
    table = Table(title="medians; in brackets, how many times better cowkit is", title_justify="left")
    table.add_column("row", no_wrap=True)
    table.add_column("unit")
    for name in columns:
        table.add_column(label_of(name), justify="right")
    table.add_column("target")
    for line in results.lines:
        if line.group != group:
            group = line.group
            table.add_section()
        cells: list[str | Text] = [Text(line.row.name, style="bold"), line.row.unit]
        cells.extend(_cell(line, name) for name in columns)
        cells.append(_targets(line))
        table.add_row(*cells)
    console.print(table)
    for note in results.notes:
        console.print(Text(note, style="yellow"))


def _cell(line: Line, name: str) -> str:
    if name not in line.shown:
        return ""
    value = short(line.medians.get(name))
    ratio = None if name == COWKIT else line.ratio(name)
    return value if ratio is None else f"{value} ({times(ratio)})"


def _targets(line: Line) -> Text:
    parts = [Text(f"{text}: {verdict(met)}", style=_STYLES[met]) for text, met in line.verdicts()]
    return Text("\n").join(parts)
