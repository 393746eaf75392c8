"""What `cowkit serve` and `cowkit run` share: a disk from options, served, controlled and listed."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import cowkit
from cowkit.cli.control_commands import DiskCommands
from cowkit.cli.file_argument import file_argument
from cowkit.cli.shares import shared_commands
from cowkit.cow_disk import CowDisk
from cowkit.disk.sizes import format_size
from cowkit.errors import UsageError
from cowkit.server import counting
from cowkit.server.control import ControlServer
from cowkit.server.listener import uri_of
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
    from socket import socket as Socket

    from cowkit.hosting.server import DiskServer


def add_disk_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which disk to serve, and where."""
    file_argument(
        parser.add_argument(
            "base", metavar="BASE", nargs="?", help="an image file, block device or NBD URI; it is never written"
        )
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
    disk.add_argument(
        "--format",
        metavar="FORMAT",
        help="BASE's: raw, xz, gz, zst, bz2, or QEMU's name of one, such as qcow2 (default: what BASE's name and content agree on)",
    )
    disk.add_argument(
        "--offset",
        metavar="SIZE",
        default="0",
        help="begin that many bytes into BASE, or into its partition (default: 0)",
    )
    disk.add_argument(
        "--partition", metavar="N", type=int, help="serve BASE's partition N, counted from 1, instead of the whole"
    )
    file_argument(
        disk.add_argument(
            "--overlay", metavar="DIFF", help="go on from DIFF, a qcow2 difference to BASE; DIFF itself is not written"
        )
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
            "--socket",
            metavar="PATH",
            help="a Unix socket at PATH, of at most 107 bytes (default: one in a private directory)",
        )
    )
    where.add_argument(
        "--tcp",
        metavar="HOST:PORT",
        help="TCP instead, or as well; port 0 takes any free one, and without HOST it is the loopback address. Whoever can connect "
        "may read and write, unless TLS says otherwise",
    )
    where.add_argument(
        "--vsock", metavar="PORT", type=int, help="a vsock port for guests, instead or as well; 0 takes any free one"
    )
    where.add_argument(
        "--export-name",
        metavar="NAME",
        default="",
        help="what clients may ask for (default: the empty name, which always works)",
    )
    where.add_argument("--description", metavar="TEXT", default="", help="what the export is, for people")
    may = parser.add_argument_group("what clients may do")
    may.add_argument("--read-only", action="store_true", help="refuse what would change the disk")
    may.add_argument(
        "--share",
        choices=("all", "export", "connection"),
        default="all",
        help="who shares a disk: all clients; those that ask for the same export name, where any name will do; or nobody: each "
        "connection has its own, gone when it leaves (default: all). There is no checkpoint and no diff but with `all`",
    )
    may.add_argument(
        "--max-exports", metavar="N", type=int, help="with --share export: how many names there may be (default: 64)"
    )
    file_argument(
        may.add_argument(
            "--tls-certs",
            metavar="DIR",
            help="encrypt, with server-cert.pem and server-key.pem in DIR, as QEMU and nbdkit have them",
        )
    )
    may.add_argument(
        "--tls-verify-peer",
        action="store_true",
        help="with --tls-certs: turn away clients without a certificate of the authority in DIR's ca-cert.pem, or with one that "
        "is in its ca-crl.pem",
    )
    file_argument(
        may.add_argument(
            "--tls-psk",
            metavar="FILE",
            help="encrypt, with the pre-shared keys in FILE, which psktool makes; needs Python 3.13",
        )
    )
    may.add_argument(
        "--tls",
        choices=("on", "require"),
        help="whether clients may or must encrypt (default: they must, with --tls-certs or --tls-psk)",
    )


