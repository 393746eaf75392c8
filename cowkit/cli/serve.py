"""`cowkit serve`: serve a disk until it is told to stop."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from cowkit.cli.file_argument import file_argument
from cowkit.cli.lives import Ending, Opening, PidFile, ReadyLine
from cowkit.cli.serving import Serving, add_disk_arguments
from cowkit.cli.standard_error import note
from cowkit.errors import UsageError
from cowkit.server.activation import activated_listeners

if TYPE_CHECKING:
    from socket import socket as Socket

DESCRIPTION = (
    "Serve BASE over NBD as a disk that clients may write and wreck; BASE itself is never written, and what was written is "
    "thrown away at the end, unless `cowkit diff` keeps it first. The first line printed is the URI for clients, printed once "
    "they can connect. SIGTERM or ctrl-C ends it, SIGHUP does not. Started by a program that hands over a listening socket (systemd, or "
    "`nbdinfo -- [ cowkit serve BASE ]`), it serves on that, prints nothing, and ends with that program. "
    "COWKIT_EAGER=0 in the environment saves processor time at the cost of speed: see docs/speed.md."
)
EXAMPLES = """
cowkit serve disk.img
cowkit serve --size 10G --socket /tmp/blank.sock
cowkit serve disk.img --tcp 127.0.0.1:10809
cowkit serve disk.img --tcp 0.0.0.0:10809 --tls-certs /etc/pki/cowkit --tls-verify-peer
nbdcopy -- [ cowkit serve disk.img ] null:
"""

_ENDING = (signal.SIGINT, signal.SIGTERM)
_REDRAW_SECONDS = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit serve` takes."""
    add_disk_arguments(parser)
    life = parser.add_argument_group("how long, and for whom")
    life.add_argument(
        "--stdio",
        action="store_true",
        help="serve the one client at standard input and output, a socket or two pipes, and end with it",
    )
    life.add_argument(
        "--once",
        action="store_true",
        help="end when the last client has left, after there was one that chose an export",
    )
    life.add_argument("--exit-with-parent", action="store_true", help="end when the process ends that started this one")
    file_argument(
        life.add_argument(
            "--pid-file", metavar="PATH", help="have the process id in PATH as long as clients can connect"
        )
    )
    life.add_argument(
        "--ready-fd",
        metavar="FD",
        type=int,
        help="write the URI, as a line, to the descriptor FD when clients can connect, and close it",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    # Blocked before any thread starts, and so in all of them: the signals wait for sigwait() below, however early they come.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _serve(arguments)
    finally:
        while signal.sigtimedwait(_ENDING, 0):
            pass  # a second one is no reason to die of it, now that all is cleaned up
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def _serve(arguments: argparse.Namespace) -> None:
    ending = Ending()
    with ExitStack() as stack:
        listeners = _activated(arguments, stack)
        # nbdinfo and nbdcopy start a server in brackets, and leave without ending it where they fail.
        if arguments.exit_with_parent or (listeners and os.getppid() > 1):
            from cowkit.server.parent import ParentWatch

            stack.enter_context(ParentWatch(ending.ask))
        ready = None
        if arguments.ready_fd is not None:
            if arguments.ready_fd in [listener.fileno() for listener in listeners]:
                raise UsageError(
                    f"--ready-fd {arguments.ready_fd}: that descriptor is the socket that was handed over to serve on"
                )
            ready = ReadyLine(arguments.ready_fd)
            stack.callback(ready.close)
        stream = None
        if arguments.stdio:
            from cowkit.server.pipes import take_standard_streams

            stream = take_standard_streams()
            stack.callback(stream.close)
        # Then whoever started this process talks to the user, and knows where clients connect.
        quiet = bool(listeners) or stream is not None
        with Opening(_ENDING):
            serving = stack.enter_context(
                Serving(
                    arguments,
                    quit=lambda: ending.ask("host-qmp-quit"),
                    listeners=listeners,
                    on_idle=ending.ask if arguments.once else None,
                )
            )
        if arguments.pid_file is not None:
            stack.enter_context(PidFile(arguments.pid_file))
        if stream is not None:
            serving.server.adopt(stream, on_end=ending.ask)
        if not quiet:
            print(serving.uris[0], flush=True)
        if ready is not None:
            ready.tell(serving.uris[0])
        import cowkit.keeping.live  # noqa: F401 - now that clients can connect: the first difference need not wait for it

        if not quiet and sys.stderr is not None and sys.stderr.isatty():
            _wait_and_draw(serving)
        else:
            signal.sigwait(_ENDING)
        # The words and members of QEMU's event
        serving.control.emit("SHUTDOWN", {"guest": False, "reason": ending.reason})
        written = None if quiet else serving.written()
    if written is not None:
        note(written)


def _activated(arguments: argparse.Namespace, stack: ExitStack) -> list[Socket]:
    """The listening sockets that were handed over."""
    listeners = activated_listeners()
    for listener in listeners:
        stack.callback(listener.close)
    options = {"--socket": arguments.socket, "--tcp": arguments.tcp, "--vsock": arguments.vsock}
    elsewhere = next((name for name, value in options.items() if value is not None), None)
    if arguments.stdio and elsewhere:
        raise UsageError(f"--stdio serves the client at standard input and output alone: leave out {elsewhere}")
    if listeners and (elsewhere or arguments.stdio):
        raise UsageError(f"a socket to serve on was handed over (LISTEN_FDS): leave out {elsewhere or '--stdio'}")
    return listeners


def _wait_and_draw(serving: Serving) -> None:
    """Wait for the end with a line that tells how the disk is doing."""
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    from cowkit.disk.sizes import format_size

    with Status("", console=Console(stderr=True)) as status:
        while True:
            clients = serving.disk.connections
            written = format_size(serving.server.written_bytes)
            # A Text, for a name in brackets is no markup
            status.update(
                Text(f"{serving.disk.name}: {clients} client{'' if clients == 1 else 's'}, {written} written")
            )
            if signal.sigtimedwait(_ENDING, _REDRAW_SECONDS):
                return
