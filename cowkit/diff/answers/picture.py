"""A picture of where a disk changed, as SVG: one bar for the disk, and one for each of its partitions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby

from cowkit.diff.answers.report import ChangesReport
from cowkit.diff.answers.strip import Cell, cells
from cowkit.disk.sizes import format_size

_WIDTH = 1000
_MARGIN = 20
_BAR = 36
_ROW = 92
_HEAD = 64

_STYLE = """\
  text { font: 14px sans-serif; fill: #222 }
  .title { font-size: 18px; font-weight: bold }
  .small { font-size: 12px; fill: #666 }
  .page { fill: #fff }
  .unchanged { fill: #e6e8eb }
  .changed { fill: #d9480f }
  .zeroed { fill: #1c7ed6 }
  .identical { fill: #8fbf8f }
  .partition { fill: none; stroke: #222; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    text { fill: #eee } .small { fill: #aaa } .page { fill: #1b1d20 } .unchanged { fill: #34383d } .partition { stroke: #eee }
  }"""

_LEGEND = (
    ("unchanged", "unchanged"),
    ("changed", "changed (the fuller, the stronger)"),
    ("zeroed", "reads as zeroes now"),
    ("identical", "written, the same as before"),
)


def picture(report: ChangesReport, title: str) -> str:
    """The picture of ``report``, a whole SVG document; every bar is the disk or a partition from its first to its last byte."""
    height = _HEAD + _ROW * (1 + len(report.partitions)) + 40
    width = _WIDTH + 2 * _MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{_text(title)}</title>",
        f"<style>\n{_STYLE}\n</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
        f'<text class="title" x="{_MARGIN}" y="32">{_text(title)}</text>',
        f'<text class="small" x="{_MARGIN}" y="52">{_text(summary(report))}</text>',
    ]
    what = report.file_system or ("partitioned" if report.partitions else "disk")
    lines += _bar(report, _HEAD, f"{what}, {format_size(report.size)}", 0, report.size)
    lines += _frames(report, _HEAD + 24)
    for index, each in enumerate(report.partitions, 1):
        label = f"partition {each.number}: {each.file_system or 'unknown content'}, {format_size(each.size)} at {each.offset}"
        label += f"; {each.amounts.changed} {changed_word(report)}"
        lines += _bar(report, _HEAD + _ROW * index, label, each.offset, each.offset + each.size)
    lines += _legend(height - 24)
    return "\n".join([*lines, "</svg>", ""])


def changed_word(report: ChangesReport) -> str:
    """What to call what is on the disk and not on its base; where there is none, nothing has changed."""
    return "of the disk's data" if report.base is None else "changed"


def summary(report: ChangesReport) -> str:
    """The main figures in a line."""
    found = report.amounts
    was = f" (was {format_size(report.base_size or 0)})" if report.resized else ""
    return (
        f"{format_size(report.size)}{was}: {found.changed} {changed_word(report)}, {format_size(found.zeroed.bytes)} of it zeroed; "
        f"{format_size(found.identical.bytes)} more written but the same"
    )


def _bar(report: ChangesReport, top: int, label: str, start: int, end: int) -> Iterator[str]:
    yield f'<text x="{_MARGIN}" y="{top + 16}">{_text(label)}</text>'
    y = top + 24
    yield f'<rect class="unchanged" x="{_MARGIN}" y="{y}" width="{_WIDTH}" height="{_BAR}"/>'
    parts = cells(report.changed, _WIDTH, start, end, report.dirty)
    at = 0
    for (kind, strength), run in groupby(parts, key=_look):
        count = len(list(run))
        if kind:
            first = start + at * (end - start) // _WIDTH
            last = start + (at + count) * (end - start) // _WIDTH
            opacity = f' fill-opacity="{strength / 10}"' if strength < 10 else ""
            yield (
                f'<rect class="{kind}" x="{_MARGIN + at}" y="{y}" width="{count}" height="{_BAR}"{opacity}>'
                f"<title>bytes {first} to {last}</title></rect>"
            )
        at += count
    yield f'<text class="small" x="{_MARGIN}" y="{y + _BAR + 14}">{start}</text>'
    yield f'<text class="small" x="{_MARGIN + _WIDTH}" y="{y + _BAR + 14}" text-anchor="end">{end}</text>'


def _look(cell: Cell) -> tuple[str, int]:
    """Which kind of part it is, and how strong its colour: 3 to 10 tenths, so that the least change can be seen."""
    if not cell.changed:
        return ("identical", 10) if cell.dirty else ("", 0)
    kind = "zeroed" if cell.zeroed > cell.changed / 2 else "changed"
    return kind, min(10, 3 + int(cell.changed * 7 + 1e-9))


def _frames(report: ChangesReport, y: int) -> Iterator[str]:
    for each in report.partitions:
        if report.size:
            x, width = each.offset * _WIDTH / report.size, max(1.0, each.size * _WIDTH / report.size)
            yield (
                f'<rect class="partition" x="{_MARGIN + x:.1f}" y="{y - 2}" width="{width:.1f}" height="{_BAR + 4}">'
                f"<title>partition {each.number}</title></rect>"
            )


def _legend(y: int) -> Iterable[str]:
    x = _MARGIN
    for kind, words in _LEGEND:
        yield f'<rect class="{kind}" x="{x}" y="{y - 11}" width="14" height="14"/>'
        yield f'<text class="small" x="{x + 20}" y="{y}">{words}</text>'
        x += 260


def _text(words: str) -> str:
    """``words`` within XML, which has no control characters; a file's name may contain anything."""
    readable = words.encode("utf-8", "replace").decode()
    return escape("".join(each if each.isprintable() else "\ufffd" for each in readable))
