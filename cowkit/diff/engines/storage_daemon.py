"""The engine "qmp": a QEMU storage daemon writes the image, and is fed what changed.

It listens on nothing that has a name: QMP goes through a pair of sockets, NBD through a socket whose name is gone before it
starts. ::

    what changed -> NBD export -> [compress filter] -> node of the format -> file node -> the output
                                                              \\-> backing node, the state before, over NBD

The backing node is for what is written to a cluster in part: QEMU copies the rest of it. The name and format that the image
records are just put into it.
"""

from __future__ import annotations

import base64
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from cowkit.diff.batch import Batch, Run
from cowkit.diff.changed import Changes
from cowkit.diff.engine import Filled, Order
from cowkit.diff.engines.creation import CreationOptions
from cowkit.diff.engines.feeding import FeedError, Feeder
from cowkit.diff.engines.link import linked
from cowkit.diff.engines.program import Program
from cowkit.diff.engines.qmp_session import QmpError, QmpSession
from cowkit.diff.engines.sources import Sources
from cowkit.diff.options import STACKABLE, EngineName
from cowkit.diff.output import AtomicOutput
from cowkit.diff.qcow2.bitmap_writer import granularity_for
from cowkit.diff.qcow2.layout import down, image_size
from cowkit.diff.whole import Whole
from cowkit.disk.extent import Kind
from cowkit.errors import OutputError, UsageError

_PROGRAM = "qemu-storage-daemon"
_REMEDY = "apt install qemu-system-common, or dnf install qemu-system-core"
_EXIT_SECONDS = 60
_LUKS = "luks"
"""The format of nothing but encrypted data: what was never written reads as noise."""


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
        total = order.view.dirty_bytes if order.progress is not None else 0
        with ExitStack() as stack:
            link = stack.enter_context(linked(output, self._sources.directory))
            ours, its = stack.enter_context(_pair())
            exports = stack.enter_context(_Exports(self._sources.directory))
            daemon = stack.enter_context(
                Program(
                    [
                        _PROGRAM,
                        "--chardev",
                        f"socket,id=qmp,fd={its.fileno()},server=off",
                        "--monitor",
                        "chardev=qmp",
                        "--nbd-server",
                        f"addr.type=fd,addr.str={exports.fileno()}",
                    ],
                    purpose="the engine qmp",
                    remedy=_REMEDY,
                    fds=[its.fileno(), exports.fileno()],
                    renamed={link: output.path},
                )
            )
            its.close()  # or nobody would notice that the daemon has ended
            exports.let_go()
            image = None

            def tick() -> None:
                if order.progress is not None and image is None:
                    order.progress(0, total)

            try:
                with QmpSession(ours, tick) as session:
                    image = _Image(order, session, exports, link, secret, self._sources.socket_before)
                    filled = image.write()
                    session.execute("quit")
                if not daemon.wait(_EXIT_SECONDS):
                    raise QmpError("it does not end")
            except (QmpError, FeedError) as error:
                words = daemon.last_words() if daemon.has_ended() else daemon.readable(str(error))
                raise OutputError(f"cannot write {output.path}: {_PROGRAM}: {words}") from error
        if order.options.is_raw:
            output.truncate(order.view.size)  # QEMU counts in sectors
        filled.tally.bytes_read += self._sources.bytes_served()
        return filled
