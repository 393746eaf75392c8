"""`cowkit reset`: put a disk that is being served back to its base."""

from __future__ import annotations

import argparse

from cowkit.cli.choose import add_choice, choose
from cowkit.server.control_client import ControlClient

DESCRIPTION = (
    "Put a disk that is being served back to its base. All that was written is thrown away, and all checkpoints are gone. "
    "Clients stay connected; what they have in their caches is theirs to drop."
)
EXAMPLES = """
cowkit reset
cowkit reset --base disk.img
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit reset` takes."""
    add_choice(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the server for it."""
    with ControlClient(choose(arguments.base, arguments.source).control) as client:
        client.execute("cowkit-reset")
    return 0
