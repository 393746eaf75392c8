"""Chooses the engine of a difference, and serves it the two states while it works."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from cowkit.diff import ImageOptions
from cowkit.diff.engine import Engine
from cowkit.diff.native import NATIVE
from cowkit.diff.qcow2.layout import LONGEST_BACKING_NAME
from cowkit.diff.view import View
from cowkit.disk import Base
from cowkit.disk.view_base import ViewBase

if TYPE_CHECKING:
    from cowkit.diff.engines.sources import Readable
    from cowkit.keeping.served import Served


@contextmanager
def engine_for(view: View, options: ImageOptions) -> Iterator[Engine]:
    """The engine that ``options`` ask for, and for as long as it works what it needs; nothing for the native one.

    :raises MissingToolError: it needs a program or a module that is not installed.
    :raises ListenError: there is no private directory for its sockets.
    """
    name = options.chosen_engine
    if name == "native":
        yield NATIVE
        return
    from cowkit.diff.engines.sources import Readable, Sources
    from cowkit.keeping.served import served
    from cowkit.server.runtime import make_socket_dir, remove_socket_dir

    with ExitStack() as stack:
        directory = make_socket_dir()
        stack.callback(remove_socket_dir, directory)
        everything: list[Served] = []

        def serve(base: Base) -> Served:
            everything.append(stack.enter_context(served(base, view.block_size)))
            return everything[-1]

        def bytes_served() -> int:
            return sum(each.bytes_read for each in everything)

        before: Readable | None = None
        socket_before: str | None = None
        if not options.has_all and view.base.given is not None:
            before = _readable(view.base) if name == "qemu-img" else None
            if before is None:
                server = serve(view.base.hold())
                before, socket_before = Readable(server.uri, "raw"), server.socket
        if name == "qemu-img":
            from cowkit.diff.engines.qemu_img import QemuImg

            now = serve(ViewBase(view, "the state to keep")).uri
            yield QemuImg(Sources(now, before, socket_before, os.fspath(directory), bytes_served))
        else:
            from cowkit.diff.engines.storage_daemon import StorageDaemon

            yield StorageDaemon(Sources(None, before, socket_before, os.fspath(directory), bytes_served))


def _readable(base: Base) -> Readable | None:
    """The base by its own name, where QEMU can open that and record it for a while."""
    from cowkit.diff.engines.sources import Readable

    if base.backing_refusal is not None:
        return None
    name = base.path or base.given
    if name is None or len(os.fsencode(name)) > LONGEST_BACKING_NAME:
        return None
    return Readable(name, base.backing_format)