class Serving:
    """A disk as the options of :func:`add_disk_arguments` ask for it, served and listed; a context manager.

    When it is entered, clients can connect and other processes can find it.

    :param quit: what the control command ``quit`` calls; without it there is no such command.
    :param local: have a Unix socket even where only TCP was asked for.
    :param listeners: serve on these sockets, too, which are closed in the end.
    :param on_idle: called, from another thread, when the last client has left.
    :raises BaseChangedError: at the end, when all is cleaned up.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        *,
        quit: Callable[[], None] | None = None,
        local: bool = False,
        listeners: Sequence[Socket] = (),
        on_idle: Callable[[], None] | None = None,
    ) -> None:
        self._arguments = arguments
        self._quit = quit
        self._local = local
        self._listeners = listeners
        self._on_idle = on_idle

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._open(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.__exit__(kind, error, trace)

    def _open(self, undo: ExitStack) -> None:
        given = self._arguments
        if given.base is None and given.size is None and given.overlay is None:
            raise UsageError("give a BASE to serve, or --size SIZE for a blank disk")
        self.disk = undo.enter_context(
            CowDisk(
                given.base,
                size=given.size,
                block_size=given.block_size,
                base_format=given.format,
                offset=given.offset,
                partition=given.partition,
                round=given.round,
                cow_on_read=given.cow_on_read,
                cow_on_cache=given.cow_on_cache,
                tmpdir=given.tmpdir,
                name=given.name,
                overlay=given.overlay,
            )
        )
        directory = make_socket_dir()
        undo.callback(remove_socket_dir, directory)
        counting.allow()
        undo.callback(counting.wait_for_ended)
        undo.callback(counting.allow, yes=False)
        self.server = self._listen(directory)
        """Who serves it."""
        undo.callback(self.server.stop)  # before its directory goes
        undo.callback(self.disk.engine.base.interrupt)  # or that waits for as long as the base makes a client wait
        self.socket = self.server.socket
        """The path of a Unix socket for NBD clients; None with TCP or an activated socket alone."""
        base = self.disk.engine.base
        self.info = ServerInfo(
            pid=os.getpid(),
            name=self.disk.name,
            base=base.path or base.given,
            identity=base.identity and (base.identity.device, base.identity.inode),
            size=self.disk.size,
            uris=self.uris,
            started=time.time(),
            control=str(directory / CONTROL_SOCKET),
            share=given.share,
        )
        commands = shared_commands(
            DiskCommands(self.disk, self.info, quit=self._quit).table(), given.share, lambda: self.server.written_bytes
        )
        self.control = undo.enter_context(ControlServer(self.info.control, commands, version=cowkit.__version__))
        publish(directory, self.info)
        undo.callback((directory / SERVER_FILE).unlink, missing_ok=True)
        # Last: who has connected to a socket that was handed over, or to a known place, finds the rest in order.
        self.server.start()

    def _listen(self, directory: Path) -> DiskServer:
        given = self._arguments
        told = given.tcp is not None or given.vsock is not None or any(uri_of(each, "") for each in self._listeners)
        own = given.socket is None and (self._local or not told)
        server = self.disk.serve(
            socket=directory / NBD_SOCKET if own else given.socket,
            tcp=given.tcp,
            vsock=given.vsock,
            listeners=self._listeners,
            export_name=given.export_name,
            description=given.description,
            read_only=given.read_only,
            share=given.share,
            max_exports=given.max_exports,
            tls_certs=given.tls_certs,
            tls_psk=given.tls_psk,
            tls_verify_peer=given.tls_verify_peer,
            tls=given.tls,
            on_idle=self._on_idle,
            start=False,
        )
        # A socket that nobody asked for comes last.
        self.uris = (*server.uris[1:], server.uris[0]) if own else server.uris
        """Where NBD clients connect, in the order to prefer."""
        return server

    def written(self) -> str:
        """How much clients wrote, for people."""
        dirty = self.server.written_bytes
        base = self.disk.base
        where = "to the blank disk" if base is None else f"on top of {base}"  # which itself is never written
        if self._arguments.overlay is not None:
            from cowkit.diff.overlay import OVERLAY

            if any(point.name == OVERLAY for point in self.disk.checkpoints):  # until a reset, which takes both away
                where += f" with {self._arguments.overlay}"
        said = f"{format_size(dirty)} written {where}, thrown away" if dirty else f"nothing was written {where}"
        failure = self.disk.overlay_failure
        return said if failure is None else f"{said}; requests were refused: {failure}"
