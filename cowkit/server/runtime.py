"""The runtime directory: where the sockets of served disks are, and how one process finds what the others serve.

::

    /run/user/1000/cowkit/            the runtime directory, mode 0700
        4711-3f9a1c/                  one disk served by process 4711, mode 0700
            nbd.sock                  for NBD clients, unless they were given another place
            control.sock              for QMP clients: `cowkit serve` and `cowkit run` alone
            server.json               what is served; written when clients can connect

What holds: a private directory is in use exactly as long as its maker lives and keeps it, because the maker holds an
exclusive `flock` on the directory itself, and the kernel drops that with the process however it ends. So what a killed
process left behind is known from what is in use without looking at process ids, which are used again, and is removed.
Who looks takes the lock shared: two who look do not take each other for an owner. A child made by `os.fork` owns nothing
of its parent's and removes nothing of it.
"""

from __future__ import annotations

import fcntl
import os
import stat

from cowkit.errors import ControlError, ListenError
from cowkit.quick_json import dumps, loads

TYPE_CHECKING = False  # as typing has it, which takes long to import, for `cowkit diff` and `cowkit ls` are to be quick
if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

SOCKET_PATH_LIMIT = 107
"""The most bytes that the path of a Unix socket may have (unix(7): 108 with the zero byte at its end)."""

NBD_SOCKET = "nbd.sock"
CONTROL_SOCKET = "control.sock"
SERVER_FILE = "server.json"

_SERVER_FILE_VERSION = 1
_LONGEST_BELOW = len("/4194304-abcdef/") + len(CONTROL_SOCKET)


def _system_dir() -> str:
    return f"/tmp/cowkit-{os.geteuid()}"  # used only if it is ours alone: see _refusal


def _session_dir() -> str | None:
    """The directory below ``$XDG_RUNTIME_DIR``, if that is usable: after `su` it may be another user's, or be gone."""
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if not session.startswith("/"):
        return None
    directory = os.path.join(session, "cowkit")
    try:
        status = os.stat(session)
    except OSError:
        return None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return None
    return directory if len(os.fsencode(directory)) + _LONGEST_BELOW <= SOCKET_PATH_LIMIT else None


def _candidates() -> list[str]:
    """The directories to look in; the first is the one to make sockets in."""
    asked = os.environ.get("COWKIT_RUNTIME_DIR")
    if asked:
        return [os.path.abspath(asked)]
    session = _session_dir()
    return [session, _system_dir()] if session else [_system_dir()]


def _refusal(directory: str) -> str | None:
    """Why ``directory``, which exists, is not safe to put sockets in; None if it is."""
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode):
        return "it is no directory"
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, not to you ({os.geteuid()})"
    if status.st_mode & 0o077:
        return f"others may enter it (mode {stat.S_IMODE(status.st_mode):04o}, not 0700)"
    return None


def runtime_dir() -> Path:
    """The runtime directory, made if it is missing.

    It is ``$COWKIT_RUNTIME_DIR``, or ``$XDG_RUNTIME_DIR/cowkit`` where that is the user's own and short enough for a
    socket's path, or ``/tmp/cowkit-<uid>``.

    :raises ListenError: it cannot be made, is too long a path, or is not the user's alone (mode 0700, no symbolic link).
    """
    directory = _candidates()[0]
    longest = len(os.fsencode(directory)) + _LONGEST_BELOW
    if longest > SOCKET_PATH_LIMIT:
        raise ListenError(
            f"the runtime directory {directory} makes socket paths of {longest} bytes, over the {SOCKET_PATH_LIMIT} that the "
            "system allows: set COWKIT_RUNTIME_DIR to a shorter one"
        )
    try:
        try:
            refusal = _refusal(directory)
        except FileNotFoundError:
            try:
                os.mkdir(directory, 0o700)
            except FileExistsError:
                pass  # another process was quicker
            refusal = _refusal(directory)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ListenError(
            f"cannot make the runtime directory {directory}: {why}; COWKIT_RUNTIME_DIR names another"
        ) from error
    if refusal:
        raise ListenError(f"the runtime directory {directory} is not safe: {refusal}; COWKIT_RUNTIME_DIR names another")
    from pathlib import Path

    return Path(directory)


_held: dict[str, int] = {}
"""The private directories of this process, each with the descriptor that holds its lock."""
_pruned: set[str] = set()


