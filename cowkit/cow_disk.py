"""CowDisk, the object that users hold: an engine disk, its servers and its differences."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Concatenate, Literal, ParamSpec, TypeVar

from cowkit.disk import Checkpoint, Disk, Extent
from cowkit.disk.disk import Buffer
from cowkit.disk.files import path_text
from cowkit.disk.sizes import format_size
from cowkit.errors import BaseChangedError, DiskClosedError, DiskError, UsageError
from cowkit.hosting.local import open_disk
from cowkit.hosting.options import DiskOptions, Round, checked

if TYPE_CHECKING:
    from socket import socket as Socket

    from cowkit.diff import Compression, DiffReport, ImageOptions
    from cowkit.diff.answers import ChangesReport
    from cowkit.diff.identity import Hash
    from cowkit.diff.options import EngineName
    from cowkit.disk.trace import TraceEvent
    from cowkit.hosting.disk import HostedDisk
    from cowkit.hosting.server import DiskServer
    from cowkit.server.server import NbdServer
    from cowkit.server.shares import Share
    from cowkit.server.tls import TlsChoice

Where = Literal["thread", "process"]
"""Where a disk and its servers are: in threads of this process, or in a process of their own."""

P = ParamSpec("P")
T = TypeVar("T")


def _where_the_disk_is(method: Callable[Concatenate[CowDisk, P], T]) -> Callable[Concatenate[CowDisk, P], T]:
    """Have the host carry out the method, with the same arguments, if the disk is there."""

    @functools.wraps(method)
    def there(self: CowDisk, /, *arguments: P.args, **options: P.kwargs) -> T:
        if self._hosted is None:
            return method(self, *arguments, **options)
        if not self._hosted.has_last:
            self._open()
        result: T = self._hosted.call_method(method.__name__, arguments, options)
        return result

    return there


class CowDisk:
    """A writable disk that may be wrecked: what is written to it is thrown away when it is closed.

    ::

        with CowDisk("disk.img") as disk:
            subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 1M", disk.uri], check=True)
            disk.pwrite(b"boo", 4096)
            disk.diff("diff.qcow2")

    Sizes are numbers of bytes or strings such as ``"64K"`` and ``"1G"`` (powers of 1024). Nothing is opened besides the
    base, and no thread started, before it is needed: an NBD server at the first use of :attr:`uri` or :attr:`socket`, an
    overlay file at the first write.

    :param base: a raw image file, a block device, a file compressed by xz, gzip, zstd or bzip2, an image that QEMU reads, or
        an NBD URI; opened read-only. Without one the disk is blank.
    :param size: the size of a blank disk; with a base, a size over the base's, beyond which the disk reads as zeroes.
    :param block_size: the unit of copy-on-write: a power of two from 512 bytes to 16 MiB; 4096 unless given.
    :param base_format: ``"raw"``, ``"xz"``, ``"gz"``, ``"zst"``, ``"bz2"``, or QEMU's name of an image format, such as
        ``"qcow2"``; unless given, the base's name and its first bytes must agree on one.
    :param offset: begin that many bytes into the base, or into its partition.
    :param partition: the partition of that number, from 1, instead of the whole base.
    :param round: what to do with a size that is no multiple of the block size: keep it (``"exact"``), or round ``"down"``
        or ``"up"`` to one.
    :param cow_on_read: copy into the overlay what is read from the base.
    :param cow_on_cache: copy into the overlay what a cache request names.
    :param tmpdir: where the overlay's files live: ``$TMPDIR`` or ``/var/tmp``, unless given.
    :param name: what to call the disk in lists and messages; the base's file name, unless given.
    :param server: where the disk and its servers are: in threads of this process (``"thread"``), or in a process that all the
        disks of this one share (``"process"``): then clients do not wait for a thread here that computes.
    :param overlay: an earlier difference to this base, from which the disk goes on; without a base, one that stands alone.
        What it holds becomes the disk's own and dirty, and the file is not needed any more. The disk has a checkpoint of that
        moment, ``"overlay"``, and as its size the difference's, unless a larger one is given. If it was written with
        ``hash="full"``, all of the base is read once, to see that it is the same.
    :param trace: how many of the last changes to take down for :attr:`trace`, at most 1,000,000; each takes 0.2 microseconds.
    :raises UsageError: an argument makes no sense.
    :raises BaseOpenError: the base cannot be opened.
    :raises OverlayError: ``tmpdir`` is no directory to write to.
    :raises ImageError: ``overlay`` is damaged, or no qcow2 image that cowkit reads.
    :raises WrongBaseError: ``overlay`` is a difference to another base, or the base has changed since.
    """

    _closed = True  # until there is something to close, also where Python refuses the arguments

    def __init__(
        self,
        base: str | os.PathLike[str] | None = None,
        *,
        size: int | str | None = None,
        block_size: int | str | None = None,
        base_format: str | None = None,
        offset: int | str = 0,
        partition: int | None = None,
        round: Round = "exact",
        cow_on_read: bool = False,
        cow_on_cache: bool = False,
        tmpdir: str | os.PathLike[str] | None = None,
        name: str | None = None,
        server: Where = "thread",
        overlay: str | os.PathLike[str] | None = None,
        trace: int = 0,
    ) -> None:
        if base is not None and not isinstance(base, str | os.PathLike):
            raise UsageError(f"a base is a path, an NBD URI, or None for a blank disk, not {base!r}")
        if server not in ("thread", "process"):
            raise UsageError(f"server is 'thread' or 'process', not {server!r}")
        options = checked(
            has_base=base is not None,
            size=size,
            block_size=block_size,
            base_format=base_format,
            offset=offset,
            partition=partition,
            round=round,
            cow_on_read=cow_on_read,
            cow_on_cache=cow_on_cache,
            tmpdir=tmpdir,
            overlay=overlay,
            trace=trace,
        )
        self._hosted: HostedDisk | None = None
        self._disk: Disk | HostedDisk
        self.base: str | None
        """The base as it was given; None for a blank disk."""
        self.name: str
        """What to call the disk in lists and messages."""
        if server == "process":
            from cowkit.hosting.disk import HostedDisk

            self._disk = self._hosted = HostedDisk(base, options, name)
            self.base, self.name = self._hosted.given, self._hosted.name
        else:
            self._disk = open_disk(base, options)
            source = self._disk.base
            self.base = source.given
            self.name = name or (os.path.basename(source.path) if source.path else source.given or "blank")
        self.opened_as: DiskOptions = options
        """The options with their defaults; sizes are in bytes."""
        self._servers: list[NbdServer] = []
        self._own_server: NbdServer | None = None
        self._starting = threading.Lock()
        self._closed = False

    @property
    def engine(self) -> Disk:
        """The disk without its servers.

        :raises UsageError: it is in another process.
        """
        if not isinstance(self._disk, Disk):
            raise UsageError(
                f"the engine of the disk {self.name!r} is in its host (server='process'): use the disk itself"
            )
        return self._disk

    def __enter__(self) -> CowDisk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BaseChangedError as changed:
            if error is None:
                raise
            # The block's own error is the news; that the base changed may explain it.
            error.add_note(str(changed))

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(
                f"{self!r} was not closed: use `with`, or call close()", ResourceWarning, source=self, stacklevel=2
            )
            self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return (
            f"<CowDisk {self.name!r}, {format_size(self._disk.size)}{state}>" if hasattr(self, "_disk") else "<CowDisk>"
        )

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self._disk.size

    @property
    def block_size(self) -> int:
        """The unit of copy-on-write in bytes."""
        return self._disk.block_size

    @property
    def closed(self) -> bool:
        """Whether the disk is closed."""
        return self._closed

    # In process; libnbd's names and order of arguments

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on.

        :raises OutOfBoundsError: the range is not within the disk.
        """
        return self._disk.pread(length, offset)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write ``data`` at ``offset``.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: no room; the old bytes stand.
        """
        self._disk.pwrite(data, offset)

    def zero(self, length: int, offset: int) -> None:
        """Make the range read as zeroes.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: no room for a block that is zeroed in part; nothing has changed.
        """
        self._disk.zero(length, offset)

    def trim(self, length: int, offset: int) -> None:
        """Give up the range: it reads as zeroes, and whole blocks of it take no space any more.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: no room for a block that is trimmed in part; nothing has changed.
        """
        self._disk.trim(length, offset)

    def cache(self, length: int, offset: int) -> None:
        """Have the range at hand: copied into the overlay with ``cow_on_cache``, otherwise read ahead.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: with ``cow_on_cache``: no room for the copy.
        """
        self._disk.cache(length, offset)

    def flush(self) -> None:
        """Nothing is left to do: what was acknowledged is in the overlay."""
        self._disk.flush()

    # Points in time

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints, oldest first."""
        return self._disk.checkpoints

    def checkpoint(self, name: str | None = None) -> Checkpoint:
        """Freeze this moment, so that the disk can be rolled back to it.

        :param name: ``checkpoint-1`` and so on, unless given.
        :raises CheckpointError: a checkpoint of that name exists.
        """
        return self._disk.checkpoint(name)

    def rollback(self, point: Checkpoint | str) -> None:
        """Be as at ``point``, which stays; later checkpoints are gone. Clients stay connected.

        :raises CheckpointError: the disk has no such checkpoint, or was rolled back past it.
        """
        self._disk.rollback(point)

    def reset(self) -> None:
        """Be as the base is, without ``overlay``; all checkpoints are gone. Clients stay connected."""
        self._disk.reset()

    # What changed

    @property
    def dirty_bytes(self) -> int:
        """How many bytes were written or zeroed, in whole blocks."""
        return self._disk.dirty_bytes

    def dirty_extents(
        self, offset: int = 0, length: int | None = None, *, since: Checkpoint | str | None = None
    ) -> Iterator[Extent]:
        """The runs that were written (``DATA``) or zeroed (``ZERO``), in order, in whole blocks.

        :param since: only what was written or zeroed since that checkpoint.
        """
        return self._disk.dirty_extents(offset, length, since=since)

    @_where_the_disk_is
    def diff(
        self,
        path: str | os.PathLike[str],
        *,
        since: Checkpoint | str | None = None,
        at: Checkpoint | str | None = None,
        backing_file: str | None = None,
        backing_format: str | None = None,
        cluster_size: int | str | None = None,
        subclusters: bool = False,
        compress: Compression | None = None,
        bitmap: str | None = None,
        standalone: bool = False,
        raw: bool = False,
        hash: Hash | None = None,
        engine: EngineName | None = None,
        format: str | None = None,
        image_options: Mapping[str, str | int | bool] | None = None,
        secret_file: str | os.PathLike[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        changes: bool = False,
        files: bool = False,
    ) -> DiffReport:
        """Keep what changed: a qcow2 image at ``path`` with the base as its backing file, as of this moment.

        Clients go on reading and writing meanwhile. A file that is there already is replaced when the new one is complete.

        :param since: only what changed since that checkpoint: an increment, whose backing file is what was kept of the
            checkpoint; ``backing_file`` names that.
        :param at: what was there at that checkpoint instead of now.
        :param backing_file: the name of the base to record; unless given, the base's path: relative to ``path``'s directory
            if the base was given as a relative path. A file that is there already must hold what the image is to stand on.
        :param backing_format: the base's format to record, as QEMU names it; unless given, what it was opened as; with ``since``,
            what the file of that name is, ``"qcow2"`` while there is none.
        :param cluster_size: of the image: a power of two from 4096 bytes to 2 MiB; 64 KiB unless given.
        :param subclusters: divide clusters by 32 (extended L2 entries, QEMU 5.2 and later), so that a small change costs little.
        :param compress: compress each cluster, by ``"zlib"`` or by ``"zstd"`` (QEMU 5.1 and later).
        :param bitmap: put in what is dirty as a persistent bitmap of that name.
        :param standalone: have all of the disk in the image, and no backing file.
        :param raw: write a sparse raw file with all of the disk instead.
        :param hash: what of the base the image records, so that another one is not taken for it: its size and a digest of some
            blocks (``"sampled"``, unless given), or of all its bytes as well (``"full"``), which reads the whole base.
        :param engine: who writes the image: cowkit itself (``"native"``), qemu-img by create and rebase (``"qemu-img"``), or
            a QEMU storage daemon (``"qmp"``); cowkit, unless given or only QEMU can.
        :param format: the image's format as QEMU names it, such as ``"vmdk"``; ``"qcow2"`` unless given. ``"rbd"`` is what Ceph's
            ``rbd import-diff`` reads, with the checkpoints as its snapshots. Formats without
            backing files have all of the disk.
        :param image_options: QEMU's own options for making an image of that format, such as ``{"encrypt.format": "luks"}``.
        :param secret_file: the file whose content, to its last byte, is the passphrase of an image that is encrypted.
        :param progress: called now and then with the number of bytes dealt with and of those there are.
        :param changes: have the report tell what :meth:`changes` does of the same moment, as its ``changes``.
        :param files: the same, with the files that changed.
        :raises UsageError: the options do not go together, or the base cannot be a backing file (it is compressed, or a part
            of a file), and no other is named.
        :raises CheckpointError: the disk has no such checkpoint, or ``since`` is later than ``at``.
        :raises OutputError: the image cannot be written; an old file at ``path`` is as it was.
        :raises BaseChangedError: the base is not what it was when the disk was opened.
        :raises MissingToolError: the engine needs a program that is not installed.
        """
        from cowkit.diff import ImageOptions
        from cowkit.keeping.live import States, keep

        if self.engine.last is None or since is not None or at is not None:  # checkpoints go with the disk
            self._open()
        return keep(
            self.engine,
            path,
            options=ImageOptions(
                cluster_size,
                subclusters,
                compress,
                bitmap,
                standalone,
                raw,
                hash,
                engine,
                format,
                image_options,
                None if secret_file is None else path_text(secret_file, "secret_file"),
            ),
            states=States(since, at),
            backing_file=backing_file,
            backing_format=backing_format,
            progress=progress,
            changes=changes,
            files=files,
        )

    @_where_the_disk_is
    def changes(
        self,
        *,
        since: Checkpoint | str | None = None,
        at: Checkpoint | str | None = None,
        files: bool = False,
        image: ImageOptions | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ChangesReport:
        """What changed, as of this moment, without writing anything: how much, where, in which partitions and files.

        :param since: only what changed since that checkpoint.
        :param at: what was there at that checkpoint instead of now.
        :param files: look which files changed: inside ext2, ext3 and ext4 by debugfs, inside others by guestfish.
        :param image: tell how large an image of that kind would be: ``ImageOptions()`` is what :meth:`diff` writes.
        :param progress: called now and then with the number of bytes dealt with and of those there are.
        :raises UsageError: ``image`` makes no sense, or the disk is too large for it.
        :raises CheckpointError: the disk has no such checkpoint, or ``since`` is later than ``at``.
        :raises BaseChangedError: the base is not what it was when the disk was opened.
        """
        from cowkit.keeping.answers import changes
        from cowkit.keeping.live import States

        self._open()
        return changes(self.engine, states=States(since, at), files=files, image=image, progress=progress)

    @_where_the_disk_is
    def check_diff(
        self,
        path: str | os.PathLike[str],
        *,
        backing_file: str | None = None,
        backing_format: str | None = None,
        image: ImageOptions | None = None,
    ) -> None:
        """Look whether :meth:`diff` could write there, before there is anything to lose.

        :param image: the kind of image; ``ImageOptions()`` is what :meth:`diff` writes unless told otherwise.
        :raises CowkitError: what :meth:`diff` would raise.
        """
        from cowkit.diff import ImageOptions
        from cowkit.keeping.live import check

        self._open()
        check(
            self.engine,
            path,
            options=image or ImageOptions(),
            backing_file=backing_file,
            backing_format=backing_format,
        )

    # Serving

    @property
    def uri(self) -> str:
        """The NBD URI for clients; starts a server on a private Unix socket at its first use."""
        return self._server().uri if self._hosted is None else self._hosted.own_server[0]

    @property
    def socket(self) -> str:
        """The path of the Unix socket for clients; starts a server at its first use."""
        if self._hosted is not None:
            return self._hosted.own_server[1]
        path = self._server().socket
        assert path is not None  # the own server is never a TCP one
        return path

    def serve(
        self,
        *,
        socket: str | os.PathLike[str] | None = None,
        tcp: str | None = None,
        vsock: int | None = None,
        listeners: Sequence[Socket] = (),
        export_name: str = "",
        description: str = "",
        read_only: bool = False,
        share: Share = "all",
        max_exports: int | None = None,
        tls_certs: str | os.PathLike[str] | None = None,
        tls_psk: str | os.PathLike[str] | None = None,
        tls_verify_peer: bool = False,
        tls: TlsChoice | None = None,
        on_idle: Callable[[], None] | None = None,
        start: bool = True,
    ) -> DiskServer:
        """Start one more server of this disk; it ends with the disk, or by its ``stop()``.

        It listens wherever it is told to, in several places if need be; in a private directory if it is told of none.

        :param socket: the path of a Unix socket.
        :param tcp: listen on ``HOST:PORT``, on the loopback address without a host; port 0 takes any free one.
        :param vsock: listen on that vsock port; 0 takes any free one.
        :param listeners: listen on these sockets, which the server closes in the end.
        :param export_name: what clients may ask for; whoever asks for none gets this export.
        :param description: for people.
        :param read_only: refuse what would change the disk.
        :param share: who shares a disk: ``"all"`` clients have this one. With ``"export"`` there is one for each export name
            that a client asks for, kept until the server ends; with ``"connection"`` each connection has its own, gone when it
            leaves. Such a disk begins as the base is, and this one does not see what is written there.
        :param max_exports: with ``"export"``: how many there may be; 64, unless given.
        :param tls_certs: do TLS, with the certificates in this directory: ``server-cert.pem`` and ``server-key.pem``, and for
            ``tls_verify_peer`` ``ca-cert.pem`` and perhaps ``ca-crl.pem``, as QEMU and nbdkit have them.
        :param tls_psk: do TLS, with the pre-shared keys in this file, lines of ``NAME:HEX``; needs Python 3.13.
        :param tls_verify_peer: turn away clients without a certificate of the authority's.
        :param tls: whether clients may (``"on"``) or must (``"require"``) use TLS; they must, unless given.
        :param on_idle: called, from a thread of the server's, when the last client has left, and one of them had chosen an
            export. It must not stop the server itself.
        :param start: False: those who connect wait until the server's ``start()`` is called.
        :raises ListenError: no socket can be had there.
        :raises UsageError: an argument makes no sense, or a file that TLS needs is missing or no good.
        """
        if self._hosted is not None:
            self._open()
            return self._hosted.serve(
                socket=socket,
                tcp=tcp,
                vsock=vsock,
                listeners=listeners,
                export_name=export_name,
                description=description,
                read_only=read_only,
                share=share,
                max_exports=max_exports,
                tls_certs=tls_certs,
                tls_psk=tls_psk,
                tls_verify_peer=tls_verify_peer,
                tls=tls,
                on_idle=on_idle,
                start=start,
            )
        from cowkit.server.server import NbdServer

        credentials = None
        if tls_certs is not None or tls_psk is not None or tls_verify_peer or tls is not None:
            from cowkit.server.tls import load_tls

            credentials = load_tls(certs=tls_certs, psk=tls_psk, verify_peer=tls_verify_peer, choice=tls)
        with self._starting:
            self._open()
            server = NbdServer(
                self.engine,
                socket_path=socket,
                tcp=tcp,
                vsock=vsock,
                listeners=listeners,
                export_name=export_name,
                description=description,
                read_only=read_only,
                tls=credentials,
                share=share,
                max_exports=max_exports,
                on_idle=on_idle,
                start=start,
            )
            self._servers.append(server)
        return server

    def _server(self) -> NbdServer:
        if self._own_server is None or self._closed:
            with self._starting:
                self._open()
                if self._own_server is None:
                    from cowkit.server.server import NbdServer

                    self._own_server = NbdServer(self.engine)
                    self._servers.append(self._own_server)
        return self._own_server

    @property
    def server_errors(self) -> list[BaseException]:
        """What went wrong in the servers' threads without being any client's fault; empty unless there is a bug."""
        if self._hosted is not None:
            return self._hosted.server_errors
        return [error for server in self._servers for error in server.errors]

    @property
    def overlay_failure(self) -> DiskError | None:
        """Why the last request failed that found no room or a broken overlay; clients are told but a number. None: none did."""
        return self.engine.overlay.failure if self._hosted is None else self._hosted.overlay_failure

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        if self._hosted is not None:
            return self._hosted.connections
        return sum(server.connections for server in self._servers)

    def disconnect(self) -> None:
        """End the connections of all clients; requests under way are finished, but not answered. New ones may connect."""
        self._open()
        if self._hosted is not None:
            self._hosted.call("disconnect")
        for server in list(self._servers):
            server.disconnect()

    def _open(self) -> None:
        if self._closed:
            raise DiskClosedError(f"the disk {self.name!r} is closed")

    def close(self) -> None:
        """End the servers, throw away what was written and let go of the base; may be called again.

        :raises BaseChangedError: the base is not what it was at opening. The disk is closed all the same.
        """
        if self._disk.foreign:  # no lock is taken in a forked child: a thread that it does not have may have held it
            self._closed = True
        else:
            with self._starting:
                if self._closed:
                    return
                self._closed = True
            if self._hosted is None and not (self.engine.keeps_last and self._is_idle):
                # Or a client's read that waits for a base which never answers would hold all this up.
                self.engine.base.interrupt()
        for server in self._servers:
            server.stop()
        self._disk.close()

    @property
    def trace(self) -> list[TraceEvent]:
        """The last writes, zeroings, flushes, checkpoints, rollbacks and resets, by whomever, oldest first.

        Empty for a disk that was made without ``trace=``. They are there as well when the disk is closed, in a process of its own
        only if it keeps its last state.
        """
        if self._hosted is not None:
            return self._hosted.trace
        return [] if self.engine.trace is None else self.engine.trace.events()

    # What is left of a closed disk

    @property
    def _is_idle(self) -> bool:
        """Whether nobody can be waiting for the base."""
        return not self.connections and not self.engine.gate.busy

    def keep_last_state(self) -> None:
        """Have :meth:`diff` (without checkpoints) work once the disk is closed, too, until :meth:`forget_last_state`.

        Closing costs a few microseconds more. What was written keeps its space meanwhile, and the base stays open, except for
        one behind a server that somebody waits for just then.
        """
        self._disk.keeps_last = True

    @property
    def last_dirty_bytes(self) -> int:
        """How many bytes were dirty when the disk was closed, if it keeps its last state; 0 otherwise."""
        if self._hosted is not None:
            return self._hosted.last_dirty_bytes
        return 0 if self.engine.last is None else self.engine.last.dirty_bytes

    def forget_last_state(self) -> None:
        """Let go of what is left of a closed disk; may be called again."""
        if self._hosted is not None:
            self._hosted.forget_last()
        elif self.engine.last is not None:
            last, self.engine.last = self.engine.last, None
            last.release()
