"""The steps of a storage daemon that make one image: QMP commands, and what is fed to its NBD exports."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from cowkit.diff.batch import Batch
from cowkit.diff.changed import Changes
from cowkit.diff.engine import Filled, Order
from cowkit.diff.engines.creation import CreationOptions
from cowkit.diff.engines.feeding import Feeder, FeedError
from cowkit.diff.engines.qmp_session import QmpError, QmpSession
from cowkit.diff.engines.sockets import Listening
from cowkit.diff.options import STACKABLE
from cowkit.diff.qcow2.bitmap_writer import granularity_for
from cowkit.diff.qcow2.layout import image_size, up
from cowkit.diff.whole import Whole
from cowkit.disk.extent import Kind
from cowkit.errors import UsageError

_FILE, _BEFORE, _IMAGE, _PACKED, _DIRTY = "file", "before", "image", "packed", "dirty"
"""Names of nodes and of their exports."""
_SECRET = "secret"  # noqa: S105 - the name of an object
_LUKS = "luks"
"""The format of nothing but encrypted data: there, what was never written reads as noise."""
_UNSYNCED = {"no-flush": True}
"""fsync(2) would promise something about power cuts, and take most of the time."""

_TRIES = 8
_BAD_CLOCK = "Unable to get accurate CPU usage"
"""What QEMU says of encryption where a system counts CPU time coarsely (qcrypto_pbkdf2_count_iters); by chance."""

Json = dict[str, Any]


class Image:
    """An image to be written by the daemon behind ``session``.

    :param listening: where its NBD server listens.
    :param path: of the file, which is there.
    :param secret: the passphrase in base64, or None.
    :param before: the path of the socket where the state before is served; None: zeroes.
    """

    def __init__(
        self,
        order: Order,
        session: QmpSession,
        listening: Listening,
        path: str,
        secret: str | None,
        before: str | None,
    ) -> None:
        self._order = order
        self._session = session
        self._listening = listening
        self._path = path
        self._secret = secret
        self._before = before
        self._kind = order.options.kind

    def write(self) -> Filled:
        """Make the image, feed it, and let go of it.

        :raises UsageError: an option is none that this QEMU has.
        :raises QmpError: the daemon refuses something.
        :raises FeedError: it fails to write.
        """
        order, options = self._order, self._order.options
        self._add({"driver": "file", "node-name": _FILE, "filename": self._path, "cache": _UNSYNCED})
        opening = {} if options.is_raw else self._create()
        self._add({"driver": self._kind, "node-name": _IMAGE, "file": _FILE, "cache": _UNSYNCED, **opening})
        changes = Changes(order.view, order.portion, order.progress)
        batches: Iterable[Batch] = Whole(order.view, changes, order.portion) if options.has_all else changes
        if options.compress is not None:
            size = order.shape.size
            self._feed_packed(batches)
        else:
            size = self._feed(batches)
        if options.bitmap is not None:
            self._put_in_bitmap(options.bitmap)
        for node in (_IMAGE, _BEFORE, _FILE):
            if node in self._nodes():
                self._session.execute("blockdev-del", {"node-name": node})
        return Filled(changes.tally, order.view.size if options.is_raw else size)

    def _feed(self, batches: Iterable[Batch]) -> int:
        """Write all that changed; the image's size."""
        with self._feeder(_IMAGE) as feeder:
            size = feeder.size
            if size < self._order.view.size:
                raise FeedError(f"the image has {size} bytes, and the disk {self._order.view.size}")
            if self._kind == _LUKS:
                feeder.zero(size, 0)
                feeder.drain()
            for batch in batches:
                feeder.add(batch)
        return size

    def _feed_packed(self, batches: Iterable[Batch]) -> None:
        """Write all that changed, data through the filter that compresses.

        That takes whole clusters alone, and nodes that consist of them: meanwhile the image has a size that does.
        """
        shape = self._order.shape
        whole = up(shape.size, shape.cluster_size)
        if whole != shape.size:
            self._session.execute("block_resize", {"node-name": _IMAGE, "size": whole})
        self._add({"driver": "compress", "node-name": _PACKED, "file": _IMAGE})
        with self._feeder(_IMAGE) as plain, self._feeder(_PACKED) as packed:
            for batch in batches:
                for run, content in batch.pieces():
                    if run.kind is Kind.DATA:
                        packed.write(content, run.offset)
                    else:
                        plain.zero(run.length, run.offset)
        self._session.execute("blockdev-del", {"node-name": _PACKED})
        if whole != shape.size:
            self._session.execute("block_resize", {"node-name": _IMAGE, "size": shape.size})

    def _nodes(self) -> set[str]:
        return {each["node-name"] for each in self._session.execute("query-named-block-nodes", {"flat": True})}

    def _add(self, node: Json) -> None:
        self._session.execute("blockdev-add", node)

    # The file and the format in it

    def _create(self) -> Json:
        """Make an image without content; what it takes to open it."""
        order, options = self._order, self._order.options
        creation = CreationOptions(self._session.execute("query-qmp-schema"))
        creation.check_format(self._kind)
        given: dict[str, str | int | bool] = dict(options.image_options or {})
        opening: Json = {}
        if self._secret is not None:
            opening = self._put_in_secret(creation, given)
        chosen = creation.typed(self._kind, given)
        chosen |= {"driver": self._kind, "file": _FILE, "size": image_size(order.view.size)}
        if self._kind == "qcow2":
            chosen["cluster-size"] = order.shape.cluster_size
            if options.subclusters:
                chosen["extended-l2"] = True
            if options.compress is not None:
                chosen["compression-type"] = options.compress
        if order.backing_file is not None:
            try:
                order.backing_file.encode()
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"the engine qmp cannot record the name of the base, {os.fsencode(order.backing_file)!r}, which is no UTF-8: the "
                    "engines native and qemu-img can"
                ) from error
            chosen |= {"backing-file": order.backing_file, "backing-fmt": order.backing_format}
        if self._kind in STACKABLE:
            opening["backing"] = self._backing()
        self._make(chosen)
        return opening

    def _make(self, options: Json) -> None:
        for attempt in range(_TRIES):
            job = f"create-{attempt}"
            try:
                self._session.run_job(job, "blockdev-create", {"job-id": job, "options": options})
            except QmpError as error:
                if _BAD_CLOCK not in str(error) or attempt == _TRIES - 1:
                    raise
            else:
                return

    def _put_in_secret(self, creation: CreationOptions, given: dict[str, str | int | bool]) -> Json:
        """Have ``given`` ask for encryption with the secret; what it takes to open the image."""
        self._session.execute(
            "object-add", {"qom-type": "secret", "id": _SECRET, "data": self._secret, "format": "base64"}
        )
        if creation.has(self._kind, "key-secret"):
            given.setdefault("key-secret", _SECRET)
            return {"key-secret": _SECRET}
        if not creation.has(self._kind, "encrypt"):
            raise UsageError(f"images of the format {self._kind!r} are not encrypted: leave out the secret file")
        method = given.setdefault("encrypt.format", _LUKS)
        given.setdefault("encrypt.key-secret", _SECRET)
        return {"encrypt": {"format": method, "key-secret": _SECRET}}

    def _backing(self) -> str | None:
        """The name of a node that has the state before."""
        if self._before is None or self._order.options.compress is not None:
            return None  # or nothing is ever written to a cluster in part
        server = {"type": "unix", "path": self._before}
        self._add({"driver": "nbd", "node-name": _BEFORE, "server": server, "export": "", "read-only": True})
        return _BEFORE

    # Its content

    @contextmanager
    def _feeder(self, node: str) -> Iterator[Feeder]:
        """What writes to that node, through an export that is there for the length of the block."""
        self._session.execute(
            "block-export-add", {"type": "nbd", "id": node, "node-name": node, "name": node, "writable": True}
        )
        try:
            connection = self._listening.connect()
        except OSError as error:
            raise FeedError(f"cannot connect: {error.strerror}") from error
        with Feeder(connection, node) as feeder:
            yield feeder
            feeder.finish()
        with self._session.events("BLOCK_EXPORT_DELETED") as following:
            self._session.execute("block-export-del", {"id": node, "mode": "hard"})
            while following()["id"] != node:
                pass

    def _put_in_bitmap(self, name: str) -> None:
        """Put what is dirty into the image as a bitmap: a node that holds nothing is written to there, and notes it down."""
        view = self._order.view
        bits = {"granularity": granularity_for(view.size, view.block_size)}
        self._add({"driver": "null-co", "node-name": _DIRTY, "size": image_size(view.size), "read-zeroes": True})
        self._session.execute("block-dirty-bitmap-add", {"node": _DIRTY, "name": _DIRTY, **bits})
        with self._feeder(_DIRTY) as feeder:
            for extent in view.dirty_extents():
                feeder.zero(extent.length, extent.offset)
        self._session.execute("block-dirty-bitmap-add", {"node": _IMAGE, "name": name, "persistent": True, **bits})
        self._session.execute(
            "block-dirty-bitmap-merge",
            {"node": _IMAGE, "target": name, "bitmaps": [{"node": _DIRTY, "name": _DIRTY}]},
        )
        self._session.execute("blockdev-del", {"node-name": _DIRTY})
