"""A difference merged into a copy of its base: `cowkit apply --to`."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import ExitStack

from cowkit.diff.applying.report import ApplyReport
from cowkit.diff.bottom import open_bottom
from cowkit.diff.identity import Progress
from cowkit.diff.output import AtomicOutput
from cowkit.diff.qcow2.header import backing_chain
from cowkit.disk import Base, Extent, FileBase, Kind
from cowkit.disk.punch import punch_hole
from cowkit.disk.source import ZEROES
from cowkit.errors import OutputError

_PIECE = 1 << 20
_CLONE = 0x40049409
"""FICLONE of ioctl_ficlone(2): the whole file shares the other one's space, where the file system can."""
_TRY_OTHERWISE = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EBADF)
"""What copy_file_range(2) says where it cannot be had."""


def apply_to(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    base_format: str | None = None,
    full: bool | None = None,
    progress: Progress | None = None,
) -> ApplyReport:
    """Write all of the disk of the difference at ``path`` to a sparse raw file at ``target``, all at once or not at all.

    What the base has is cloned or copied by the system where both can; its holes stay holes.

    :param base: where the base is; where the difference says, unless given.
    :param base_format: its format, as :func:`cowkit.bases.open_base` has it.
    :param full: compare the whole base with the digest in the difference, which was written with ``hash="full"``; None: where
        there is one; False: compare the sampled blocks alone.
    :param progress: called now and then with the bytes that are done and those there are.
    :raises ImageError: the difference is damaged.
    :raises WrongBaseError: the base is not the one that it was made of.
    :raises BaseOpenError: the base cannot be opened.
    :raises OutputError: the file cannot be written; an old one is as it was.
    """
    begun = time.perf_counter()
    with ExitStack() as stack:
        chain, bottom = open_bottom(path, base, base_format, stack)
        chain.stand_on(bottom, full=full, progress=progress)
        size = chain.disk_size
        spared = [image.path for image in chain.images]
        if bottom is not None and bottom.path is not None:
            spared += [bottom.path, *backing_chain(bottom.path)]
        written = zeroed = 0
        with AtomicOutput(target, spare=spared) as output:
            cloned = _clone(bottom, output, size)
            for extent in chain.held():
                piece = _cut(extent, size)
                if piece is None:
                    continue
                if piece.kind is Kind.DATA:
                    written += piece.length
                    for offset in range(piece.offset, piece.end, _PIECE):
                        output.pwrite(chain.pread(min(_PIECE, piece.end - offset), offset), offset)
                elif piece.kind is Kind.ZERO:
                    zeroed += piece.length
                    if cloned:
                        _zero(output, piece)
                elif bottom is not None and not cloned:
                    _copy(bottom, output, piece)
                if progress is not None:
                    progress(piece.end, size)
            output.truncate(size)
            if bottom is not None:
                bottom.verify()
        return ApplyReport(
            path=os.fspath(path),
            target=os.fspath(target),
            in_place=False,
            size=size,
            written_bytes=written,
            zeroed_bytes=zeroed,
            finished=False,
            recognised=chain.recognised == "identity",
            seconds=time.perf_counter() - begun,
            base=None if bottom is None else bottom.given,
            lowest=chain.images[-1].path,
        )


def _cut(extent: Extent, size: int) -> Extent | None:
    """The part of ``extent`` that is within ``size`` bytes."""
    length = min(extent.end, size) - extent.offset
    return extent._replace(length=length) if length > 0 else None


def _clone(base: Base | None, output: AtomicOutput, size: int) -> bool:
    """Whether ``output`` is a copy of the base that shares its space."""
    if not isinstance(base, FileBase):
        return False
    try:
        fcntl.ioctl(output.fileno(), _CLONE, base.fileno())
    except OSError:
        return False
    output.truncate(size)
    return True


def _zero(output: AtomicOutput, piece: Extent) -> None:
    if not punch_hole(output.fileno(), piece.offset, piece.length):
        for offset in range(piece.offset, piece.end, len(ZEROES)):
            output.pwrite(ZEROES[: piece.end - offset], offset)


def _copy(base: Base, output: AtomicOutput, piece: Extent) -> None:
    """Copy the base's data within ``piece``."""
    inside = min(piece.end, base.size) - piece.offset
    if inside <= 0:
        return
    for extent in base.extents(piece.offset, inside):
        if extent.kind is not Kind.DATA:
            continue
        done = _copy_by_system(base, output, extent) if isinstance(base, FileBase) else 0
        for offset in range(extent.offset + done, extent.end, _PIECE):
            output.pwrite(base.pread(min(_PIECE, extent.end - offset), offset), offset)


def _copy_by_system(base: FileBase, output: AtomicOutput, extent: Extent) -> int:
    """How many bytes of ``extent`` the system has copied by itself."""
    done = 0
    while done < extent.length:
        at = extent.offset + done
        try:
            count = os.copy_file_range(base.fileno(), output.fileno(), extent.length - done, at, at)
        except OSError as error:
            if error.errno in _TRY_OTHERWISE:
                return done
            raise OutputError(f"cannot write {output.path}: {error.strerror}") from error
        if not count:
            return done  # the file was cut short: reading it says so
        done += count
    return done
