"""Arguments that name what is being served, servers and their checkpoints, which shells complete."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    import argparse

COMPLETES_SERVED = "cowkit_completes_served"
"""The attribute of such an argument: the name of the function of the shell that completes it."""

SERVERS = "_cowkit_servers"
SERVERS_AND_FILES = "_cowkit_servers_and_files"
CHECKPOINTS = "_cowkit_checkpoints"


def server_argument(action: argparse.Action, *, or_file: bool = False) -> None:
    """Have the names of running servers complete ``action``, and those of files, too, where it may be one."""
    setattr(action, COMPLETES_SERVED, SERVERS_AND_FILES if or_file else SERVERS)


def checkpoint_argument(action: argparse.Action) -> None:
    """Have the names of the checkpoints complete ``action`` that the disk has which the command line chooses."""
    setattr(action, COMPLETES_SERVED, CHECKPOINTS)
