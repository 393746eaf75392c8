"""Answers about a difference: what is asked for, and how it is printed."""

from __future__ import annotations

import os
import sys

from cowkit.cli.file_argument import file_argument
from cowkit.cli.standard_error import note, printable
from cowkit.errors import UsageError

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from typing import Any

    from cowkit.diff.answers import ChangesReport
    from cowkit.diff.answers.report import PartitionChanges

_LEAST_WIDTH = 20
_PLAIN_WIDTH = 80

_COLOURS = {"·": "dim", "0": "blue", "=": "green"}
_CHANGED_COLOUR = "yellow"

ANSWERS = ("stat", "map", "svg", "files", "estimate")


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """What asks `cowkit diff` for answers."""
    answers = parser.add_argument_group("answers (nothing is written without -o)")
    answers.add_argument(
        "--stat", action="store_true", help="how much is dirty, changed, the same, zeroed and trimmed, by partition"
    )
    answers.add_argument("--map", action="store_true", help="a strip of characters that shows where it changed")
    add_svg_argument(answers)
    answers.add_argument(
        "--files",
        action="store_true",
        help="which files were added, removed, changed or renamed: inside ext2, ext3 and ext4 by debugfs, inside others by guestfish",
    )
    answers.add_argument(
        "--estimate", action="store_true", help="how large the image would be, and with other clusters (without -o)"
    )


def add_svg_argument(parser: argparse._ActionsContainer) -> None:
    """What asks for a picture."""
    file_argument(
        parser.add_argument("--svg", metavar="FILE", help="write a picture of where it changed; replaced if it exists")
    )


def is_asked(arguments: argparse.Namespace) -> bool:
    """Whether there is anything to answer."""
    return any(getattr(arguments, name) for name in ANSWERS)


def show(report: ChangesReport, arguments: argparse.Namespace, title: str) -> None:
    """Print what is asked for, in the order of the help page, and write the picture."""
    shown = False
    for name, lines in (("stat", stat_lines), ("files", file_lines), ("estimate", estimate_lines)):
        if getattr(arguments, name):
            _print(lines(report), apart=shown)
            shown = True
    if arguments.map:
        if shown:
            print()
        draw_map(report)
    write_picture(report, arguments.svg, title)


def check_picture(path: str | None, *needed: str | None) -> None:
    """Look whether the picture could be written to ``path``, if there is one to write, before anything else is done.

    :param needed: what must not be replaced by it, and neither must what such a file stands on.
    :raises UsageError: it is no name of a file.
    :raises OutputError: it cannot be written, or is one of those that are needed.
    """
    if path is None:
        return
    if path == "-":
        raise UsageError("a picture cannot be written to standard output: name a file (./- if it is to be called -)")
    from cowkit.diff.output import AtomicOutput
    from cowkit.diff.qcow2.header import backing_chain
    from cowkit.keeping.in_use import refuse_replacing_served

    files = [each for each in needed if each is not None]
    spare = [each for file in files for each in (file, *backing_chain(os.path.abspath(file)))]
    AtomicOutput(path, spare=spare).check()
    refuse_replacing_served(path)


def write_picture(report: ChangesReport, path: str | None, title: str) -> None:
    """Write the picture to ``path``, if there is one.

    :raises OutputError: it cannot be written.
    """
    if path is None:
        return
    from cowkit.diff.answers.picture import picture
    from cowkit.diff.output import AtomicOutput

    with AtomicOutput(path) as output:
        output.pwrite(picture(report, title).encode(), 0)


def _print(lines: Iterator[str], *, apart: bool) -> None:
    if apart:
        print()
    for line in lines:
        print(printable(line))


# --stat


def stat_lines(report: ChangesReport) -> Iterator[str]:
    """A table: a line for the disk and each partition, a column for each kind of amount."""
    from cowkit.disk.sizes import format_size  # the engine, for those who need it

    places = [("disk", report.amounts)]
    places += [(_name(each), each.amounts) for each in report.partitions]
    if report.unpartitioned is not None:
        places.append(("in no partition", report.unpartitioned))
    rows = [["bytes (extents)", *report.amounts._fields]]
    rows += [[name, *(f"{format_size(each.bytes)} ({each.extents})" for each in found)] for name, found in places]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        yield f"{first:<{widths[0]}}{numbers}"
    yield from _notes(report)


def _name(partition: PartitionChanges) -> str:
    return f"partition {partition.number}" + (f" ({partition.file_system})" if partition.file_system else "")


def _notes(report: ChangesReport) -> Iterator[str]:
    if report.resized:
        from cowkit.diff.report_parts import resize_note

        yield resize_note(report.size, report.base_size)
    if report.file_system:
        yield f"file system: {report.file_system}"
    if report.partition_table not in ("none", "same"):
        yield f"partition table: {report.partition_table}"


