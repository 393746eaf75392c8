"""The results as a table in Markdown, put between two markers of a page."""

from __future__ import annotations

from scripts.benchmarks.figures import short, times, verdict
from scripts.benchmarks.model import COWKIT, BenchError
from scripts.benchmarks.results import Line, Results
from scripts.benchmarks.servers import label_of
from scripts.benchmarks.table import columns_of

BEGIN = "<!-- scripts/bench: begin -->"
END = "<!-- scripts/bench: end -->"


def check(page: str, path: str) -> None:
    """Whether the table can be put into ``page``.

    :raises BenchError: it has text, and not each marker once, in order.
    """
    if page.strip() and not (page.count(BEGIN) == page.count(END) == 1 and page.index(BEGIN) < page.index(END)):
        raise BenchError(
            f"{path} has no line {BEGIN} with a line {END} below it: nothing would be left of what it says"
        )


def put(page: str, results: Results) -> str:
    """``page`` with the table between its markers; an empty one becomes the markers with the table."""
    before, after = "", "\n"
    if page.strip():
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{render(results)}{END}{after}"


def render(results: Results) -> str:
    """The table, group by group, and what the run was."""
    machine = results.machine()
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    length = "quick run" if results.quick else "run"
    intro = (
        f"One {length} of {results.date[:10]}: {machine['cores']} cores, {machine['system']}, Python {machine['python']}; "
        f"{versions}. Medians of {results.rounds} rounds of {results.seconds:g} s; in brackets, how many times better cowkit is.\n"
    )
    parts = [intro]
    for group in dict.fromkeys(line.group for line in results.lines):
        lines = [line for line in results.lines if line.group == group]
        columns = columns_of(lines)
        head = [group, "unit", *map(label_of, columns), "target"]
        parts.append(_row(head) + _row(["---", "---", *["--:"] * len(columns), "---"]))
        parts[-1] += "".join(
            _row([line.row.title, line.row.unit, *_cells(line, columns), _targets(line)]) for line in lines
        )
    if results.notes:
        parts.append("".join(f"- {note}\n" for note in results.notes))
    return "\n".join(parts)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"


def _cells(line: Line, columns: list[str]) -> list[str]:
    found = []
    for name in columns:
        value = short(line.medians.get(name)) if name in line.shown else ""
        ratio = None if name == COWKIT else line.ratio(name)
        if name == COWKIT:
            value = f"**{value}**"
        found.append(value if ratio is None else f"{value} ({times(ratio)})")
    return found


def _targets(line: Line) -> str:
    return "<br>".join(f"{text}: {verdict(met)}" for text, met in line.verdicts())
