"""`cowkit apply`: merge a difference into a copy of its base, or into the base."""

from __future__ import annotations

import argparse
import json
import os
import sys

from cowkit.cli.file_argument import file_argument
from cowkit.cli.progress import Bar
from cowkit.cli.standard_error import note
from cowkit.cli.verify import add_base_arguments, unrecognised
from cowkit.errors import UsageError

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    from cowkit.diff.applying.report import ApplyReport

DESCRIPTION = (
    "Merge the qcow2 difference DIFF, with the differences that it stands on, into a copy of its base: a raw file that appears when it is "
    "complete. Or into the base itself, which must be a raw file: then no difference to it as it was fits it any more. All that is "
    "to be written goes to a journal first, so that an interrupted one is finished by the next, or by --finish."
)
EXAMPLES = """
cowkit apply diff.qcow2 --to new.img
cowkit apply diff.qcow2 --to new.img --base moved/disk.img
cowkit apply diff.qcow2 --in-place --force
cowkit apply --finish disk.img
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit apply` takes."""
    parser.usage = "cowkit apply [OPTIONS] DIFF (--to COPY | --in-place)\n       cowkit apply --finish BASE"
    file_argument(parser.add_argument("diff", metavar="DIFF", nargs="?", help="the difference; it is not written"))
    where = parser.add_mutually_exclusive_group(required=True)
    file_argument(where.add_argument("--to", metavar="COPY", help="the raw file to write; replaced if it exists"))
    where.add_argument(
        "--in-place", action="store_true", help="write to the base itself; needs --force, or a yes on the terminal"
    )
    file_argument(
        where.add_argument("--finish", metavar="BASE", help="finish an --in-place that was interrupted, without DIFF")
    )
    parser.add_argument("--force", action="store_true", help="with --in-place: the base may be written to, really")
    add_base_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Merge it."""
    if arguments.force and not arguments.in_place:
        raise UsageError("--force lets --in-place write to the base: leave it out")
    if arguments.finish is not None:
        if arguments.diff is not None or arguments.base is not None:
            raise UsageError("--finish goes on from the journal beside BASE alone: leave out DIFF and --base")
        return _finish(arguments)
    if arguments.diff is None:
        raise UsageError("give the difference to apply: cowkit apply DIFF --to COPY (see `cowkit apply --help`)")
    report = _copy(arguments) if arguments.to is not None else _in_place(arguments)
    if not report.recognised:
        note(unrecognised(report.lowest or arguments.diff, arguments.base or "the file that it names"))
    _tell(report, arguments)
    return 0


def _copy(arguments: argparse.Namespace) -> ApplyReport:
    from cowkit.keeping.applying import apply_to_copy

    if arguments.to == "-":
        raise UsageError("a disk cannot be written to standard output: name a file (./- if it is to be called -)")
    with Bar("apply") as bar:
        return apply_to_copy(
            arguments.diff,
            arguments.to,
            base=arguments.base,
            base_format=arguments.format,
            full=None if arguments.hash is None else arguments.hash == "full",
            progress=bar.update,
        )


def _in_place(arguments: argparse.Namespace) -> ApplyReport:
    from cowkit.diff.applying.in_place import target_of
    from cowkit.keeping.applying import apply_to_base

    base = target_of(arguments.diff, arguments.base)
    if not arguments.force:
        _ask(base)
    try:
        with Bar("apply") as bar:
            return apply_to_base(
                arguments.diff,
                base=arguments.base,
                base_format=arguments.format,
                full=None if arguments.hash is None else arguments.hash == "full",
                progress=bar.update,
                on_finished=lambda ended: note(ended.summary()),
            )
    except KeyboardInterrupt:
        _note_unfinished(base)
        raise


def _finish(arguments: argparse.Namespace) -> int:
    from cowkit.bases.unfinished import unready_journal_of
    from cowkit.keeping.applying import finish_base

    unready = os.path.lexists(unready_journal_of(arguments.finish))
    try:
        report = finish_base(arguments.finish)
    except KeyboardInterrupt:
        _note_unfinished(arguments.finish)
        raise
    if report is None and unready:
        note(
            f"{arguments.finish} is as it was: the apply was killed before its journal counted, and what it left is removed"
        )
        return 0
    if report is None:
        raise UsageError(f"{arguments.finish} has no journal beside it: there is nothing to finish")
    _tell(report, arguments)
    return 0


def _ask(base: str) -> None:
    """Have the user say again that the base is to be written to.

    :raises UsageError: the user does not.
    """
    if sys.stdin is None or not sys.stdin.isatty() or sys.stderr is None or not sys.stderr.isatty():
        raise UsageError(
            f"--in-place writes to {base} itself, and no difference to it as it was fits it any more: say --force, too, or use --to COPY"
        )
    name = os.path.basename(base)
    note(f"{base} itself will be written to, and no difference to it as it was will fit it any more")
    sys.stderr.write(f"Type {name} to go on: ")
    sys.stderr.flush()
    if sys.stdin.readline().rstrip("\n") != name:
        raise UsageError(f"that was not {name}: nothing was written")


def _note_unfinished(base: str) -> None:
    from cowkit.bases.unfinished import journal_of

    if os.path.lexists(journal_of(base)):
        note(f"interrupted: {base} is half written; finish it with `cowkit apply --finish {base}`")


def _tell(report: ApplyReport, arguments: argparse.Namespace) -> None:
    print(json.dumps(report.to_json(), indent=2) if arguments.json else report.summary())
