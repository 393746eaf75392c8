"""`cowkit checkpoint`: freeze this moment of a disk that is being served."""

from __future__ import annotations

import argparse

from cowkit.cli.choose import add_choice, choose
from cowkit.errors import UsageError
from cowkit.server.control_client import ControlClient

DESCRIPTION = (
    "Freeze this moment of a disk that is being served, so that `cowkit rollback` can put the disk back to it. "
    "Clients stay connected. The checkpoint's name is printed."
)
EXAMPLES = """
cowkit checkpoint installed
cowkit checkpoint --base disk.img
cowkit checkpoint --list
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit checkpoint` takes."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="what to call it (default: checkpoint-N, the Nth)")
    parser.add_argument(
        "--list", action="store_true", help="make none, but print the names of those there are, oldest first"
    )
    add_choice(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the server for it."""
    if arguments.list and arguments.name is not None:
        raise UsageError(f"--list makes no checkpoint: leave out {arguments.name!r}, or --list")
    with ControlClient(choose(arguments.base, arguments.source).control) as client:
        if arguments.list:
            names = [point["name"] for point in client.execute("cowkit-query-checkpoints")]
        else:
            asked = {} if arguments.name is None else {"name": arguments.name}
            names = [client.execute("cowkit-checkpoint", asked)["name"]]
    for name in names:
        print(name)
    return 0
