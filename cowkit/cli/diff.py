"""`cowkit diff`: keep what changed on a disk that is being served, or tell of it."""

from __future__ import annotations

import os

from cowkit.cli import foreign
from cowkit.cli.answers import add_answer_arguments, as_json, check_picture, is_asked, show
from cowkit.cli.choose import add_choice, choose
from cowkit.cli.file_argument import file_argument
from cowkit.cli.image_arguments import add_image_arguments, as_members, asked_kind, note_names, option_of
from cowkit.cli.progress import Bar
from cowkit.errors import UsageError
from cowkit.server.control_client import ControlClient
from cowkit.server.runtime import running

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from cowkit.server.runtime import ServerInfo

DESCRIPTION = (
    "Write what changed on a disk that `cowkit serve` or `cowkit run` serves (or what differs between any other source and a base) "
    "to a qcow2 image on top of the base. Of a disk that is served it is the "
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
cowkit diff --base disk.img --stat --files         # what changed, without writing anything
cowkit diff --base disk.img --estimate --subclusters
cowkit diff --base disk.img --from nbd://host/export -o diff.qcow2
cowkit diff --base disk.img --from overlay.vmdk -o diff.qcow2
cowkit diff --base disk.img -o diff.qcow2 --engine qemu-img
cowkit diff --base disk.img -o now.vmdk -O vmdk --image-option subformat=streamOptimized
cowkit diff --base disk.img -o secret.qcow2 --secret-file key.txt
cowkit diff --base disk.img -o changes.rbd -O rbd && rbd import-diff changes.rbd pool/image
qemu-img compare diff.qcow2 disk.img   # what to do with it: any tool that reads qcow2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit diff` takes."""
    from cowkit.cli.served_argument import checkpoint_argument  # who reads the commonest command lines does without

    file_argument(
        parser.add_argument("-o", "--output", metavar="OUT", help="the qcow2 image to write; replaced if it exists")
    )
    parser.add_argument(
        "--backing",
        dest="backing_file",
        metavar="NAME",
        help="the name of the base to record in OUT, or with --since of what was kept of that state; QEMU looks for "
        "a relative one from OUT's directory (default: BASE's path)",
    )
    parser.add_argument(
        "--backing-format",
        metavar="FORMAT",
        help="the format of the base to record (default: what it is; qcow2 with --since, while there is no such file)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with each extent that changed")
    parser.add_argument(
        "--json-schema", action="store_true", help="print the JSON Schema of what --json prints, and do nothing else"
    )
    parser.add_argument(
        "--exit-code",
        action="store_true",
        help="end with status 1 if anything changed, the size included, and 0 if not",
    )
    add_choice(
        parser,
        source="SOURCE",
        more="; or, with --base, any other NBD URI, or an image file of a format that QEMU reads",
    )
    foreign.add_arguments(parser)
    add_answer_arguments(parser)
    states = parser.add_argument_group("which two states (default: the base, and now)")
    for option, what in (
        ("--since", "only what changed since that checkpoint, on top of what was kept of it, which --backing names"),
        ("--at", "what was there at that checkpoint instead of now"),
    ):
        checkpoint_argument(states.add_argument(option, metavar="CHECKPOINT", help=what))
    add_image_arguments(parser, format_option="--format")


def run(arguments: argparse.Namespace) -> int:
    """Have the difference written, or answers given about it."""
    if arguments.json_schema:
        from cowkit.diff.answers.schema import schema_text

        print(schema_text(), end="")
        return 0
    if arguments.output is None:
        return _answer(arguments)
    if arguments.estimate:
        raise UsageError("--estimate tells how large OUT would be, and -o writes it: leave out one of them")
    if not arguments.output:
        raise UsageError("-o is empty: give the name of a file")
    if arguments.output == "-":
        raise UsageError("a difference cannot be written to standard output: name a file (./- if it is to be called -)")
    _check_picture(arguments)
    servers = running()
    with Bar() as bar:
        kept = foreign.keep(arguments, servers, bar.update)
    if kept is not None:
        report: dict[str, Any] = kept.to_json()
        summary, name = kept.summary(), os.path.basename(arguments.output)
    else:
        report, summary, name = _kept_by_server(arguments, servers)
    print(as_json(report) if arguments.json else summary)
    note_names(arguments.output, arguments.backing_file, arguments)
    if is_asked(arguments) and _show(report["changes"], arguments, name):
        return 2
    return 1 if arguments.exit_code and (report["changed_bytes"] or report["resized"]) else 0


def _kept_by_server(arguments: argparse.Namespace, servers: list[ServerInfo]) -> tuple[dict[str, Any], str, str]:
    """Ask the server for the difference: its report and summary, and the disk's name."""
    server = choose(arguments.base, arguments.source, servers)
    _check_picture(arguments, server.base)
    # Not checked here: the server writes it, and knows best
    path = os.path.abspath(arguments.output)
    if path.startswith("/proc/"):  # where a name such as /proc/self/cwd means another thing to the server
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    folder = "/" if arguments.output.endswith("/") else ""  # which abspath drops, and a file is no folder
    asked: dict[str, Any] = {"path": path + folder, **_states(arguments)}
    asked |= as_members(asked_kind(arguments))
    if arguments.backing_format is not None:
        asked["backing-format"] = arguments.backing_format
    if arguments.backing_file is not None:
        asked["backing-file"] = arguments.backing_file
    elif arguments.base is not None:
        asked |= {"base": arguments.base, "base-path": os.path.abspath(arguments.base)}
    if is_asked(arguments):
        asked |= {"changes": True, "files": arguments.files}
    with ControlClient(server.control) as client, Bar() as bar:
        answer = client.execute("cowkit-diff", asked, on_event=bar.event)
    return answer["report"], answer["summary"], server.name


def _answer(arguments: argparse.Namespace) -> int:
    """Tell what changed; nothing is written but a picture."""
    if not is_asked(arguments):
        raise UsageError(
            "nothing to do: give -o OUT to write the difference, or --stat, --map, --svg, --files or --estimate to be told "
            "of it; --json and --exit-code go with any of these (see `cowkit diff --help`)"
        )
    if arguments.backing_file is not None or arguments.backing_format is not None:
        raise UsageError("--backing and --backing-format are for what -o writes: give -o OUT, or leave them out")
    kind = asked_kind(arguments)
    if kind and not arguments.estimate:
        raise UsageError(
            f"{option_of(next(iter(kind)))} says what kind of image: give -o OUT to write one, or --estimate to learn its size"
        )
    _check_picture(arguments)
    servers = running()
    with Bar() as bar:
        found = foreign.look(arguments, servers, bar.update)
    if found is not None:
        report, name = found.to_json(), os.path.basename(arguments.source or arguments.base)
    else:
        report, name = _told_by_server(arguments, servers, kind)
    if arguments.json:
        print(as_json(report))
    if _show(report, arguments, name):
        return 2
    return 1 if arguments.exit_code and (report["changed_bytes"] or report["resized"]) else 0


def _told_by_server(
    arguments: argparse.Namespace, servers: list[ServerInfo], kind: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Ask the server what changed: its report, and the disk's name."""
    server = choose(arguments.base, arguments.source, servers)
    _check_picture(arguments, server.base)
    asked: dict[str, Any] = {**_states(arguments), "files": arguments.files}
    if arguments.estimate:
        asked |= {"estimate": True, **as_members(kind)}
    with ControlClient(server.control) as client, Bar() as bar:
        return client.execute("cowkit-changes", asked, on_event=bar.event)["report"], server.name


def _check_picture(arguments: argparse.Namespace, base: str | None = None) -> None:
    """See that the picture replaces nothing of what this is about; ``base`` is that of the server that is asked."""
    check_picture(arguments.svg, arguments.output, arguments.base, arguments.source, arguments.secret_file, base)


def _states(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in ("since", "at") if (value := getattr(arguments, name)) is not None}


def _show(report: dict[str, Any], arguments: argparse.Namespace, name: str) -> bool:
    """Print the answers, or with --json no more than write the picture; whether files were asked for and could not be told."""
    from cowkit.cli.answers import tell_problems, write_picture
    from cowkit.diff.answers import ChangesReport

    found = ChangesReport.from_json(report)
    title = f"{name}: what changed" + (f" since {arguments.since}" if arguments.since is not None else "")
    if arguments.json:
        write_picture(found, arguments.svg, title)
    else:
        show(found, arguments, title)
    return tell_problems(found)
