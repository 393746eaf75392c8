"""`cowkit diff`: keep what changed on a disk that is being served."""

from __future__ import annotations

import argparse
import os

from cowkit.cli.answers import add_answer_arguments, as_json, is_asked, show
from cowkit.cli.arguments import file_argument
from cowkit.cli.choose import add_choice, choose
from cowkit.cli.progress import Bar
from cowkit.errors import UsageError
from cowkit.server.control_client import ControlClient

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    from typing import Any

    from cowkit.server.runtime import ServerInfo

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
cowkit diff --base disk.img -o changes.rbd --format rbd && rbd import-diff changes.rbd pool/image
cowkit diff --base disk.img --stat --files         # what changed, without writing anything
cowkit diff --base disk.img --estimate --subclusters
qemu-img compare diff.qcow2 disk.img   # what to do with it: any tool that reads qcow2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit diff` takes."""
    file_argument(
        parser.add_argument("-o", "--output", metavar="OUT", help="the qcow2 image to write; replaced if it exists")
    )
    parser.add_argument(
        "--backing",
        dest="backing_file",
        metavar="NAME",
        help="the name of the base to record in OUT (default: BASE's path; if that is relative, as seen from OUT's directory)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with each extent that changed")
    parser.add_argument(
        "--json-schema", action="store_true", help="print the JSON Schema of what --json prints, and do nothing else"
    )
    parser.add_argument("--exit-code", action="store_true", help="end with status 1 if anything changed, and 0 if not")
    add_choice(parser)
    add_answer_arguments(parser)
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
        "--raw", action="store_true", help="write a sparse raw file with all of the disk instead of qcow2"
    )
    image.add_argument(
        "--format",
        choices=("qcow2", "raw", "rbd"),
        help="what to write: qcow2 (default), raw (as --raw), or rbd: what Ceph's `rbd import-diff` reads",
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask the server for the difference, or for answers about it."""
    if arguments.json_schema:
        from cowkit.diff.answers.schema import schema_text

        print(schema_text(), end="")
        return 0
    if arguments.output is None:
        return _answer(arguments)
    if arguments.estimate:
        raise UsageError("--estimate tells how large OUT would be, and -o writes it: leave out one of them")
    server = choose(arguments.base, arguments.source)
    # Not checked here: the server writes it, and knows best
    folder = "/" if arguments.output.endswith("/") else ""  # which abspath drops, and a file is no folder
    asked: dict[str, Any] = {"path": os.path.abspath(arguments.output) + folder, **_kind(arguments)}
    if arguments.backing_file is not None:
        asked["backing-file"] = arguments.backing_file
    elif arguments.base is not None:
        asked |= {"base": arguments.base, "base-path": os.path.abspath(arguments.base)}
    if is_asked(arguments):
        asked |= {"changes": True, "files": arguments.files}
    with ControlClient(server.control) as client, Bar() as bar:
        answer = client.execute("cowkit-diff", asked, on_event=bar.event)
    if arguments.json:
        print(as_json(answer["report"]))
    else:
        print(answer["summary"])
    if is_asked(arguments):
        if _show(answer["report"]["changes"], arguments, server):
            return 2
    return 1 if arguments.exit_code and answer["report"]["changed_bytes"] else 0


def _answer(arguments: argparse.Namespace) -> int:
    """Ask the server what changed; nothing is written but a picture."""
    if not is_asked(arguments):
        raise UsageError(
            "nothing to do: give -o OUT to write the difference, or --stat, --map, --svg, --files or --estimate to be told "
            "of it (see `cowkit diff --help`)"
        )
    kind = _kind(arguments)
    asked: dict[str, Any] = {name: kind.pop(name) for name in ("since", "at") if name in kind}
    if arguments.backing_file is not None or arguments.backing_format is not None:
        raise UsageError("--backing and --backing-format are for what -o writes: give -o OUT, or leave them out")
    if kind and not arguments.estimate:
        option = next(iter(kind)).replace("standalone", "no-backing").replace("rbd", "format rbd")
        raise UsageError(
            f"--{option} says what kind of image: give -o OUT to write one, or --estimate to learn its size"
        )
    if arguments.estimate:
        asked |= {"estimate": True, **kind}
    server = choose(arguments.base, arguments.source)
    with ControlClient(server.control) as client, Bar() as bar:
        report = client.execute("cowkit-changes", {**asked, "files": arguments.files}, on_event=bar.event)["report"]
    if arguments.json:
        print(as_json(report))
    if _show(report, arguments, server):
        return 2
    return 1 if arguments.exit_code and report["changed_bytes"] else 0


def _show(report: dict[str, Any], arguments: argparse.Namespace, server: ServerInfo) -> bool:
    """Print the answers, or with --json no more than write the picture; whether files were asked for and could not be told."""
    from cowkit.cli.answers import tell_problems, write_picture
    from cowkit.diff.answers import ChangesReport

    found = ChangesReport.from_json(report)
    title = f"{server.name}: what changed" + (f" since {arguments.since}" if arguments.since is not None else "")
    if arguments.json:
        write_picture(found, arguments.svg, title)
    else:
        show(found, arguments, title)
    return tell_problems(found)


def _kind(arguments: argparse.Namespace) -> dict[str, Any]:
    """The members that say what kind of image is asked for."""
    asked: dict[str, Any] = {}
    for name in ("since", "at", "backing_format", "subclusters", "compress", "bitmap", "standalone", "raw"):
        value = getattr(arguments, name)
        if value is not None and value is not False:
            asked[name.replace("_", "-")] = value
    if arguments.format == "qcow2" and arguments.raw:
        raise UsageError("--raw is no qcow2: leave out --raw, or --format qcow2")
    if arguments.format in ("raw", "rbd"):
        asked[arguments.format] = True
    if arguments.cluster_size is not None:
        from cowkit.disk.sizes import parse_size  # the engine, for those who need it

        asked["cluster-size"] = parse_size(arguments.cluster_size, what="cluster size")
    return asked