def _after_fork_in_child() -> None:
    for fd in _held.values():
        os.close(fd)  # the parent's copy keeps the lock
    _held.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def make_socket_dir() -> Path:
    """A new private directory (mode 0700) for the sockets of one disk; give it back with :func:`remove_socket_dir`.

    :raises ListenError: there is no safe runtime directory, or nothing can be made in it.
    """
    parent = runtime_dir()
    if str(parent) not in _pruned:
        _pruned.add(str(parent))
        for _ in _living(str(parent)):
            pass
    while True:
        directory = parent / f"{os.getpid()}-{os.urandom(3).hex()}"
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            continue
        except OSError as error:
            raise ListenError(f"cannot make a directory for sockets in {parent}: {error.strerror}") from error
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # somebody pruned it before it was locked
        except OSError as error:
            os.rmdir(directory)
            raise ListenError(f"cannot open the directory {directory} for sockets: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)  # somebody is pruning it
            continue
        if not os.fstat(fd).st_nlink:
            os.close(fd)  # somebody did
            continue
        _held[str(directory)] = fd
        return directory


def remove_socket_dir(directory: Path) -> None:
    """Remove what :func:`make_socket_dir` gave, with all that is in it. What is not this process's is left alone."""
    fd = _held.pop(str(directory), None)
    if fd is None:
        return
    try:
        _remove(str(directory), fd)
    finally:
        os.close(fd)


def _remove(directory: str, fd: int) -> None:
    """Remove the directory that is open as ``fd`` and the files in it; others may be doing the same."""
    try:
        for file in os.listdir(fd):
            try:
                os.unlink(file, dir_fd=fd)
            except OSError:
                pass  # not ours, or gone: in the first case the directory stays
        os.rmdir(directory)
    except OSError:
        pass


def _is_private(name: str) -> bool:
    """Whether a private directory may be called so: 4711-3f9a1c (a pattern would cost more than all else here)."""
    pid, dash, rest = name.partition("-")
    return (
        bool(dash) and pid.isdecimal() and pid.isascii() and len(rest) == 6 and not set(rest) - set("0123456789abcdef")
    )


def _living(parent: str) -> Iterator[int]:
    """The private directories that are in use, each open for the loop's body; those that are not are removed."""
    for name in sorted(os.listdir(parent)):
        if not _is_private(name):
            continue
        directory = os.path.join(parent, name)
        if directory in _held:
            yield _held[directory]  # asking for its lock through another descriptor would say the same
            continue
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield fd
            else:
                _remove(directory, fd)
        finally:
            os.close(fd)


def identity_of(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Who the file at ``path`` is, whatever it is called: device and inode; for a block device -1 and its number.

    :raises OSError: there is none, or it cannot be reached.
    """
    status = os.stat(path)
    if stat.S_ISBLK(status.st_mode):
        return -1, status.st_rdev
    return status.st_dev, status.st_ino


class ServerInfo:
    """A disk that a living process serves, and how to reach it; not changed once it is made."""

    __slots__ = ("base", "control", "identity", "name", "pid", "share", "size", "started", "uris")

    def __init__(
        self,
        pid: int,
        name: str,
        base: str | None,
        identity: tuple[int, int] | None,
        size: int,
        uris: tuple[str, ...],
        started: float,
        control: str,
        share: str = "all",
    ) -> None:
        self.pid = pid
        self.name = name
        """What to call it; not necessarily unique."""
        self.base = base
        """The absolute path of its base; None for a blank disk."""
        self.identity = identity
        """Who the base is, see :func:`identity_of`; None for a blank disk."""
        self.size = size
        """Bytes."""
        self.uris = uris
        """Where NBD clients connect; at least one."""
        self.started = started
        """Seconds since 1970."""
        self.control = control
        """The path of its control socket."""
        self.share = share
        """Who shares a disk; there is one disk with ``"all"`` alone."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ServerInfo) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.control)

    @property
    def uri(self) -> str:
        """The first of ``uris``."""
        return self.uris[0]

    def to_json(self) -> dict[str, Any]:
        """The same, as an object of JSON's types."""
        return {
            "pid": self.pid,
            "name": self.name,
            "base": self.base,
            "identity": self.identity and list(self.identity),
            "size": self.size,
            "uris": list(self.uris),
            "started": self.started,
            "control": self.control,
            "share": self.share,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ServerInfo:
        """What :meth:`to_json` gave. :raises ValueError, KeyError, TypeError: it is something else."""
        identity = value["identity"]
        if identity is not None:
            device, inode = map(int, identity)
            identity = (device, inode)
        uris = tuple(map(str, value["uris"]))
        if not uris:
            raise ValueError("a server without any URI")
        return cls(
            pid=int(value["pid"]),
            name=str(value["name"]),
            base=None if value["base"] is None else str(value["base"]),
            identity=identity,
            size=int(value["size"]),
            uris=uris,
            started=float(value["started"]),
            control=str(value["control"]),
            share=str(value.get("share", "all")),
        )


def publish(directory: Path, info: ServerInfo) -> None:
    """Let the others find ``info`` through the private ``directory``; to be called when clients can connect.

    :raises ListenError: it cannot be written.
    """
    partial = directory / f"{SERVER_FILE}.partial"
    try:
        with partial.open("w", encoding="ascii") as file:
            file.write(dumps({"version": _SERVER_FILE_VERSION, **info.to_json()}))
        partial.replace(directory / SERVER_FILE)
    except OSError as error:
        raise ListenError(f"cannot write {directory / SERVER_FILE}: {error.strerror}") from error


def _published(fd: int) -> ServerInfo | None:
    try:
        with open(
            os.open(SERVER_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=fd), encoding="ascii"
        ) as file:
            value = loads(file.read())
        return ServerInfo.from_json(value) if value["version"] == _SERVER_FILE_VERSION else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # none yet, none any more, or that of another version of cowkit


def running() -> list[ServerInfo]:
    """What `cowkit serve` and `cowkit run` of this user serve at this moment, oldest first.

    :raises ControlError: the runtime directory is not safe (see :func:`runtime_dir`).
    """
    found = []
    for number, candidate in enumerate(_candidates()):
        try:
            refusal = _refusal(candidate)
            if refusal is None:
                for fd in _living(candidate):
                    info = _published(fd)
                    if info is not None:
                        found.append(info)
        except FileNotFoundError:
            continue  # nobody serves anything from there
        except OSError as error:
            refusal = f"cannot read it: {error.strerror}"
        if (
            refusal and not number
        ):  # a stranger's directory in a place that is not ours to use anyway hides nothing of ours
            raise ControlError(
                f"the runtime directory {candidate} is not safe: {refusal}; COWKIT_RUNTIME_DIR names another"
            )
    return sorted(found, key=lambda info: info.started)
