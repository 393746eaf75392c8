"""The servers that are compared: how each is started over an image, with its overlay in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import quote

from scripts.benchmarks.bench import Room
from scripts.benchmarks.model import COWKIT, NBDKIT, NBDKIT_4K, QEMU, UnavailableError
from scripts.benchmarks.processes import Child, running, wait_for_greeting

COWKIT_COMMAND = os.path.join(os.path.dirname(sys.executable), "cowkit")
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """A server that takes part. ``command(image, size, folder, where)`` starts it in the foreground."""

    label: str
    program: str
    package: str
    """Debian's."""
    command: Callable[[str, int, str, Place], list[str]]
    separate: bool = False
    """Whether each connection has a disk of its own."""
    daemon: bool = False
    """Whether it puts itself into the background, its process id in the folder's file ``pid``."""
    export: str = ""


@dataclass(frozen=True)
class Place:
    """Where to listen: a Unix socket's path, or a TCP port on the loopback address."""

    path: str
    port: int | None = None

    @property
    def address(self) -> str | tuple[str, int]:
        """As `socket.connect` takes it."""
        return self.path if self.port is None else (LOOPBACK, self.port)


@dataclass(frozen=True)
class Served:
    """A server that clients can connect to."""

    uri: str
    child: Child
    room: Room


def _cowkit(image: str, size: int, folder: str, where: Place) -> list[str]:
    place = ["--socket", where.path] if where.port is None else ["--tcp", f"{LOOPBACK}:{where.port}"]
    return [COWKIT_COMMAND, "serve", image, "--tmpdir", folder, "--exit-with-parent", *place]


def _nbdkit(*middle: str) -> Callable[[str, int, str, Place], list[str]]:
    def command(image: str, size: int, folder: str, where: Place) -> list[str]:
        place = ["-U", where.path] if where.port is None else ["-i", LOOPBACK, "-p", str(where.port)]
        named = {"IMAGE": image, "SIZE": str(size)}
        return ["nbdkit", "-f", "--exit-with-parent", *place, *(named.get(word, word) for word in middle)]

    return command


def _qemu_nbd(image: str, size: int, folder: str, where: Place) -> list[str]:
    place = ["-k", where.path] if where.port is None else ["-b", LOOPBACK, "-p", str(where.port)]
    return ["qemu-nbd", "--snapshot", "-f", "raw", "-e", "8", "--persistent", *place, image]


def _nbd_server(image: str, size: int, folder: str, where: Place) -> list[str]:
    settings = os.path.join(folder, "nbd-server.conf")
    with open(settings, "w") as file:
        file.write(
            f"[generic]\nunixsock = {where.path}\n[disk]\nexportname = {image}\nfilesize = {size}\n"
            f"copyonwrite = true\ncowdir = {folder}\n"
        )
    return ["nbd-server", "-C", settings, "-p", os.path.join(folder, "pid")]


SERVERS = {
    COWKIT: Server("cowkit", COWKIT_COMMAND, "", _cowkit),
    NBDKIT: Server("nbdkit cow", "nbdkit", "nbdkit", _nbdkit("--filter=cow", "file", "IMAGE")),
    NBDKIT_4K: Server(
        "nbdkit cow, 4K blocks",
        "nbdkit",
        "nbdkit",
        _nbdkit("--filter=cow", "file", "IMAGE", "cow-block-size=4096"),
    ),
    QEMU: Server("qemu-nbd -s", "qemu-nbd", "qemu-utils", _qemu_nbd),
    "nbd-server": Server(
        "nbd-server", "nbd-server", "nbd-server", _nbd_server, separate=True, daemon=True, export="disk"
    ),
    "nbdkit-null": Server("nbdkit null", "nbdkit", "nbdkit", _nbdkit("null", "SIZE")),
}


def label_of(contender: str) -> str:
    """How tables call it."""
    return SERVERS[contender].label if contender in SERVERS else contender


def need(program: str, package: str) -> None:
    """Whether a program is here.

    :raises UnavailableError: it is not.
    """
    if shutil.which(program) is None:
        raise UnavailableError(f"{program} is not installed (Debian: apt install {package}; see `cowkit doctor`)")


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        port = taken.getsockname()[1]
    assert isinstance(port, int)
    return port


@contextlib.contextmanager
def serving(contender: str, image: str, room: Room, *, tcp: bool = False) -> Iterator[Served]:
    """A fresh server of ``image`` for the length of a block; its ``room`` goes with it.

    :raises UnavailableError: it is not installed, or cannot do this.
    :raises BenchError: it does not start.
    """
    with room, _started(contender, image, room, free_port() if tcp else None) as (child, where):
        wait_for_greeting(child, where.address)
        export = SERVERS[contender].export
        at = f"nbd://{LOOPBACK}:{where.port}/" if tcp else f"nbd+unix:///{export}?socket={quote(where.path)}"
        yield Served(at, child, room)


def milliseconds_to_greeting(contender: str, image: str, room: Room) -> float:
    """From the start of the program to its first greeting to a client."""
    with room:
        begun = time.perf_counter()
        with _started(contender, image, room, None) as (child, where):
            wait_for_greeting(child, where.address)
            return (time.perf_counter() - begun) * 1e3


@contextlib.contextmanager
def _started(contender: str, image: str, room: Room, port: int | None) -> Iterator[tuple[Child, Place]]:
    server = SERVERS[contender]
    need(server.program, server.package)
    where = Place(os.path.join(room.sockets, "nbd.sock"), port)
    command = server.command(image, os.path.getsize(image), room.folder, where)
    with running(command, environment=room.environment) as child:
        if server.daemon:
            child.follow(os.path.join(room.folder, "pid"))
        yield child, where
