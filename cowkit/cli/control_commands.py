"""What a served disk can be asked over its control socket."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from cowkit.cli.progress import PROGRESS_EVENT
from cowkit.cow_disk import CowDisk
from cowkit.errors import ControlError
from cowkit.server.control import Command, CommandContext
from cowkit.server.qmp import Argument
from cowkit.server.runtime import ServerInfo

_PROGRESS_SECONDS = 0.05

_Arguments = dict[str, Any]

KIND_OF_IMAGE = {
    "cluster-size": Argument(int, required=False),
    "subclusters": Argument(bool, required=False),
    "compress": Argument(str, required=False),
    "bitmap": Argument(str, required=False),
    "standalone": Argument(bool, required=False),
    "raw": Argument(bool, required=False),
    "hash": Argument(str, required=False),
    "engine": Argument(str, required=False),
    "format": Argument(str, required=False),
    "image-options": Argument(dict, required=False),
    "secret-file": Argument(str, required=False),
}
"""The members of :class:`cowkit.diff.ImageOptions`."""


class DiskCommands:
    """The commands of ``disk``'s control server.

    :param info: what others find the disk by.
    :param quit: ends the program; without it there is no ``quit``.
    """

    def __init__(self, disk: CowDisk, info: ServerInfo, *, quit: Callable[[], None] | None) -> None:
        self._disk = disk
        self._info = info
        self._quit = quit

    def table(self) -> dict[str, Command]:
        """Each command by its name."""
        commands = {
            "cowkit-query-disk": Command(self._query_disk),
            "cowkit-query-checkpoints": Command(self._query_checkpoints),
            "cowkit-checkpoint": Command(self._checkpoint, {"name": Argument(str, required=False)}),
            "cowkit-rollback": Command(self._rollback, {"name": Argument(str)}),
            "cowkit-reset": Command(self._reset),
            "cowkit-diff": Command(
                self._diff,
                {
                    "path": Argument(str),
                    "since": Argument(str, required=False),
                    "at": Argument(str, required=False),
                    "backing-file": Argument(str, required=False),
                    "base": Argument(str, required=False),
                    "base-path": Argument(str, required=False),
                    "backing-format": Argument(str, required=False),
                    **KIND_OF_IMAGE,
                    "changes": Argument(bool, required=False),
                    "files": Argument(bool, required=False),
                },
            ),
            "cowkit-changes": Command(
                self._changes,
                {
                    "since": Argument(str, required=False),
                    "at": Argument(str, required=False),
                    "files": Argument(bool, required=False),
                    "estimate": Argument(bool, required=False),
                    **KIND_OF_IMAGE,
                },
            ),
        }
        if self._quit is not None:
            commands["quit"] = Command(self._end)
        return commands

    def _query_disk(self, context: CommandContext, arguments: _Arguments) -> Any:
        return {
            **self._info.to_json(),
            "block-size": self._disk.block_size,
            "dirty-bytes": self._disk.dirty_bytes,
            "connections": self._disk.connections,
            "checkpoints": [point.name for point in self._disk.checkpoints],
        }

    def _query_checkpoints(self, context: CommandContext, arguments: _Arguments) -> Any:
        return [{"name": point.name} for point in self._disk.checkpoints]

    def _checkpoint(self, context: CommandContext, arguments: _Arguments) -> Any:
        return {"name": self._disk.checkpoint(arguments.get("name")).name}

    def _rollback(self, context: CommandContext, arguments: _Arguments) -> Any:
        self._disk.rollback(arguments["name"])
        return {}

    def _reset(self, context: CommandContext, arguments: _Arguments) -> Any:
        self._disk.reset()
        return {}

    def _end(self, context: CommandContext, arguments: _Arguments) -> Any:
        assert self._quit is not None
        self._quit()
        return {}

    def _diff(self, context: CommandContext, arguments: _Arguments) -> Any:
        """Write the difference to ``path``.

        The name of the base to record is ``backing-file`` as it is; or it is made from ``base``, how the client's user calls
        the base, and ``base-path``, the same made absolute: then it is relative if ``base`` is.
        """
        path, base, base_path = (arguments.get(name) for name in ("path", "base", "base-path"))
        assert path is not None
        for name in ("path", "base-path", "secret-file"):
            given = arguments.get(name, "/")
            if not os.path.isabs(given):
                raise ControlError(
                    f"{name} {given!r} is relative, and the server is in a directory of its own: make it absolute"
                )
        from cowkit.diff import ImageOptions, backing_name

        backing_file = arguments.get("backing-file")
        since = arguments.get("since")
        kind = _kind(arguments)
        whole = since is not None or not ImageOptions(**kind).names_base
        refusal = self._disk.engine.base.backing_refusal
        if backing_file is None and refusal is not None and not whole:
            raise ControlError(refusal)
        if backing_file is None and base is not None and self._disk.engine.base.path is not None and not whole:
            if base_path is None:
                raise ControlError("base makes no sense without base-path, the same as an absolute path")
            backing_file = backing_name(base, base_path, path)
        report = self._disk.diff(
            path,
            since=since,
            at=arguments.get("at"),
            backing_file=backing_file,
            backing_format=arguments.get("backing-format"),
            **kind,
            progress=_progress(context),
            changes=arguments.get("changes", False),
            files=arguments.get("files", False),
        )
        return {"report": report.to_json(), "summary": report.summary()}

    def _changes(self, context: CommandContext, arguments: _Arguments) -> Any:
        """What changed; with ``estimate``, how large the image would be that the other members ask for."""
        from cowkit.diff import ImageOptions

        kind = _kind(arguments)
        estimate = arguments.get("estimate", False)
        if kind and not estimate:
            raise ControlError(f"{', '.join(kind)} make no sense without estimate")
        report = self._disk.changes(
            since=arguments.get("since"),
            at=arguments.get("at"),
            files=arguments.get("files", False),
            image=ImageOptions(**kind) if estimate else None,
            progress=_progress(context),
        )
        return {"report": report.to_json()}


def _kind(arguments: _Arguments) -> dict[str, Any]:
    """The members that say what kind of image is asked for, by their names in :class:`cowkit.diff.ImageOptions`."""
    return {name.replace("-", "_"): arguments[name] for name in KIND_OF_IMAGE if name in arguments}


def _progress(context: CommandContext) -> Callable[[int, int], None]:
    told = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told
        context.check()
        now = time.monotonic()
        if now - told >= _PROGRESS_SECONDS:
            told = now
            context.emit(PROGRESS_EVENT, {"done": done, "total": total})

    return progress
