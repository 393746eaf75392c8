"""`cowkit diff` of what no cowkit serves: an NBD export of another server, or an image file, compared with a base.

And of a disk that one does serve, on top of an earlier difference or compared with another base than its own: the server
keeps all that changed, as of one moment, in a file that has lost its name by the time it is read, and that is compared.
"""

from __future__ import annotations

import os
import stat

from cowkit.cli.answers import is_asked
from cowkit.cli.choose import choose, matching, of_one_disk, serves
from cowkit.cli.image_arguments import image_options
from cowkit.errors import ControlError, UsageError
from cowkit.server.control_client import ControlClient

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import TypeVar

    from cowkit.diff import DiffReport
    from cowkit.diff.answers import ChangesReport
    from cowkit.server.runtime import ServerInfo

    T = TypeVar("T")


def _is_uri(source: str) -> bool:
    """Whether it is an NBD URI, and no path (a pattern would take a millisecond to compile, each time)."""
    scheme, found, _ = source.partition("://")
    return bool(found) and scheme.lower().partition("+")[0] in ("nbd", "nbds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit diff` takes for such a source."""
    group = parser.add_argument_group("a source that no cowkit serves (--from URI or IMAGE, with --base)")
    group.add_argument(
        "--base-format", metavar="FORMAT", help="the format of BASE (default: told by its name and content)"
    )
    group.add_argument("--from-format", metavar="FORMAT", help="the format of IMAGE (default: told the same way)")
    group.add_argument(
        "--from-context",
        metavar="CONTEXT",
        help="believe what this metadata context of the source says has changed since BASE, instead of comparing all: "
        "qemu:dirty-bitmap:NAME, or qemu:allocation-depth",
    )


def keep(
    arguments: argparse.Namespace, servers: list[ServerInfo], progress: Callable[[int, int], None]
) -> DiffReport | None:
    """Compare what is to be kept with the base; None where a running server knows what changed, and is to be asked.

    :param servers: those that are running.
    :raises UsageError: an option makes sense for the other kind of source alone.
    :raises ControlError: there is no base.
    """

    def compare(now: str, format: str | None) -> DiffReport:
        from cowkit.keeping.foreign import keep_foreign

        return keep_foreign(
            now,
            arguments.base,
            arguments.output,
            options=image_options(arguments),
            now_format=format,
            base_format=arguments.base_format,
            context=arguments.from_context,
            backing_file=arguments.backing_file,
            backing_format=arguments.backing_format,
            progress=progress,
            changes=is_asked(arguments),
            files=arguments.files,
        )

    return _of_foreign(arguments, servers, compare)


def look(
    arguments: argparse.Namespace, servers: list[ServerInfo], progress: Callable[[int, int], None]
) -> ChangesReport | None:
    """The same, but tell of it, and write nothing."""

    def compare(now: str, format: str | None) -> ChangesReport:
        from cowkit.keeping.foreign import look_at_foreign

        return look_at_foreign(
            now,
            arguments.base,
            now_format=format,
            base_format=arguments.base_format,
            context=arguments.from_context,
            files=arguments.files,
            image=image_options(arguments) if arguments.estimate else None,
            progress=progress,
        )

    return _of_foreign(arguments, servers, compare)


def _of_foreign(
    arguments: argparse.Namespace, servers: list[ServerInfo], compare: Callable[[str, str | None], T]
) -> T | None:
    """What ``compare`` has of a foreign source and its format; None where it is none."""
    if _is_foreign(arguments, servers):
        return compare(arguments.source, arguments.from_format)
    server = _server_below(arguments, servers) or _server_of_another_base(arguments, servers)
    for name in ("base_format", "from_format", "from_context"):
        if getattr(arguments, name) is not None and (server is None or name != "base_format"):
            option = name.replace("_", "-")
            raise UsageError(
                f"--{option} is for a source that no cowkit serves (--from URI or --from IMAGE): leave it out"
            )
    if server is None:
        return None
    fd = _kept_by(server, arguments)
    try:
        return compare(f"/proc/{os.getpid()}/fd/{fd}", "qcow2")
    finally:
        os.close(fd)


def _is_foreign(arguments: argparse.Namespace, servers: list[ServerInfo]) -> bool:
    """Whether ``--from`` names an NBD URI or a file, and no running cowkit."""
    source: str | None = arguments.source
    if source is None or matching(source, servers):
        return False
    if not (_is_uri(source) or _is_disk(source)):
        if "/" in source or "." in source:  # a path rather than a name
            what = f"{source} is no image file" if os.path.lexists(source) else f"there is no file {source}"
            raise ControlError(f"no server matches --from {source}, and {what}; `cowkit ls` lists the servers")
        return False
    if arguments.base is None:
        try:
            choose(None, source, servers)
        except ControlError as error:
            raise ControlError(f"{error}; to compare {source} itself with a base, give --base") from error
    for name in ("since", "at"):
        if getattr(arguments, name) is not None:
            raise UsageError(
                f"--{name} names a checkpoint of a disk that cowkit serves, and {source} is none: leave it out"
            )
    return True


def _is_disk(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _server_below(arguments: argparse.Namespace, servers: list[ServerInfo]) -> ServerInfo | None:
    """The one running server that is meant, if ``--base`` is no base of its but an image that stands on it.

    Of a blank disk, it is one that stands alone in the end, and has as many bytes unless ``--from`` names the server.
    """
    base: str | None = arguments.base
    if base is None or arguments.since is not None or not _is_disk(base):
        return None
    servers = matching(arguments.source, servers)
    if not servers or any(serves(server, base) for server in servers):
        return None
    from cowkit.diff.qcow2.header import backing_chain

    below = backing_chain(os.path.abspath(base))
    found = [server for server in servers if any(serves(server, each) for each in below)]
    if not found and (size := _size_alone(base, below)) is not None:  # the difference of a blank disk names no base
        blank = [server for server in servers if server.base is None]
        found = (
            blank if arguments.source is not None else [each for each in blank if -(-each.size // 512) * 512 == size]
        )
    found = of_one_disk(found)
    return found[0] if len(found) == 1 else None


def _size_alone(image: str, below: list[str]) -> int | None:
    """The virtual size of ``image``, if the last of the images that it stands on, or itself, stands alone; None where not."""
    from cowkit.diff.qcow2.header import open_image, read_head
    from cowkit.errors import ImageError

    size = None
    try:
        for path in (image, below[-1] if below else image):
            fd = open_image(path)
            try:
                head = read_head(path, fd)
            finally:
                os.close(fd)
            size = head.header.size if size is None else size
    except ImageError:
        return None
    return size if head.backing_file is None else None


def _server_of_another_base(arguments: argparse.Namespace, servers: list[ServerInfo]) -> ServerInfo | None:
    """The one running server whose URI is the source, if ``--base`` is none of its: then that is what to compare with.

    A name or process id chooses among cowkit's disks, and with another base says two things that do not go together.
    """
    base: str | None = arguments.base
    source: str | None = arguments.source
    if base is None or source is None or not _is_uri(source) or arguments.since is not None:
        return None
    if not (_is_uri(base) or _is_disk(base)):
        return None
    servers = matching(source, servers)
    return servers[0] if len(servers) == 1 and not serves(servers[0], base) else None


def _kept_by(server: ServerInfo, arguments: argparse.Namespace) -> int:
    """A descriptor of a file without a name that has all that changed on the server's disk, on top of its base.

    Where no image can stand on that base, such as a part of a file, it has all of the disk.
    """
    if arguments.output is not None:
        folder = os.path.dirname(os.path.realpath(arguments.output))
    else:
        from cowkit.disk.layer import default_directory  # the engine, for those who need it

        folder = os.path.realpath(default_directory())
    path = os.path.join(folder, f".cowkit-{os.urandom(8).hex()}.tmp")
    asked: dict[str, object] = {"path": path}
    if server.base is not None and _is_disk(server.base):
        asked["backing-file"] = os.path.realpath(server.base)
    if arguments.at is not None:
        asked["at"] = arguments.at
    try:
        with ControlClient(server.control) as client:
            try:
                client.execute("cowkit-diff", asked)
            except ControlError:  # if that is not about the base, the same will be said again
                asked.pop("backing-file", None)
                client.execute("cowkit-diff", {**asked, "standalone": True})
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        try:  # contextlib takes a millisecond to import, for each difference
            os.unlink(path)
        except OSError:
            pass
