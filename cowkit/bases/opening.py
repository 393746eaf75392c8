"""Opening a base, whatever it is."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from cowkit.bases.formats import COMPRESSED, HEAD, detect, format_of_content, format_of_name, known_format
from cowkit.bases.unfinished import refuse_unfinished
from cowkit.disk.base import Base, FileBase
from cowkit.errors import BaseOpenError, UsageError

_URI = re.compile(r"nbds?(\+[a-z]+)?://", re.IGNORECASE)


def is_uri(given: str | os.PathLike[str]) -> bool:
    """Whether ``given`` is an NBD URI, such as ``nbd://host/export`` or ``nbd+unix:///?socket=/run/sock``, and no path."""
    return isinstance(given, str) and _URI.match(given) is not None


def open_base(
    given: str | os.PathLike[str],
    *,
    format: str | None = None,
    offset: int = 0,
    size: int | None = None,
    partition: int | None = None,
    tmpdir: str | os.PathLike[str] | None = None,
    contexts: Sequence[str] = (),
) -> Base:
    """The base ``given``, read-only: a raw file or block device, a compressed file, another image format, or an NBD URI.

    A file's format is told by its name and its first bytes together; where they do not agree, an error asks for ``format``.

    :param format: ``"raw"``, ``"xz"``, ``"gz"``, ``"zst"``, ``"bz2"``, or QEMU's name of an image format (``"qcow2"``,
        ``"vmdk"``, ``"vdi"``, ``"vhdx"``, ``"vpc"``, ``"qed"``, ``"parallels"`` ...).
    :param offset: begin that many bytes into it (or into the partition).
    :param size: end after that many bytes; at the end of it (or of the partition), unless given.
    :param partition: only the partition of that number, from 1; logical partitions of an MBR are counted from 5.
    :param tmpdir: where what was decompressed is kept, in a file without a name: ``$TMPDIR`` or ``/var/tmp``, unless given.
    :param contexts: metadata contexts that an NBD server is asked for beside ``base:allocation``; so is the one that reads an
        image of another format than raw. Elsewhere there are none.
    :raises UsageError: an argument makes no sense.
    :raises BaseOpenError: the base cannot be opened, is damaged, its format is in doubt, or it has no such window.
    :raises MissingToolError: a package or program that this kind of base needs is not installed.
    """
    wanted = None if format is None else known_format(format)
    base = _open_whole(given, wanted, tmpdir, contexts)
    if partition is None and offset == 0 and size is None:
        return base
    try:
        return window_of(base, offset, size, partition)
    except BaseException:
        base.release()
        raise


def window_of(base: Base, offset: int, size: int | None, partition: int | None) -> Base:
    """A part of ``base``, which it holds; see :func:`open_base`. If it fails, ``base`` is still the caller's."""
    from cowkit.bases.window import WindowBase

    if partition is None:
        return WindowBase(base, offset, size, f"the window at offset {offset}")
    from cowkit.bases.partitions import find_partition

    found = find_partition(base, partition)
    what = f"partition {partition}"
    if offset == 0 and size is None:
        return WindowBase(base, found.offset, found.size, what)
    if offset < 0 or offset > found.size or (size is not None and not 0 <= size <= found.size - offset):
        raise UsageError(
            f"{what} of base {base.given} has {found.size} bytes: offset {offset} and size {size} are not within it"
        )
    length = found.size - offset if size is None else size
    return WindowBase(base, found.offset + offset, length, f"a window of {what}")


def _open_whole(
    given: str | os.PathLike[str], wanted: str | None, tmpdir: str | os.PathLike[str] | None, contexts: Sequence[str]
) -> Base:
    if is_uri(given):
        if wanted not in (None, "raw"):
            raise UsageError(f"base {os.fspath(given)} is an NBD URI, which is always raw, not {wanted}")
        from cowkit.bases.nbd_base import NbdBase

        return NbdBase(os.fspath(given), contexts)
    file = FileBase(given)
    try:
        refuse_unfinished(file.given, file.path)
        found = wanted or detect(file.given, *_ends(file))
        base = _decoded(file, found, tmpdir, contexts)
    except BaseException:
        file.release()
        raise
    if wanted is None and found in COMPRESSED:
        try:
            _refuse_image_within(base, file.given)
        except BaseException:
            base.release()
            raise
    return base


def _decoded(file: FileBase, format: str, tmpdir: str | os.PathLike[str] | None, contexts: Sequence[str]) -> Base:
    if format == "raw":
        return file
    if format in COMPRESSED:
        from cowkit.bases.compressed import CompressedBase

        return CompressedBase(file, format, tmpdir)
    from cowkit.bases.image import ImageBase

    return ImageBase(file, format, contexts)


def _refuse_image_within(base: Base, given: str) -> None:
    """What was decompressed is taken for a raw disk: refuse where its name or its first bytes speak of something else."""
    within = format_of_content(base.pread(min(HEAD, base.size), 0)) or format_of_name(os.path.splitext(given)[0])
    if within is not None:
        raise BaseOpenError(
            f"base {given} seems to hold a {within} file and no raw disk: decompress it first, or say that what it holds is raw "
            f"by naming the compression alone (base_format={format_of_name(given)!r}, --format {format_of_name(given)})"
        )


def _ends(base: Base) -> tuple[bytes, bytes]:
    """The first bytes of ``base`` and its last ones."""
    length = min(HEAD, base.size)
    return base.pread(length, 0), base.pread(length, base.size - length)


def image_format_of(path: str) -> str | None:
    """The format of the file at ``path`` by its first bytes; None where it has no known one, or cannot be read."""
    try:
        file = FileBase(path)
    except BaseOpenError:
        return None
    try:
        return format_of_content(file.pread(min(HEAD, file.size), 0))
    finally:
        file.release()
