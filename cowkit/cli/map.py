"""`cowkit map`: draw where a disk that is being served, or a difference that was kept, changed."""

from __future__ import annotations

import argparse
import os

from cowkit.cli import foreign
from cowkit.cli.answers import add_svg_argument, as_json, check_picture, draw_map, write_picture
from cowkit.cli.choose import add_choice, choose
from cowkit.cli.file_argument import file_argument
from cowkit.cli.progress import Bar
from cowkit.cli.served_argument import checkpoint_argument
from cowkit.errors import UsageError
from cowkit.server.control_client import ControlClient
from cowkit.server.runtime import running

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    from cowkit.diff.answers import ChangesReport

DESCRIPTION = (
    "Draw where a disk changed that `cowkit serve` or `cowkit run` serves, or where a difference that was kept (DIFF) does: "
    "a strip for the disk and one for each partition, as characters on the terminal, or as a picture."
)
EXAMPLES = """
cowkit map --base disk.img
cowkit map --base disk.img --since installed --svg changed.svg
cowkit map --base disk.img --from overlay.vmdk
cowkit map diff.qcow2
cowkit map diff.qcow2 --json | jq '.partitions[] | {number, changed_bytes}'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit map` takes."""
    file_argument(
        parser.add_argument(
            "diff", metavar="DIFF", nargs="?", help="a qcow2 image that `cowkit diff` wrote, instead of a disk"
        )
    )
    add_svg_argument(parser)
    parser.add_argument("--json", action="store_true", help="print what the picture shows as JSON, and draw nothing")
    add_choice(
        parser,
        source="SOURCE",
        more="; or, with --base, any other NBD URI, or an image file of a format that QEMU reads",
    )
    foreign.add_arguments(parser)
    parser.set_defaults(output=None, files=False, estimate=False)  # of `cowkit diff`
    states = parser.add_argument_group("which two states (default: the base, and now)")
    for option, what in (
        ("--since", "only what changed since that checkpoint"),
        ("--at", "what was there at that checkpoint instead of now"),
    ):
        checkpoint_argument(states.add_argument(option, metavar="CHECKPOINT", help=what))


def run(arguments: argparse.Namespace) -> int:
    """Ask the server, or read the image, and draw."""
    report, name = _of_disk(arguments) if arguments.diff is None else _of_image(arguments)
    if arguments.json:
        print(as_json(report.to_json()))
    elif arguments.svg is None:
        draw_map(report)
    write_picture(report, arguments.svg, f"{name}: {'its data' if report.base is None else 'what changed'}")
    return 0


def _of_disk(arguments: argparse.Namespace) -> tuple[ChangesReport, str]:
    from cowkit.diff.answers import ChangesReport

    check_picture(arguments.svg, arguments.base, arguments.source)
    servers = running()
    with Bar("map") as bar:
        found = foreign.look(arguments, servers, bar.update)
    if found is not None:
        return found, os.path.basename(arguments.source or arguments.base)
    states = {name: value for name in ("since", "at") if (value := getattr(arguments, name)) is not None}
    server = choose(arguments.base, arguments.source, servers)
    check_picture(arguments.svg, arguments.base, arguments.source, server.base)
    with ControlClient(server.control) as client, Bar("map") as bar:
        answer = client.execute("cowkit-changes", states, on_event=bar.event)
    return ChangesReport.from_json(answer["report"]), server.name


def _of_image(arguments: argparse.Namespace) -> tuple[ChangesReport, str]:
    for name in ("base", "source", "since", "at", "base_format", "from_format", "from_context"):
        if getattr(arguments, name) is not None:
            option = "from" if name == "source" else name.replace("_", "-")
            raise UsageError(
                f"--{option} is about a disk that is being served, and {arguments.diff} is a file: leave out one"
            )
    check_picture(arguments.svg, arguments.diff)
    from cowkit.diff.answers.of_image import changes_in

    return changes_in(arguments.diff), os.path.basename(arguments.diff)
