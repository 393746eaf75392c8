"""`cowkit serve`: serve a disk until it is told to stop."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from cowkit.cli.main import note
from cowkit.cli.serving import Serving, add_disk_arguments

DESCRIPTION = (
    "Serve BASE over NBD as a disk that clients may write and wreck; BASE itself is never written, and what was written is "
    "thrown away at the end, unless `cowkit diff` keeps it first. The first line printed is the URI for clients, printed once "
    "they can connect. SIGTERM or ctrl-C ends it."
)
EXAMPLES = """
cowkit serve disk.img
cowkit serve --size 10G --socket /tmp/blank.sock
cowkit serve disk.img --tcp 127.0.0.1:10809
"""

_ENDING = (signal.SIGINT, signal.SIGTERM)
_REDRAW_SECONDS = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit serve` takes."""
    add_disk_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    # Blocked before any thread starts, and so in all of them: the signals wait for sigwait() below, however early they come.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _serve(arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def _serve(arguments: argparse.Namespace) -> None:
    reason = "host-signal"

    def end() -> None:
        nonlocal reason
        reason = "host-qmp-quit"
        os.kill(os.getpid(), signal.SIGTERM)

    with Serving(arguments, quit=end) as serving:
        print(serving.uris[0], flush=True)
        import cowkit.diff  # noqa: F401 - now that clients can connect: the first difference need not wait for it

        if sys.stderr is not None and sys.stderr.isatty():
            _wait_and_draw(serving)
        else:
            signal.sigwait(_ENDING)
        # The words and members of QEMU's event
        serving.control.emit("SHUTDOWN", {"guest": False, "reason": reason})
        written = serving.written()
    note(written)


def _wait_and_draw(serving: Serving) -> None:
    """Wait for the end with a line that tells how the disk is doing."""
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    from cowkit.disk.sizes import format_size

    with Status("", console=Console(stderr=True)) as status:
        while True:
            clients = serving.disk.connections
            written = format_size(serving.disk.dirty_bytes)
            # A Text, for a name in brackets is no markup
            status.update(Text(f"{serving.disk.name}: {clients} client{'' if clients == 1 else 's'}, {written} written"))
            if signal.sigtimedwait(_ENDING, _REDRAW_SECONDS):
                return
