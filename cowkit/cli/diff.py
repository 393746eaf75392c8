"""`cowkit diff`: keep what changed on a disk that is being served."""

from __future__ import annotations

import argparse
import os
import sys
import time

from cowkit.cli.arguments import file_argument
from cowkit.cli.choose import add_choice, choose
from cowkit.server.control_client import ControlClient

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    from rich.progress import Progress, TaskID

DESCRIPTION = (
    "Write what changed on a disk that `cowkit serve` or `cowkit run` serves to a qcow2 image on top of its base. It is the "
    "disk of one moment; clients go on writing meanwhile. An image that is there already is replaced when the new one is whole."
)
EXAMPLES = """
cowkit diff --base disk.img -o diff.qcow2
cowkit diff --from 4711 -o diff.qcow2 --json
cowkit diff --base disk.img --at monday -o d1.qcow2
cowkit diff --base disk.img --since monday --backing d1.qcow2 -o d2.qcow2
cowkit diff --base disk.img -o small.qcow2 --subclusters
cowkit diff --base disk.img -o alone.qcow2 --no-backing --compress zlib
cowkit diff --base disk.img -o now.img --raw
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
    parser.add_argument("--exit-code", action="store_true", help="end with status 1 if anything changed, and 0 if not")
    add_choice(parser)
    states = parser.add_argument_group("which two states (default: the base, and now)")
    states.add_argument(
        "--since",
        metavar="CHECKPOINT",
        help="only what changed since that checkpoint, on top of what was kept of it, which --backing names",
    )
    states.add_argument("--at", metavar="CHECKPOINT", help="what was there at that checkpoint instead of now")
    image = parser.add_argument_group("what kind of image (default: qcow2 on top of the base)")
    image.add_argument(
        "--cluster-size",
        metavar="SIZE",
        help="of qcow2: a power of two from 4K to 2M (default: 64K)",
    )
    image.add_argument(
        "--subclusters",
        action="store_true",
        help="divide clusters by 32, so that a small change costs little (needs QEMU 5.2 to read it)",
    )
    image.add_argument(
        "--compress", choices=("zlib", "zstd"), help="compress each cluster (zstd: needs QEMU 5.1 to read it)"
    )
    image.add_argument("--bitmap", metavar="NAME", help="put in what is dirty as a persistent bitmap of that name")
    image.add_argument(
        "--backing-format", metavar="FORMAT", help="the format of the base to record (default: what it is)"
    )
    image.add_argument(
        "--no-backing", dest="standalone", action="store_true", help="have all of the disk in OUT, and no backing file"
    )
    image.add_argument(
        "--hash",
        choices=("sampled", "full"),
        help="record a digest of some blocks of the base, or of all of it, which is then read (default: sampled)",
    )
    image.add_argument(
        "--raw", action="store_true", help="write a sparse raw file with all of the disk instead of qcow2"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask the server for the difference."""
    server = choose(arguments.base, arguments.source)
    # Not checked here: the server writes it, and knows best
    folder = "/" if arguments.output.endswith("/") else ""  # which abspath drops, and a file is no folder
    asked: dict[str, Any] = {"path": os.path.abspath(arguments.output) + folder, **_kind(arguments)}
    if arguments.backing_file is not None:
        asked["backing-file"] = arguments.backing_file
    elif arguments.base is not None:
        asked |= {"base": arguments.base, "base-path": os.path.abspath(arguments.base)}
    with ControlClient(server.control) as client, _Bar() as bar:
        answer = client.execute("cowkit-diff", asked, on_event=bar.event)
    if arguments.json:
        print(_as_json(answer["report"]))
    else:
        print(answer["summary"])
    return 1 if arguments.exit_code and answer["report"]["changed_bytes"] else 0


def _kind(arguments: argparse.Namespace) -> dict[str, Any]:
    """The members that say what kind of image is asked for."""
    asked: dict[str, Any] = {}
    for name in ("since", "at", "backing_format", "subclusters", "compress", "bitmap", "standalone", "raw", "hash"):
        value = getattr(arguments, name)
        if value is not None and value is not False:
            asked[name.replace("_", "-")] = value
    if arguments.cluster_size is not None:
        from cowkit.disk.sizes import parse_size  # the engine, for those who need it

        asked["cluster-size"] = parse_size(arguments.cluster_size, what="cluster size")
    return asked


def _as_json(report: dict[str, Any]) -> str:
    """The report with a line for each member and for each extent (``indent`` takes json ten times as long)."""
    from json import dumps

    lines = []
    for name, value in report.items():
        text = dumps(value)
        if isinstance(value, list):
            text = text.replace("}, {", "},\n    {")  # numbers and words of ours
        lines.append(f"  {dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"


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
