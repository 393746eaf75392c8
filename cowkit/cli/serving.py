"""What `cowkit serve` and `cowkit run` share: a disk from options, served, controlled and listed."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import cowkit
from cowkit.cli.arguments import file_argument
from cowkit.cli.control_commands import DiskCommands
from cowkit.cow_disk import CowDisk
from cowkit.disk.sizes import format_size
from cowkit.errors import UsageError
from cowkit.server.control import ControlServer
from cowkit.server.runtime import (
    CONTROL_SOCKET,
    NBD_SOCKET,
    SERVER_FILE,
    ServerInfo,
    make_socket_dir,
    publish,
    remove_socket_dir,
)

if TYPE_CHECKING:
    from cowkit.server.server import NbdServer


def add_disk_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which disk to serve, and where."""
    file_argument(
        parser.add_argument("base", metavar="BASE", nargs="?", help="a raw image file or block device; it is never written")
    )
    disk = parser.add_argument_group("the disk")
    disk.add_argument(
        "--size",
        metavar="SIZE",
        help="without BASE: the size of a blank disk, such as 1G; with BASE: a larger size, which reads as zeroes beyond BASE",
    )
    disk.add_argument(
        "--block-size",
        metavar="SIZE",
        help="the unit of copy-on-write, a power of two from 512 to 16M (default: 4096)",
    )
    disk.add_argument(
        "--round",
        choices=("exact", "down", "up"),
        default="exact",
        help="a size that is no multiple of the block size is kept, rounded down, or rounded up (default: exact)",
    )
    disk.add_argument("--cow-on-read", action="store_true", help="copy what is read from BASE into the overlay")
    disk.add_argument("--cow-on-cache", action="store_true", help="copy what a cache request names into the overlay")
    file_argument(
        disk.add_argument(
            "--tmpdir", metavar="DIR", help="where the overlay's unlinked files live (default: $TMPDIR, or /var/tmp)"
        )
    )
    disk.add_argument("--name", metavar="NAME", help="what to call the disk in `cowkit ls` (default: BASE's file name)")
    where = parser.add_argument_group("where clients connect")
    file_argument(
        where.add_argument(
            "--socket", metavar="PATH", help="a Unix socket at PATH, of at most 107 bytes (default: one in a private directory)"
        )
    )
    where.add_argument(
        "--tcp",
        metavar="HOST:PORT",
        help="TCP instead, or with --socket as well; port 0 takes any free one. There is no encryption and no password",
    )
    where.add_argument(
        "--export-name", metavar="NAME", default="", help="what clients may ask for (default: the empty name, which always works)"
    )


class Serving:
    """A disk as the options of :func:`add_disk_arguments` ask for it, served and listed; a context manager.

    When it is entered, clients can connect and other processes can find it.

    :param quit: what the control command ``quit`` calls; without it there is no such command.
    :param local: have a Unix socket even where only TCP was asked for.
    :raises BaseChangedError: at the end, when all is cleaned up.
    """

    def __init__(
        self, arguments: argparse.Namespace, *, quit: Callable[[], None] | None = None, local: bool = False
    ) -> None:
        self._arguments = arguments
        self._quit = quit
        self._local = local

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._open(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._undo.__exit__(kind, error, trace)

    def _open(self, undo: ExitStack) -> None:
        given = self._arguments
        if given.base is None and given.size is None:
            raise UsageError("give a BASE to serve, or --size SIZE for a blank disk")
        self.disk = undo.enter_context(
            CowDisk(
                given.base,
                size=given.size,
                block_size=given.block_size,
                round=given.round,
                cow_on_read=given.cow_on_read,
                cow_on_cache=given.cow_on_cache,
                tmpdir=given.tmpdir,
                name=given.name,
            )
        )
        directory = make_socket_dir()
        undo.callback(remove_socket_dir, directory)
        servers = self._listen(directory)
        for server in servers:
            undo.callback(server.stop)  # before its directory goes
        self.uris = tuple(server.uri for server in servers)
        """Where NBD clients connect, in the order to prefer."""
        self.socket = next((server.socket for server in servers if server.socket), None)
        """The path of a Unix socket for NBD clients; None with TCP alone."""
        base = self.disk.engine.base
        self.info = ServerInfo(
            pid=os.getpid(),
            name=self.disk.name,
            base=base.path,
            identity=base.identity and (base.identity.device, base.identity.inode),
            size=self.disk.size,
            uris=self.uris,
            started=time.time(),
            control=str(directory / CONTROL_SOCKET),
        )
        commands = DiskCommands(self.disk, self.info, quit=self._quit).table()
        self.control = undo.enter_context(ControlServer(self.info.control, commands, version=cowkit.__version__))
        publish(directory, self.info)
        undo.callback((directory / SERVER_FILE).unlink, missing_ok=True)

    def _listen(self, directory: Path) -> list[NbdServer]:
        given = self._arguments
        servers = []
        if given.socket is not None or given.tcp is None or self._local:
            servers.append(self.disk.serve(socket=given.socket or directory / NBD_SOCKET, export_name=given.export_name))
        if given.tcp is not None:
            servers.append(self.disk.serve(tcp=given.tcp, export_name=given.export_name))
            if given.socket is None:
                servers.reverse()
        return servers

    def written(self) -> str:
        """How much clients wrote, for people."""
        dirty = self.disk.dirty_bytes
        what = self.disk.base or "the blank disk"
        return f"{format_size(dirty)} written to {what}, thrown away" if dirty else f"nothing was written to {what}"
