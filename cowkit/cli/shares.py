"""What can be asked over the control socket where clients do not share one disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cowkit.errors import ControlError
from cowkit.server.control import Command, CommandContext

_OF_ONE_DISK = (
    "cowkit-query-checkpoints",
    "cowkit-checkpoint",
    "cowkit-rollback",
    "cowkit-reset",
    "cowkit-diff",
    "cowkit-changes",
)


def shared_commands(
    commands: Mapping[str, Command], share: str, written_bytes: Callable[[], int]
) -> dict[str, Command]:
    """``commands`` of a server with ``--share``: those that are about one disk refuse where there are several.

    ``cowkit-query-disk`` tells, where there are several, as ``dirty-bytes``, what was written on all of them together.
    """
    query = commands["cowkit-query-disk"]

    def tell(context: CommandContext, arguments: dict[str, Any]) -> Any:
        known = query.run(context, arguments)
        return known if share == "all" else known | {"dirty-bytes": written_bytes()}

    def refuse(context: CommandContext, arguments: dict[str, Any]) -> Any:
        raise ControlError(
            f"each {'export name' if share == 'export' else share} has a disk of its own here (--share {share}): checkpoint, rollback, "
            "reset and diff are for the one disk of `--share all`"
        )

    changed = {"cowkit-query-disk": query._replace(run=tell)}
    if share != "all":
        changed |= {name: commands[name]._replace(run=refuse) for name in _OF_ONE_DISK}
    return {**commands, **changed}
