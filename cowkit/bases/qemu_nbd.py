"""A read-only qemu-nbd that lives and dies with the base that needs it.

Design note. Nothing may be left when the process that started it goes, be it by SIGKILL:

* Its sockets have no name: the listening one is bound, our connections are made, and its name is removed, all before
  qemu-nbd starts; it is handed over as systemd would (LISTEN_FDS). So there is nothing to wait for, either: the
  connections lie in the socket's queue until qemu-nbd takes them, and end when it gives up.
* The kernel kills it when its parent dies (PR_SET_PDEATHSIG, set by setpriv). For the kernel, the parent is a thread. So
  the thread that starts qemu-nbd is one of our own, which stays until qemu-nbd has ended, and thereby takes away the zombie.
* Between the start and setpriv's work the parent may have died already: the shell that hands over the socket looks.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence

from cowkit.errors import BaseOpenError, MissingToolError

_HAND_OVER = '[ "$PPID" = "$1" ] || exit 1; shift; LISTEN_PID=$$; LISTEN_FDS=1; export LISTEN_PID LISTEN_FDS; exec "$@" 3<&0 0</dev/null'
"""For sh: be the program in ``"$@"`` with the socket that is standard input as systemd hands sockets over (sd_listen_fds(3))."""

QEMU_UTILS = "apt install qemu-utils, or dnf install qemu-img"


def find_program(name: str, purpose: str, remedy: str) -> str:
    """Where the program is.

    :raises MissingToolError: it is not on PATH.
    """
    found = shutil.which(name)
    if found is None:
        raise MissingToolError(name, purpose=purpose, remedy=remedy)
    return found


class QemuNbd:
    """qemu-nbd serving one image, read-only, to the connections made here and nobody else.

    :param image: its arguments that name the image.
    :param connections: how many connections to make.
    :raises MissingToolError: qemu-nbd or setpriv is not installed.
    :raises BaseOpenError: there is no room for the sockets, or the program cannot be started.
    """

    def __init__(self, given: str, image: Sequence[str], connections: int) -> None:
        purpose = f"opening the image {given}"
        command = [
            find_program("setpriv", purpose, "apt install util-linux, or dnf install util-linux"),
            "--pdeathsig=KILL",
            "sh",
            "-c",
            _HAND_OVER,
            "sh",
            str(os.getpid()),
            find_program("qemu-nbd", purpose, QEMU_UTILS),
            "--read-only",
            "--persistent",
            "--shared=0",
            *image,
        ]
        self.sockets: list[socket.socket] = []
        """The connections that nobody has taken yet."""
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        try:
            with self._listen(connections) as listener:
                self._keeper = threading.Thread(
                    target=self._keep, args=(command, listener), name="cowkit-qemu-nbd", daemon=True
                )
                self._started = threading.Event()
                self._keeper.start()
                self._started.wait()
        except OSError as error:
            self._forget()
            raise BaseOpenError(f"cannot start qemu-nbd for base {given}: {error.strerror or error}") from error
        if self._error is not None:
            self._forget()
            raise BaseOpenError(f"cannot start qemu-nbd for base {given}: {self._error.strerror}") from self._error

    def _listen(self, connections: int) -> socket.socket:
        with tempfile.TemporaryDirectory(prefix="cowkit-") as directory:
            listener = socket.socket(socket.AF_UNIX)
            try:
                path = os.path.join(directory, "nbd")
                listener.bind(path)
                listener.listen(connections)
                for _ in range(connections):
                    self.sockets.append(socket.socket(socket.AF_UNIX))
                    self.sockets[-1].connect(path)
            except BaseException:
                listener.close()
                raise
        return listener

    def _keep(self, command: list[str], listener: socket.socket) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=listener.fileno(),
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            self._error = error
            return
        finally:
            self._started.set()
        self._process.wait()

    def last_words(self) -> str:
        """The last line that it printed, without its name; nothing if it printed none."""
        lines = os.pread(self._output.fileno(), 1 << 16, 0).decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return last.removeprefix("qemu-nbd:").strip()

    def kill(self) -> None:
        """End it without waiting."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """End it, as it has nothing to save; when this returns it is no more."""
        self.kill()
        self._keeper.join()
        self._forget()

    def _forget(self) -> None:
        for each in self.sockets:
            each.close()
        self._output.close()
