"""Reads a difference back by two readers that know nothing of each other, and compares: `cowkit verify`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal, NamedTuple

from cowkit.bases import open_base
from cowkit.diff.bottom import open_bottom
from cowkit.diff.chain import DiffChain
from cowkit.diff.comparing import differing, padded, ranges
from cowkit.diff.identity import Progress
from cowkit.diff.qcow2.layout import image_size
from cowkit.diff.qemu_reader import QemuReader
from cowkit.disk.extent import Kind
from cowkit.disk.sizes import format_size
from cowkit.errors import BaseError

SCHEMA = 1
"""The version of what :meth:`Verification.to_json` returns; new keys do not change it."""

Against = Literal["qemu", "against"]


class Disagreement(NamedTuple):
    """Bytes that cowkit's reader has otherwise than another one: QEMU (``"qemu"``), or what it was compared with."""

    offset: int
    length: int
    reader: Against


class Verification(NamedTuple):
    """What came of it. All amounts are in bytes."""

    path: str
    base: str | None
    """The base that it was read on; None for an image that stands alone."""
    recognised: bool
    """Whether the base is known by the identity that the difference records, or none is needed."""
    whole_base: bool
    """Whether all of the base was compared with its digest."""
    images: tuple[str, ...]
    """The images that were read, from the difference downwards."""
    size: int
    compared_bytes: int
    """What the images hold, which both readers have read."""
    against: str | None
    against_bytes: int
    """What was compared with that: all but what is a hole, or zeroed, in both."""
    disagreements: tuple[Disagreement, ...]
    seconds: float

    def to_json(self) -> dict[str, object]:
        """The same as JSON has it; ``schema`` is the version of its form."""
        return {
            "schema": SCHEMA,
            "path": self.path,
            "base": self.base,
            "recognised": self.recognised,
            "whole_base": self.whole_base,
            "images": list(self.images),
            "size": self.size,
            "compared_bytes": self.compared_bytes,
            "against": self.against,
            "against_bytes": self.against_bytes,
            "same": not self.disagreements,
            "differences": [each._asdict() for each in self.disagreements],
            "seconds": round(self.seconds, 6),
        }

    def summary(self) -> str:
        """A few lines for people: one for each extent that differs, and one in the end."""
        lines = [
            f"{_differ(each.length, each.offset)} otherwise than "
            f"{'QEMU' if each.reader == 'qemu' else self.against} does"
            for each in self.disagreements
        ]
        on = f" on {self.base}" if self.base is not None else ""
        counted = len(self.disagreements)
        found = f"{counted} difference{'' if counted == 1 else 's'}" if counted else "the same to both readers"
        more = ""
        if self.against is not None:
            other = any(each.reader == "against" for each in self.disagreements)
            more = f", {format_size(self.against_bytes)} {'compared with' if other else 'the same as'} {self.against}"
        lines.append(f"{self.path}{on}: {format_size(self.compared_bytes)} held, {found}{more}")
        return "\n".join(lines)


def verify_diff(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    base_format: str | None = None,
    against: str | os.PathLike[str] | None = None,
    against_format: str | None = None,
    full: bool | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Read the difference at ``path`` and all that it stands on with cowkit's strict reader and with QEMU, and compare.

    Headers, tables and refcounts are checked first. What is compared is what either reader says the images hold.

    :param base: where the base is; where the difference says, unless given.
    :param base_format: its format, as :func:`cowkit.bases.open_base` has it.
    :param against: an image, or an NBD URI such as a live disk's, that all of the disk is to be the same as.
    :param against_format: its format.
    :param full: compare the whole base with the digest in the difference, which was written with ``hash="full"``; None: where
        there is one; False: compare the sampled blocks alone.
    :param progress: called now and then with the bytes that are done and those there are.
    :raises ImageError: an image is damaged, or uses a feature that cowkit does not read.
    :raises WrongBaseError: the base is not the one that it was made of.
    :raises BaseOpenError: the base, or what to compare with, cannot be opened.
    :raises MissingToolError: QEMU is not installed.
    """
    begun = time.perf_counter()
    with ExitStack() as stack:
        chain, bottom = open_bottom(path, base, base_format, stack)
        chain.stand_on(bottom, full=full, progress=progress)
        for image in chain.images:
            if image is chain.images[0] or image.identity is not None:
                image.check()
        qemu = stack.enter_context(QemuReader(chain))
        held = list(ranges(chain.held(), qemu.held()))
        other = None
        where: list[tuple[int, int]] = []
        if against is not None:
            other = open_base(against, format=against_format)
            stack.callback(other.release)
            size, other_size = _comparable(chain, other.size)
            least = min(size, other_size)
            known = other.extents(0, other.size) if other.size else iter(())
            where = [(a, min(b, least)) for a, b in ranges(chain.extents(), known, kinds=(Kind.DATA,)) if a < least]
        meter = _Meter(progress, sum(b - a for a, b in held) + sum(b - a for a, b in where))
        found = [
            Disagreement(offset, length, "qemu")
            for offset, length in differing(_held(chain), _said(qemu, "QEMU"), held, meter)
        ]
        if qemu.size != chain.size:
            found.append(_sizes(qemu.size, chain.size, "qemu"))
        if other is not None:
            pread = padded(other.read_into, other.size)
            found += [Disagreement(at, n, "against") for at, n in differing(_held(chain), pread, where, meter)]
            if other_size != size:
                found.append(_sizes(other_size, size, "against"))
            other.verify()
        if bottom is not None:
            bottom.verify()
        return Verification(
            path=os.fspath(path),
            base=bottom.given if bottom is not None else None,
            recognised=chain.recognised == "identity",
            whole_base=chain.whole_base,
            images=tuple(image.path for image in chain.images),
            size=chain.disk_size,
            compared_bytes=sum(b - a for a, b in held),
            against=None if against is None else os.fspath(against),
            against_bytes=sum(b - a for a, b in where),
            disagreements=tuple(found),
            seconds=time.perf_counter() - begun,
        )


def _comparable(chain: DiffChain, other: int) -> tuple[int, int]:
    """The sizes of the disk and of what it is compared with, which has ``other`` bytes: in sectors, where one has no more."""
    if chain.exact_size is None or other == chain.size:
        return chain.size, image_size(other)
    return chain.exact_size, other


def _differ(count: int, offset: int) -> str:
    if count == 1:
        return f"1 byte at {offset} differs: cowkit reads it"
    return f"{count} bytes at {offset} differ: cowkit reads them"


def _sizes(one: int, other: int, reader: Against) -> Disagreement:
    """What only the larger one of two disks has."""
    return Disagreement(min(one, other), abs(one - other), reader)


def _held(chain: DiffChain) -> Callable[[int, int], bytes]:
    def pread(length: int, offset: int) -> bytes:
        inside = max(0, min(length, chain.size - offset))
        return (chain.pread(inside, offset) if inside else b"").ljust(length, b"\0")

    return pread


def _said(reader: QemuReader, who: str) -> Callable[[int, int], bytes]:
    """What QEMU reads; what it cannot read is what it does not have as cowkit has it, which is an error of the image."""
    read = padded(reader.read_into, reader.size)

    def pread(length: int, offset: int) -> bytes:
        try:
            return read(length, offset)
        except BaseError as error:
            raise type(error)(str(error).replace("read base", f"have {who} read", 1)) from error

    return pread


class _Meter:
    """Tells of the progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, length: int) -> None:
        self._done += length
        if self._progress is not None:
            self._progress(self._done, self._total)
