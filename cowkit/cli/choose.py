"""Which of the running servers a command is about."""

from __future__ import annotations

import os
import stat

from cowkit.cli.file_argument import file_argument
from cowkit.errors import ControlError, UsageError
from cowkit.server.control_client import ControlClient
from cowkit.server.runtime import CONTROL_SOCKET, NBD_SOCKET, ServerInfo, identity_of, running

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    import argparse


def add_choice(parser: argparse.ArgumentParser, *, source: str = "SERVER", more: str = "") -> None:
    """What says which server is meant; ``more`` is what else ``source`` may be."""
    from cowkit.cli.served_argument import server_argument  # who reads the commonest command lines does without

    which = parser.add_argument_group("which disk (may be left out while there is only one)")
    file_argument(which.add_argument("--base", metavar="BASE", help="the disk of this base, under whatever path"))
    chosen = which.add_argument(
        "--from",
        dest="source",
        metavar=source,
        help="the server of this name, process id, NBD URI or socket; `cowkit ls` lists them" + more,
    )
    server_argument(chosen, or_file=bool(more))


def matching(source: str | None, servers: list[ServerInfo]) -> list[ServerInfo]:
    """Those of ``servers`` that ``source`` names; all of them without one."""
    return servers if source is None else _from(source, servers)


def choose(base: str | None, source: str | None, servers: list[ServerInfo] | None = None) -> ServerInfo:
    """The one running server that is meant.

    :param servers: those that are running, for who has looked already.
    :raises ControlError: there is none, there are several, or ``source`` serves another base than ``base``.
    """
    for option, given in (("--base", base), ("--from", source)):
        if given == "":
            raise UsageError(f"{option} is empty: give a name, or leave it out")
    if servers is None:
        servers = running()
    wanted = None
    if source is not None:
        found = _from(source, servers)
        if base is not None:
            found = [server for server in found if serves(server, base)]
            wanted = f"--from {source} with base {base}"
        else:
            wanted = f"--from {source}"
    elif base is not None:
        found = [server for server in servers if serves(server, base)]
        wanted = f"base {base}"
    else:
        found = servers
    found = of_one_disk(found)
    if len(found) == 1:
        return found[0]
    if found:
        names = {server.name for server in found}
        more = "by process id " if source is not None or len(names) < len(found) else ""
        if wanted is None:
            how = "with --base or --from" if _told_by_base(found) else f"{more}with --from"
            raise ControlError(f"{len(found)} disks are being served: {_list(found)}; choose one {how}")
        raise ControlError(f"{len(found)} servers match {wanted}: {_list(found)}; choose one {more}with --from")
    if not servers:
        start = f"cowkit serve {base or 'BASE'}"
        if wanted is None:
            raise ControlError(f"nothing is being served: start a server with `{start}`")
        raise ControlError(f"no server matches {wanted}: nothing is being served; start one with `{start}`")
    how = "leave out --base, or --from" if source and base and _from(source, servers) else "choose one with --from"
    raise ControlError(f"no server matches {wanted}; these are running: {_list(servers)}; {how}")


def _list(servers: list[ServerInfo]) -> str:
    return ", ".join(
        f"{server.name} (pid {server.pid}, {f'base {server.base}' if server.base else 'blank'}, {server.uri})"
        for server in servers
    )


def of_one_disk(servers: list[ServerInfo]) -> list[ServerInfo]:
    """Those of several servers that have one disk for all clients: others have no checkpoint and no diff, so are not meant.

    Where there are no such servers, all of them: what is asked then says why it cannot.
    """
    return [server for server in servers if server.share == "all"] or servers


def _told_by_base(servers: list[ServerInfo]) -> bool:
    """Whether the base tells each of ``servers`` that has one from the others."""
    bases = [server.identity or server.base for server in servers if server.base is not None]
    return 0 < len(bases) == len(set(bases))


def serves(server: ServerInfo, base: str) -> bool:
    """Whether ``base`` is the server's, by identity, or by path: then the server itself says that it was replaced."""
    if server.base is None:
        return False
    try:
        if identity_of(base) == server.identity:
            return True
    except (OSError, ValueError):
        pass
    return os.path.realpath(base) == os.path.realpath(server.base)


def _from(source: str, servers: list[ServerInfo]) -> list[ServerInfo]:
    by_pid = [server for server in servers if str(server.pid) == source]
    if by_pid:
        return by_pid
    found = [
        server
        for server in servers
        if source in (server.name, *server.uris)
        or _socket_of(source) in map(_socket_of, server.uris)
        or os.path.realpath(source) in map(os.path.realpath, (server.control, *_sockets_of(server)))
    ]
    if found:
        return found
    try:
        if not stat.S_ISSOCK(os.stat(source).st_mode):
            return []
    except (OSError, ValueError):
        return []
    folder, name = os.path.split(os.path.realpath(source))
    beside = os.path.join(folder, CONTROL_SOCKET)
    if name == NBD_SOCKET and os.path.exists(beside):  # of another runtime directory
        source = beside
    return [_ask(source)]


def _sockets_of(server: ServerInfo) -> list[str]:
    """The paths of its Unix sockets for NBD clients."""
    return [found[1] for uri in server.uris if isinstance(found := _socket_of(uri), tuple)]


def _socket_of(uri: str) -> object:
    """The export's name and the socket of the URI of a Unix socket, however it is spelt; the word itself otherwise."""
    if not uri.startswith(("nbd+unix:", "nbds+unix:")):
        return uri
    from urllib.parse import parse_qs, unquote, urlsplit

    try:
        parts = urlsplit(uri)
        sockets = parse_qs(parts.query, errors="surrogateescape").get("socket", [])
    except ValueError:
        return uri
    return (unquote(parts.path.removeprefix("/")), os.path.realpath(sockets[0])) if sockets else uri


def _ask(path: str) -> ServerInfo:
    """What the server behind a control socket that is in none of our lists has to say of itself."""
    with ControlClient(path) as client:
        said = client.execute("cowkit-query-disk")
    try:
        return ServerInfo.from_json({**said, "control": os.path.abspath(path)})
    except (TypeError, ValueError, KeyError) as error:
        raise ControlError(f"the server at {path} is no cowkit of this version") from error
