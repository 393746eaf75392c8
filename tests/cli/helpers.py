"""The command line as users have it: processes, and what they print."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cowkit.diff import Qcow2Image
from cowkit.disk import FileBase

PATIENCE = 60
COWKIT = (sys.executable, "-m", "cowkit.cli.main")
ROOT = Path(__file__).resolve().parents[2]

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


def complaint(done: Done) -> str:
    """The one line of a command that could not do it."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cowkit: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    return done.stderr.removeprefix("cowkit: ").rstrip("\n")


class Server:
    """A running `cowkit serve`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid
        assert process.stdout
        self.uri = process.stdout.readline().rstrip("\n")
        assert self.uri, process.communicate()[1]

    def freeze(self) -> None:
        """Have it stand still until SIGCONT."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Its status, and what else it printed to standard output and error."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err


Serve = Callable[..., Server]


def write(uri: str, data: bytes, offset: int) -> None:
    """Write over NBD with libnbd."""
    import nbd

    client = nbd.NBD()
    client.connect_uri(uri)
    client.pwrite(data, offset)
    client.shutdown()


def read(uri: str, length: int, offset: int) -> bytes:
    """Read over NBD with libnbd."""
    import nbd

    client = nbd.NBD()
    client.connect_uri(uri)
    data = client.pread(length, offset)
    client.shutdown()
    return bytes(data)


def content(image: Path, base: Path) -> bytes:
    """All that a difference reads as on top of ``base``, after its tables have been checked."""
    source = FileBase(base)
    try:
        with Qcow2Image(image, source.pread, source.size) as opened:
            opened.check()
            return opened.pread(opened.size, 0)
    finally:
        source.release()
