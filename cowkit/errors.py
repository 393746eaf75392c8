"""Every error that cowkit raises, in one tree.

Each message is one line: what was wrong, with which value, and what to do about it::

    CowkitError
    ├── UsageError             an argument that makes no sense: a size that is no number, an odd block size
    ├── BaseError              the base, the read-only source of a disk
    │   ├── BaseOpenError      it cannot be opened: missing, unreadable, a directory, a pipe
    │   └── BaseChangedError   it is not what it was when the disk was opened
    ├── DiskError              a request that the disk refuses; ``errno`` says which NBD error it becomes
    │   ├── OutOfBoundsError   it reaches beyond the end of the disk
    │   ├── OverlayFullError   there is no room left for what was written; the old bytes stand
    │   ├── OverlayError       the overlay's file cannot be made, or the system fails to read or write it
    │   ├── DiskClosedError    the disk is closed
    │   └── CheckpointError    no such checkpoint, one too many, or one that was rolled back past
    ├── ServerError            serving a disk over NBD, and controlling what is served
    │   ├── ListenError        no socket can be had at that address
    │   ├── ProtocolError      the peer broke the protocol; ends that connection and nothing else
    │   └── ControlError       a running server that cannot be found, chosen or asked
    ├── DiffError              keeping a difference
    │   ├── OutputError        the file asked for cannot be written
    │   ├── ImageError         an image file that is not what it claims to be
    │   └── WrongBaseError     a difference that was made of another base
    └── ToolError              a program outside cowkit
        ├── MissingToolError   it is not installed; the message says how to get it
        └── ToolFailedError    it ran and failed; the message has the command and the end of its output

The operating system's or the library's own error, where there is one, is always kept as ``__cause__``.
"""

from __future__ import annotations

import errno as _errno

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    from collections.abc import Sequence


class CowkitError(Exception):
    """The root: catch this to catch whatever cowkit raises on purpose."""


class UsageError(CowkitError, ValueError):
    """An argument that makes no sense; also a :class:`ValueError`."""


class BaseError(CowkitError):
    """Something about the base, the read-only source of a disk."""


class BaseOpenError(BaseError):
    """The base cannot be opened."""


class BaseChangedError(BaseError):
    """The base is not the file that it was when the disk was opened, or was written to since."""


class DiskError(CowkitError):
    """A request that the disk refuses.

    ``errno`` is the ``errno`` value that an NBD client is answered with (doc/proto.md, "Error values").
    """

    errno: int = _errno.EIO


class OutOfBoundsError(DiskError):
    """A request that reaches beyond the end of the disk, or has a negative offset or length.

    ``errno`` is EINVAL for requests that read or hint and ENOSPC for those that write (doc/proto.md, "Error values").
    """

    errno = _errno.EINVAL

    def __init__(self, message: str, *, errno: int = _errno.EINVAL) -> None:
        super().__init__(message)
        self.errno = errno


class OverlayFullError(DiskError):
    """No room is left for what was written: the old bytes stand, and the disk goes on."""

    errno = _errno.ENOSPC


class OverlayError(DiskError):
    """The overlay's file cannot be made, or the operating system fails to read or write it."""


class DiskClosedError(DiskError):
    """The disk is closed."""

    errno = _errno.ESHUTDOWN


class CheckpointError(DiskError):
    """No such checkpoint, one too many of them, or one that the disk was rolled back past."""

    errno = _errno.EINVAL


class ServerError(CowkitError):
    """Serving a disk over NBD, and controlling what is served."""


class ListenError(ServerError):
    """No socket can be had at the address that was asked for."""


class ProtocolError(ServerError):
    """The peer broke the protocol: its connection ends, and nothing else does."""


class ControlError(ServerError):
    """A running server that cannot be found, cannot be chosen among several, or refuses what it was asked."""


class DiffError(CowkitError):
    """Keeping a difference."""


class OutputError(DiffError):
    """The file that was asked for cannot be written."""


class ImageError(DiffError):
    """An image file that is not what it claims to be, or that uses a feature which cowkit does not read."""


class WrongBaseError(DiffError):
    """A difference that was made of another base than the one it is to be used with, or of one that has changed since."""


class ToolError(CowkitError):
    """A program outside cowkit."""


class MissingToolError(ToolError):
    """A program that is not installed; the message says what it is for and how to get it."""

    def __init__(self, tool: str, *, purpose: str, remedy: str) -> None:
        super().__init__(f"{tool} is not installed, and {purpose} needs it: {remedy}")
        self.tool = tool


def with_pip(package: str) -> str:
    """How to get ``package`` for the Python that runs this: a ``remedy``."""
    import sys
    from importlib.util import find_spec

    python = sys.executable or "python3"
    first = "" if find_spec("pip") is not None else f"`{python} -m ensurepip`, then "
    return f"{first}`{python} -m pip install {package}`"


class ToolFailedError(ToolError):
    """A program that ran and failed.

    ``command`` is what was run, ``status`` its exit status (negative: the signal that ended it), ``output`` what it printed.
    """

    def __init__(self, command: Sequence[str], status: int, output: str) -> None:
        import shlex  # a millisecond that nobody else needs to spend

        last = output.strip().splitlines()[-1] if output.strip() else "it printed nothing"
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"

        super().__init__(f"`{shlex.join(command)}` {how}: {last}")
        self.command = list(command)
        self.status = status
        self.output = output
