"""`cowkit ls`: list what is being served."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from cowkit.cli.standard_error import printable
from cowkit.disk.sizes import format_size
from cowkit.errors import ControlError
from cowkit.server.control_client import ControlClient
from cowkit.server.runtime import ServerInfo, running

DESCRIPTION = (
    "List the disks that `cowkit serve` and `cowkit run` serve at this moment for this user, oldest first. They are looked for, "
    "as by all commands, in $COWKIT_RUNTIME_DIR, or without it in $XDG_RUNTIME_DIR/cowkit and in /tmp/cowkit-UID."
)
EXAMPLES = """
cowkit ls
cowkit ls --json | jq -r '.[].uris[0]'
"""

_HEADER = ("NAME", "PID", "SIZE", "DIRTY", "CLIENTS", "FOR", "BASE", "URI")
_PATIENCE_SECONDS = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit ls` takes."""
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(arguments: argparse.Namespace) -> int:
    """Ask each server how it is doing."""
    servers = [_described(server) for server in running()]
    if arguments.json:
        print(json.dumps(servers, indent=2))
    elif sys.stdout is not None and sys.stdout.isatty():
        _draw([_row(server) for server in servers])
    else:
        _print([_HEADER, *(_row(server) for server in servers)])
    return 0


def _described(server: ServerInfo) -> dict[str, Any]:
    """What is known of ``server``, with how it is doing if it says so; one that is stuck or ending is listed all the same."""
    unknown = {"block_size": None, "dirty_bytes": None, "connections": None, "checkpoints": None}
    try:
        with ControlClient(server.control, timeout=_PATIENCE_SECONDS) as client:
            said = client.execute("cowkit-query-disk")
    except ControlError:
        said = {}
    # QMP's names have dashes, those of all that cowkit prints as JSON have underscores.
    return {**server.to_json(), **unknown, **{name.replace("-", "_"): value for name, value in said.items()}}


def _row(server: dict[str, Any]) -> tuple[str, ...]:
    dirty, clients = server["dirty_bytes"], server["connections"]
    return (
        printable(server["name"]),
        str(server["pid"]),
        format_size(server["size"]),
        "?" if dirty is None else format_size(dirty),
        "?" if clients is None else str(clients),
        _duration(time.time() - server["started"]),
        printable(server["base"] or "-"),
        printable(server["uris"][0]),
    )


def _duration(seconds: float) -> str:
    whole = max(0, int(seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= length:
            return f"{whole // length}{unit}"
    return f"{whole}s"


def _print(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _draw(rows: list[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        print("nothing is being served")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for title in _HEADER:
        table.add_column(title.capitalize() if title != "PID" else title, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
