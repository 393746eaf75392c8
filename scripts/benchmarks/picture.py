"""The picture of the results: an SVG drawing with bars, for light and dark pages alike."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from scripts.benchmarks.figures import short, times
from scripts.benchmarks.model import COWKIT, NBDKIT, NBDKIT_4K, QEMU
from scripts.benchmarks.results import Line, Results
from scripts.benchmarks.servers import label_of

_SHOWN = (COWKIT, NBDKIT, NBDKIT_4K, QEMU)
_WIDTH = 900
_LABELS = 360  # the bars begin there, in pixels
_BARS = 400  # the length of the longest bar
_BAR, _GAP, _ROW_GAP, _TOP = 9, 2, 11, 58
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f; }
.title { font-size: 15px; font-weight: 600; }
.small { font-size: 10px; fill: #57606a; }
.b0 { fill: #1a7f5a; } .b1 { fill: #6e7781; } .b2 { fill: #9aa4ae; } .b3 { fill: #c5ccd3; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .small { fill: #9198a1; }
  .b0 { fill: #3fb983; } .b1 { fill: #959da8; } .b2 { fill: #6b737d; } .b3 { fill: #4a525b; }
}
"""


def draw(results: Results) -> str:
    """The rows that are meant for it: a bar for each contender, in parts of the row's largest figure."""
    lines = [line for line in results.lines if line.row.picture and COWKIT in line.medians]
    parts = [f'<text class="title" x="12" y="22">{escape("cowkit beside nbdkit and QEMU")}</text>', _legend(lines)]
    y = _TOP
    for line in lines:
        parts.append(_bars(line, y))
        y += len(_shown(line)) * (_BAR + _GAP) + _ROW_GAP
    machine = results.machine()
    versions = ", ".join(
        f"{name} {results.versions[name]}" for name in ("nbdkit", "qemu-nbd") if name in results.versions
    )
    foot = f"{machine['cores']} cores, Python {machine['python']}; {versions}; {results.date[:10]}"
    parts.append(f'<text class="small" x="12" y="{y + 12}">{escape(foot)}</text>')
    height = y + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img"><title>Speed of cowkit, nbdkit and qemu-nbd</title><style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _legend(lines: Sequence[Line]) -> str:
    found = []
    x = _LABELS
    for index, name in enumerate(_SHOWN):
        if name == NBDKIT_4K and not any(name in line.medians for line in lines):
            continue
        found.append(f'<rect class="b{index}" x="{x}" y="33" width="{_BAR}" height="{_BAR}"/>')
        found.append(f'<text class="small" x="{x + 14}" y="41">{escape(label_of(name))}</text>')
        x += 34 + 6 * len(label_of(name))
    return "".join(found)


def _shown(line: Line) -> list[str]:
    """Whose bars a row has: theirs who were measured."""
    return [name for name in _SHOWN if name in line.medians]


def _bars(line: Line, y: int) -> str:
    medians = line.medians
    shown = _shown(line)
    most = max(medians[name] for name in shown) or 1
    found = [f'<text x="12" y="{y + len(shown) * (_BAR + _GAP) // 2 + 4}">{escape(line.row.title)}</text>']
    for place, name in enumerate(shown):
        index = _SHOWN.index(name)
        top = y + place * (_BAR + _GAP)
        value = medians[name]
        length = max(1, round(_BARS * value / most))
        said = f"{short(value)} {line.row.unit}"
        ratio = line.ratio(name)
        if name == COWKIT:
            said += ": less is better" if line.row.better == "lower" else ""
        elif ratio is not None:
            said += f" ({times(ratio)})"
        found.append(f'<rect class="b{index}" x="{_LABELS}" y="{top}" width="{length}" height="{_BAR}" rx="1"/>')
        found.append(f'<text class="small" x="{_LABELS + length + 5}" y="{top + 8}">{escape(said)}</text>')
    return "".join(found)