# --files


def tell_problems(report: ChangesReport) -> bool:
    """Say on standard error what cannot be told of files; whether there is anything."""
    found = report.files or ()
    for each in found:
        if each.problem is not None:
            note(f"{'disk' if each.partition is None else f'partition {each.partition}'}: {each.problem}")
    return any(each.problem is not None for each in found)


def file_lines(report: ChangesReport) -> Iterator[str]:
    """A line for each path, as `git status` has them; headings where there are several file systems."""
    from cowkit.diff.answers.filesystems import CONTAINERS, WITHOUT_FILES

    if not report.files:
        yield "no known file system" + ("" if report.amounts.changed.bytes else ", and nothing changed")
    found = [each for each in report.files or () if each.problem is None]
    for each in found:
        none = "no file changed"
        if each.file_system in WITHOUT_FILES:
            none = "no files here"
        elif each.file_system in CONTAINERS:  # what is in it, nobody has looked
            none = "nothing changed"
        where = "disk" if each.partition is None else f"partition {each.partition}"
        if len(found) > 1 or each.partition is not None:
            yield f"{where} ({each.file_system}):" + ("" if each.changes else f" {none}")
        elif not each.changes:
            yield f"{none} ({each.file_system})"
        yield from map(str, each.changes)


# --estimate


def estimate_lines(report: ChangesReport) -> Iterator[str]:
    """The size of the image that was asked for, and of others."""
    from cowkit.disk.sizes import format_size

    found = report.estimate
    if found is None:
        return
    of = "" if found.cluster_size is None else f" (clusters of {_kind(found.cluster_size, found.subclusters)})"
    yield f"the image would have {format_size(found.file_size)} and take {format_size(found.allocated)} on disk{of}"
    for each in found.others:
        kind = _kind(each.cluster_size, each.subclusters)
        yield f"  clusters of {kind:<20} {format_size(each.file_size):>10}, {format_size(each.allocated):>10} on disk"


def _kind(cluster_size: int, subclusters: bool) -> str:
    from cowkit.disk.sizes import format_size

    return f"{format_size(cluster_size)}{', subclusters' if subclusters else ''}"


# --map


def map_lines(report: ChangesReport, width: int) -> Iterator[tuple[str, bool]]:
    """The disk's strip and each partition's, and whether a line is one; all are at most ``width`` characters long."""
    from cowkit.diff.answers.picture import changed_word, summary
    from cowkit.diff.answers.strip import LEGEND, strip
    from cowkit.disk.sizes import format_size

    yield summary(report), False
    yield strip(report.changed, report.size, width, dirty=report.dirty), True
    if report.partitions:
        yield _ruler(report, width), False
    for each in report.partitions:
        what = f"partition {each.number}: {each.file_system or 'unknown content'}, {format_size(each.size)}"
        yield f"{what}; {each.amounts.changed} {changed_word(report)}", False
        yield strip(report.changed, each.size, width, start=each.offset, dirty=report.dirty), True
    yield LEGEND, False


def _ruler(report: ChangesReport, width: int) -> str:
    """Where the partitions are, each with its number: ``[1------][2--]``."""
    line = [" "] * width
    for each in report.partitions:
        if not each.size:
            continue
        first = each.offset * width // report.size
        last = max(first + 1, (each.offset + each.size) * width // report.size)
        text = f"[{each.number}".ljust(last - first - 1, "-")[: max(0, last - first - 1)] + "]"
        line[first:last] = list(text if last - first > 1 else "|")
    return "".join(line).rstrip()


def draw_map(report: ChangesReport) -> None:
    """Print the map, in colours on a terminal."""
    import shutil  # with all the compression that it knows

    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    width = max(_LEAST_WIDTH, shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns if on_terminal else _PLAIN_WIDTH)
    lines = map_lines(report, width)
    if not on_terminal:
        for line, _ in lines:
            print(line)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(width=width)
    for line, is_strip in lines:
        text = Text(no_wrap=is_strip)
        for character in line:
            text.append(character, _COLOURS.get(character, _CHANGED_COLOUR) if is_strip else "")
        console.print(text)


# --json


def as_json(report: dict[str, Any]) -> str:
    """The report with a line for each member and for each extent (``indent`` takes json ten times as long)."""
    from cowkit.quick_json import dumps

    lines = []
    for name, value in report.items():
        text = dumps(value)
        if isinstance(value, list) and name in ("changed", "dirty"):
            text = text.replace("}, {", "},\n    {")
        elif isinstance(value, list) and value:
            from json import dumps as dumps_apart

            text = dumps_apart(value, indent=2).replace("\n", "\n  ")
        lines.append(f"  {dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"
