"""`cowkit diff`: keep what changed on a disk that is being served."""

from __future__ import annotations

import argparse
import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cowkit.cli.arguments import file_argument
from cowkit.cli.choose import add_choice, choose
from cowkit.server.control import ControlClient

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DESCRIPTION = (
    "Write what changed on a disk that `cowkit serve` or `cowkit run` serves to a qcow2 image on top of its base. It is the "
    "disk of one moment; clients go on writing meanwhile. An image that is there already is replaced when the new one is whole."
)
EXAMPLES = """
cowkit diff --base disk.img -o diff.qcow2
cowkit diff --from 4711 -o diff.qcow2 --json
qemu-img compare diff.qcow2 disk.img   # what to do with it: any tool that reads qcow2
"""

_PATIENCE_SECONDS = 1.0
PROGRESS_EVENT = "COWKIT_DIFF_PROGRESS"
"""What the server emits while it works: ``done`` and ``total``, in bytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit diff` takes."""
    file_argument(
        parser.add_argument(
            "-o", "--output", metavar="OUT", required=True, help="the qcow2 image to write; replaced if it exists"
        )
    )
    parser.add_argument(
        "--backing",
        dest="backing_file",
        metavar="NAME",
        help="the name of the base to record in OUT (default: BASE's path; if that is relative, as seen from OUT's directory)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with each extent that changed")
    add_choice(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the server for the difference."""
    server = choose(arguments.base, arguments.source)
    # Not checked here: the server writes it, and knows best
    folder = "/" if arguments.output.endswith("/") else ""  # which abspath drops, and a file is no folder
    asked = {"path": os.path.abspath(arguments.output) + folder}
    if arguments.backing_file is not None:
        asked["backing-file"] = arguments.backing_file
    elif arguments.base is not None:
        asked |= {"base": arguments.base, "base-path": os.path.abspath(arguments.base)}
    with ControlClient(server.control) as client, _Bar() as bar:
        answer = client.execute("cowkit-diff", asked, on_event=bar.event)
    if arguments.json:
        import json

        print(json.dumps(answer["report"], indent=2))
    else:
        print(answer["summary"])
    return 0


class _Bar:
    """A progress bar on standard error, if that is a terminal and it takes long enough to look at one."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._wanted = sys.stderr is not None and sys.stderr.isatty()
        self._shown: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._shown[0].stop()

    def event(self, name: str, data: dict[str, Any]) -> None:
        """What the server emits while it works."""
        if name != PROGRESS_EVENT or not self._wanted or time.monotonic() - self._started < _PATIENCE_SECONDS:
            return
        if self._shown is None:
            self._shown = self._show(data["total"])
        progress, task = self._shown
        progress.update(task, completed=data["done"], total=data["total"])

    def _show(self, total: int) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
        )
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        task = progress.add_task("diff", total=total)
        progress.start()
        return progress, task
