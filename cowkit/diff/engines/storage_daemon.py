"""The engine "qmp": a QEMU storage daemon writes the image, and is fed what changed.

Nobody else can talk to it: QMP goes through a pair of sockets, NBD through one in a private directory. ::

    what changed -> NBD export -> [compress filter] -> node of the format -> file node -> the output
                                                                          -> backing node: the state before, over NBD

The backing node is for what is written to a cluster in part: QEMU copies the rest of it. The name and format that the image
records are just put into it.
"""

from __future__ import annotations

import base64
import os
from contextlib import ExitStack

from cowkit.diff.engine import Filled, Order
from cowkit.diff.engines.feeding import FeedError
from cowkit.diff.engines.finishing import finish
from cowkit.diff.engines.image import Image
from cowkit.diff.engines.link import linked
from cowkit.diff.engines.program import Program
from cowkit.diff.engines.qmp_session import QmpError, QmpSession
from cowkit.diff.engines.sockets import Listening, pair
from cowkit.diff.engines.sources import Sources
from cowkit.diff.options import EngineName
from cowkit.diff.output import AtomicOutput
from cowkit.diff.qcow2.layout import image_size
from cowkit.errors import OutputError, ToolFailedError, UsageError

_PROGRAM = "qemu-storage-daemon"
_REMEDY = "apt install qemu-system-common, or dnf install qemu-system-core"
_EXIT_SECONDS = 60
_DYING_SECONDS = 5
_LONGEST_SECRET = 1 << 16


class StorageDaemon:
    """Has a QEMU storage daemon write images."""

    name: EngineName = "qmp"

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def fill(self, order: Order, output: AtomicOutput) -> Filled:
        """See :meth:`cowkit.diff.engine.Engine.fill`.

        :raises MissingToolError: qemu-storage-daemon, setpriv or libnbd's binding is not installed.
        """
        secret = _secret(order.options.secret_file)
        follower = _Follower(order)
        if order.progress is not None:
            order = order._replace(progress=follower.tell)
        if order.options.is_raw:
            output.truncate(image_size(order.view.size))  # QEMU counts in sectors
        with ExitStack() as stack:
            link = stack.enter_context(linked(output, self._sources.directory))
            ours, its = stack.enter_context(pair())
            listening = stack.enter_context(Listening(self._sources.directory))
            daemon = stack.enter_context(
                Program(
                    [
                        _PROGRAM,
                        "--chardev",
                        f"socket,id=qmp,fd={its.fileno()},server=off",
                        "--monitor",
                        "chardev=qmp",
                        "--nbd-server",
                        f"addr.type=fd,addr.str={listening.fileno()}",
                    ],
                    purpose="the engine qmp",
                    remedy=_REMEDY,
                    fds=[its.fileno(), listening.fileno()],
                    renamed={link: output.path},
                )
            )
            its.close()  # or nobody would notice that the daemon has ended
            listening.let_go()
            try:
                with QmpSession(ours, follower.ask) as session:
                    filled = Image(order, session, listening, link, secret, self._sources.socket_before).write()
                    session.execute("quit")
                if not daemon.wait(_EXIT_SECONDS):
                    raise QmpError("it does not end")
            except (QmpError, FeedError, ToolFailedError) as error:
                lost = isinstance(error, FeedError) and error.lost  # a program that is ending closes its sockets first
                ended = daemon.has_ended(_DYING_SECONDS if lost else 0)
                words = daemon.last_words() if ended else daemon.readable(str(error))
                raise OutputError(f"cannot write {output.path}: {_PROGRAM}: {words}") from error
        finish(order, output)
        filled.tally.bytes_read += self._sources.bytes_served()
        return filled


class _Follower:
    """Whoever follows the progress; asked whether to go on while there is nothing to tell, too."""

    def __init__(self, order: Order) -> None:
        self._progress = order.progress
        self._done = 0, order.view.dirty_bytes if order.progress is not None else 0

    def tell(self, done: int, total: int) -> None:
        self._done = done, total
        self.ask()

    def ask(self) -> None:
        if self._progress is not None:
            self._progress(*self._done)


def _secret(path: str | os.PathLike[str] | None) -> str | None:
    """The content of the file in base64; None without one.

    :raises UsageError: it cannot be read.
    """
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return base64.b64encode(file.read(_LONGEST_SECRET)).decode()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot read the secret file {os.fsdecode(path)!r}: {why}") from error
