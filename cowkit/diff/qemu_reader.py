"""A difference as QEMU reads it: the second opinion of `cowkit verify`.

QEMU is told the whole chain, each image with its format and place, so that it looks for nothing and guesses nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from cowkit.bases.chain import Chain
from cowkit.bases.nbd_client import NbdClient, import_nbd
from cowkit.bases.qemu_nbd import QEMU_UTILS, QemuNbd, find_program
from cowkit.diff.chain import DiffChain
from cowkit.disk import Base, FileBase
from cowkit.disk.extent import Extent, Kind, merged
from cowkit.errors import BaseOpenError, ImageError, ToolFailedError, UsageError


class QemuReader:
    """``chain``, which stands on its base, as QEMU has it; a context manager.

    :raises MissingToolError: qemu-img, qemu-nbd, setpriv or libnbd's Python binding is not installed.
    :raises ImageError: QEMU cannot open it.
    :raises UsageError: QEMU cannot read such a base.
    """

    def __init__(self, chain: DiffChain) -> None:
        self._path = chain.path
        import_nbd(f"having QEMU read {chain.path}")
        self._images = len(chain.images)
        self._stand_in = _stand_in(chain.base)
        try:
            self._options = ",".join(_options(chain, self._stand_in))
            self._server = QemuNbd(chain.path, ["--image-opts", self._options], 1)
        except BaseException:
            self._close_stand_in()
            raise
        try:
            self._client = NbdClient(
                chain.path, lambda handle: handle.aio_connect_socket(self._server.sockets.pop().detach())
            )
        except BaseOpenError as error:
            words = self._server.last_words() or str(error)
            self._server.stop()
            self._close_stand_in()
            raise ImageError(f"QEMU cannot open {chain.path}: {words}") from error
        except BaseException:
            self._server.stop()
            self._close_stand_in()
            raise
        self.size = self._client.size
        """The virtual size in bytes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the program."""
        self._client.close()
        self._server.stop()
        self._close_stand_in()

    def _close_stand_in(self) -> None:
        if self._stand_in is not None:
            os.close(self._stand_in)
            self._stand_in = None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on.

        :raises BaseError: QEMU cannot read it there.
        """
        self._client.read_into(buffer, offset)

    def held(self) -> Iterator[Extent]:
        """What the images themselves hold, as QEMU tells it: ``DATA`` or ``ZERO``, and nothing about the rest.

        :raises ToolFailedError: it does not.
        """
        command = [
            find_program("qemu-img", f"having QEMU read {self._path}", QEMU_UTILS),
            *("map", "--output=json", "--image-opts", self._options),
        ]
        ran = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
        if ran.returncode:
            raise ToolFailedError(command, ran.returncode, ran.stderr.decode(errors="replace"))
        told: list[dict[str, Any]] = json.loads(ran.stdout)
        return merged(
            Extent(each["start"], each["length"], Kind.ZERO if each["zero"] else Kind.DATA)
            for each in told
            if each["depth"] < self._images and each.get("present", True)
        )


def _stand_in(base: Base | None) -> int | None:
    """A file of zeroes for a base that QEMU cannot open: only what the images hold is compared, and of the base nothing is."""
    if base is None or base.backing_refusal is None:
        return None
    fd = os.memfd_create("cowkit-verify")
    os.ftruncate(fd, base.size)
    return fd


def _options(chain: DiffChain, stand_in: int | None) -> Iterator[str]:
    """QEMU's options for the whole chain; the descriptor is of a file to be read in the base's place."""
    prefix = ""
    for image in chain.images:
        yield f"{prefix}driver=qcow2"
        yield f"{prefix}file.driver=file"
        yield f"{prefix}file.filename={_escaped(os.path.abspath(image.path))}"
        prefix += "backing."
    if stand_in is not None:
        yield f"{prefix}driver=raw"
        yield f"{prefix}file.driver=file"
        yield f"{prefix}file.filename=/proc/{os.getpid()}/fd/{stand_in}"
    elif chain.base is not None:
        for option in _base_options(chain.base, chain.images[-1].backing_file):
            yield f"{prefix}{option}"


def _base_options(base: Base, name: str | None) -> Iterator[str]:
    assert base.given is not None
    if base.path is None:
        yield "driver=raw"  # of what the image names: that it could be elsewhere, qemu-nbd has no options for
        if name != base.given:
            raise UsageError(
                f"QEMU reads {base.given} only where the difference names it, and that is {name}: record the other one in it (qemu-img "
                f"rebase -u -F raw -b {base.given})"
            )
    elif base.backing_format == "raw":
        yield "driver=raw"
        assert isinstance(base, FileBase)
        yield f"file.driver={'file' if os.path.isfile(base.path) else 'host_device'}"
        yield f"file.filename={_escaped(base.path)}"
    else:
        file = FileBase(base.path)
        try:
            files = Chain(file, base.backing_format)
            files.release()
            yield from files.options
        finally:
            file.release()


def _escaped(value: str) -> str:
    """A value in QEMU's ``key=value,...``: a comma is written twice."""
    return value.replace(",", ",,")
