"""CowDisk, the object that users hold: a disk, what of it is served, and what of it is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cowkit.disk import Checkpoint
from cowkit.disk.arguments import check_text
from cowkit.errors import UsageError
from cowkit.hosting.handle import DiskHandle, Where, where_the_disk_is
from cowkit.hosting.options import Round, checked

if TYPE_CHECKING:
    from socket import socket as Socket
    from typing import Unpack

    from cowkit.diff import DiffReport, ImageChoice, ImageOptions
    from cowkit.diff.answers import ChangesReport
    from cowkit.hosting.server import DiskServer
    from cowkit.server.shares import Share
    from cowkit.server.tls import TlsChoice

__all__ = ["CowDisk", "Where"]


class CowDisk(DiskHandle):
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
        if name is not None:
            check_text(name, "name")
        super().__init__(base, options, name, server)

    # What changed

    @where_the_disk_is
    def diff(
        self,
        path: str | os.PathLike[str],
        *,
        since: Checkpoint | str | None = None,
        at: Checkpoint | str | None = None,
        backing_file: str | os.PathLike[str] | None = None,
        backing_format: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        changes: bool = False,
        files: bool = False,
        **image: Unpack[ImageChoice],
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
        :param progress: called now and then with the number of bytes dealt with and of those there are.
        :param changes: have the report tell what :meth:`changes` does of the same moment, as its ``changes``.
        :param files: the same, with the files that changed.
        :param image: what kind of image, by ``cluster_size``, ``subclusters``, ``compress``, ``bitmap``, ``standalone``, ``raw``,
            ``hash``, ``engine``, ``format``, ``image_options`` and ``secret_file``: see :class:`cowkit.diff.ImageOptions`.
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
            options=ImageOptions.chosen(image),
            states=States(since, at),
            backing_file=backing_file,
            backing_format=backing_format,
            progress=progress,
            changes=changes,
            files=files,
        )

    @where_the_disk_is
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

    @where_the_disk_is
    def check_diff(
        self,
        path: str | os.PathLike[str],
        *,
        backing_file: str | os.PathLike[str] | None = None,
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
            options=ImageOptions() if image is None else image,
            backing_file=backing_file,
            backing_format=backing_format,
        )

    @where_the_disk_is
    def _lay_over(self, path: str | os.PathLike[str]) -> None:
        """Write what a difference of a disk of this base and size holds, for the fixtures."""
        from cowkit.diff.overlay import lay_over

        self._open()
        lay_over(self.engine, path)

    # Serving

    @property
    def uri(self) -> str:
        """The NBD URI for clients; starts a server on a private Unix socket at its first use."""
        return self._own_server()[0]

    @property
    def socket(self) -> str:
        """The path of the Unix socket for clients; starts a server at its first use."""
        return self._own_server()[1]

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
        return self._serve(
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
