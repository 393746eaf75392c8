"""`cowkit verify`: read a difference back by two independent readers."""

from __future__ import annotations

import argparse
import json

from cowkit.cli.file_argument import file_argument
from cowkit.cli.progress import Bar
from cowkit.cli.standard_error import note

DESCRIPTION = (
    "Check the qcow2 difference DIFF: its header, tables and refcounts, whether its base is the one that it was made of, and whether "
    "cowkit's own reader and QEMU read the same from it and all that it stands on. Each extent that differs is named, with "
    "status 1. A difference that is damaged, or of another base, is one line and status 2. Content that was damaged later on "
    "reads well to everybody: only --against tells."
)
EXAMPLES = """
cowkit verify diff.qcow2
cowkit verify diff.qcow2 --base moved/disk.img
cowkit verify diff.qcow2 --against nbd+unix:///?socket=/run/nbd.sock   # the live disk that it is of
cowkit verify diff.qcow2 --hash full --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit verify` takes."""
    file_argument(parser.add_argument("diff", metavar="DIFF", help="the difference; it is not written"))
    add_base_arguments(parser)
    file_argument(
        parser.add_argument(
            "--against",
            metavar="URI|IMAGE",
            help="compare all of the disk with a live disk, or with an image, too; holes of both are skipped",
        )
    )
    parser.add_argument(
        "--against-format", metavar="FORMAT", help="that image's (default: what its name and content agree on)"
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which base a difference is to be read on."""
    file_argument(parser.add_argument("--base", metavar="BASE", help="where the base is (default: where DIFF says)"))
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        help="the base's: raw, or QEMU's name of one, such as qcow2 (default: what DIFF says, or BASE's name and content agree on)",
    )
    parser.add_argument(
        "--hash",
        choices=("sampled", "full"),
        help="recognise the base by its size and some blocks, or by all of it, for which DIFF must be written so "
        "(default: full, if it is)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare, and say what differs."""
    from cowkit.diff.verify import verify_diff

    with Bar("verify") as bar:
        found = verify_diff(
            arguments.diff,
            base=arguments.base,
            base_format=arguments.format,
            against=arguments.against,
            against_format=arguments.against_format,
            full=None if arguments.hash is None else arguments.hash == "full",
            progress=bar.update,
        )
    if not found.recognised:
        note(unrecognised(found.images[-1], found.base))
    print(json.dumps(found.to_json(), indent=2) if arguments.json else found.summary())
    return 1 if found.disagreements else 0


def unrecognised(diff: str, base: str | None) -> str:
    """What to say of a base that the difference does not know."""
    return f"{diff} does not record who its base is: that {base} is the right one was not checked"
