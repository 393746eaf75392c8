"""An image of another format than raw as a base: read by a qemu-nbd of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cowkit.bases.chain import Chain, Layer
from cowkit.bases.nbd_base import ClientBase
from cowkit.bases.nbd_client import ALLOCATION_DEPTH, DIRTY_BITMAP, MOST_CONNECTIONS, NbdClient, import_nbd
from cowkit.bases.qemu_nbd import QemuNbd
from cowkit.disk.base import FileBase
from cowkit.errors import BaseError, BaseOpenError


class ImageBase(ClientBase):
    """The disk in the image ``file``, with its backing files, if it names some.

    :param file: the image file; the base holds it and lets go of it when it is closed, if it could be opened.
    :param format: QEMU's name of the format.
    :param contexts: ``qemu:allocation-depth`` or ``qemu:dirty-bitmap:NAME``, of a bitmap in the image, to be told of.
    :raises BaseOpenError: QEMU cannot open it, a backing file is missing, or a backing file's format is in doubt.
    :raises MissingToolError: qemu-img, qemu-nbd, setpriv or libnbd's Python binding is not installed.
    """

    def __init__(self, file: FileBase, format: str, contexts: Sequence[str] = ()) -> None:
        import_nbd(f"opening the image {file.given}")
        self._chain = Chain(file, format)
        try:
            options = ",".join(self._chain.options)
            exported = [_exporting(context) for context in contexts]
            self._server = QemuNbd(file.given, [*exported, "--image-opts", options], MOST_CONNECTIONS)
            try:
                super().__init__(self._connected(file.given, contexts))
            except BaseException:
                self._server.stop()
                raise
        except BaseException:
            self._chain.release()
            raise
        self._file = file
        self.given = file.given
        self.path = file.path
        self.identity = file.identity
        self.backing_format = format

    @property
    def layers(self) -> list[Layer]:
        """The image and the files behind it, from the top down, as far as they are local files."""
        return self._chain.layers

    @property
    def files(self) -> list[str]:
        """The paths of all local files that are read: the image, those behind it, and those of their data."""
        return [file.path for file in (self._file, *self._chain.files)]

    def _connected(self, given: str, contexts: Sequence[str]) -> NbdClient:
        def connect(handle: Any) -> None:
            handle.aio_connect_socket(self._server.sockets.pop().detach())

        try:
            client = NbdClient(given, connect, eager=True, contexts=contexts)
        except BaseOpenError as error:
            raise BaseOpenError(f"cannot open base {given}: {self._server.last_words() or error}") from error
        for spare in self._server.sockets:
            spare.close()
        return client

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on.

        :raises BaseChangedError: the image was written to meanwhile, and that was the end of it.
        :raises BaseError: the image is damaged, or its qemu-nbd has gone.
        """
        try:
            super().read_into(buffer, offset)
        except BaseError:
            self.verify()
            raise

    def verify(self) -> None:
        """See :meth:`cowkit.disk.base.FileBase.verify`: the image and each local file behind it are compared.

        :raises BaseChangedError: one of them is not what it was.
        """
        for file in (self._file, *self._chain.files):
            file.verify()

    def verify_path(self) -> None:
        """See :meth:`cowkit.disk.base.FileBase.verify_path`, for the image and each local file behind it.

        :raises BaseChangedError: one of them is not what it was.
        """
        for file in (self._file, *self._chain.files):
            file.verify_path()

    def interrupt(self) -> None:
        """End qemu-nbd, and with it the reads that wait for it: it may be stopped, and would never answer."""
        self._server.kill()

    def _close(self) -> None:
        super()._close()
        self._server.stop()
        self._chain.release()
        self._file.release()


def _exporting(context: str) -> str:
    """The option of qemu-nbd that has it offer ``context``."""
    if context == ALLOCATION_DEPTH:
        return "--allocation-depth"
    assert context.startswith(DIRTY_BITMAP)
    return f"--bitmap={context.removeprefix(DIRTY_BITMAP)}"
