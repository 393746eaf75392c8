"""`cowkit rollback`: put a disk that is being served back to a checkpoint."""

from __future__ import annotations

import argparse

from cowkit.cli.choose import add_choice, choose
from cowkit.cli.served_argument import checkpoint_argument
from cowkit.server.control_client import ControlClient

DESCRIPTION = (
    "Put a disk that is being served back to a checkpoint. What was written since is thrown away, later checkpoints are gone, "
    "and the checkpoint itself stays. Clients stay connected; what they have in their caches is theirs to drop."
)
EXAMPLES = """
cowkit rollback installed
cowkit rollback --base disk.img installed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit rollback` takes."""
    checkpoint_argument(parser.add_argument("name", metavar="NAME", help="the checkpoint"))
    add_choice(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the server for it."""
    with ControlClient(choose(arguments.base, arguments.source).control) as client:
        client.execute("cowkit-rollback", {"name": arguments.name})
    return 0
