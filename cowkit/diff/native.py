"""Writes the difference of a disk to a qcow2 image without any other program."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cowkit.diff.changed import Changes
from cowkit.diff.output import AtomicOutput
from cowkit.diff.qcow2_layout import DEFAULT_CLUSTER, LONGEST_BACKING_NAME, geometry
from cowkit.diff.qcow2_reader import backing_chain
from cowkit.diff.qcow2_writer import Qcow2Writer
from cowkit.diff.report import DiffReport, amounts
from cowkit.errors import OutputError, UsageError

if TYPE_CHECKING:
    from cowkit.disk import Base, FrozenView


def write_diff(
    view: FrozenView,
    path: str | os.PathLike[str],
    *,
    backing_file: str | None,
    backing_format: str = "raw",
    progress: Callable[[int, int], None] | None = None,
    cluster_size: int = DEFAULT_CLUSTER,
) -> DiffReport:
    """Write what differs between ``view`` and its base to a qcow2 version 3 image at ``path``, all at once or not at all.

    The image is written beside ``path`` and renamed at the end; a file that is there already is replaced then.

    :param backing_file: the base's name as the image is to have it, see :func:`backing_name`; None for a blank disk,
        whose image stands alone.
    :param backing_format: the base's format as QEMU names it.
    :param progress: called with the dirty bytes dealt with and those there are in all, about 200 times; what it raises
        ends the writing.
    :param cluster_size: in bytes; a power of two from 4096 bytes to 2 MiB.
    :raises UsageError: no such cluster size, the disk is too large for it, or ``backing_file`` does not fit the disk.
    :raises OutputError: the image cannot be written; an old file at ``path`` is as it was.
    :raises BaseChangedError: the base is not what it was when the disk was opened; an old file is as it was.
    """
    begun = time.perf_counter()
    shape = geometry(view.size, cluster_size)
    base_path = view.base.path
    if backing_file is None and (base_path or view.base.given):
        raise UsageError(f"a difference to {view.base.given} needs a name for it: give backing_file")
    name = _checked(backing_file) if backing_file is not None else None
    view.base.verify_path()
    with AtomicOutput(path, spare=_spared(base_path)) as output:
        writer = Qcow2Writer(output, shape, backing_file=name, backing_format=backing_format)
        changes = Changes(view, cluster_size, progress)
        for batch in changes:
            writer.add(batch)
        writer.finish()
        view.base.verify_path()
    tally = changes.tally
    changed_bytes, changed_extents, zeroed_bytes, zeroed_extents = amounts(tally.changed)
    return DiffReport(
        path=os.fspath(path),
        backing_file=backing_file,
        backing_format=backing_format if backing_file is not None else None,
        virtual_size=shape.size,
        cluster_size=cluster_size,
        dirty_bytes=tally.dirty_bytes,
        dirty_extents=tally.dirty_extents,
        changed_bytes=changed_bytes,
        changed_extents=changed_extents,
        zeroed_bytes=zeroed_bytes,
        zeroed_extents=zeroed_extents,
        bytes_read=tally.bytes_read,
        bytes_written=output.bytes_written,
        seconds=time.perf_counter() - begun,
        changed=tuple(tally.changed),
    )


def check_output(base: Base, path: str | os.PathLike[str]) -> None:
    """Look whether a difference to ``base`` could be written to ``path``, without writing anything.

    :raises OutputError: it could not.
    """
    AtomicOutput(path, spare=_spared(base.path)).check()


def _spared(base_path: str | None) -> list[str]:
    return [base_path, *backing_chain(base_path)] if base_path is not None else []


def backing_name(given: str | None, base_path: str | None, output: str | os.PathLike[str]) -> str | None:
    """The name of the base for an image at ``output`` to have: relative where ``given`` is, absolute otherwise.

    QEMU looks for a relative name from the directory of the image, so the result is relative to that, with symbolic
    links on the way there resolved. Where ``output`` is itself a link into another directory, no relative name would do
    from both, and the result is absolute.

    :param given: the base's path as the user wrote it.
    :param base_path: the same, made absolute; None where the base is no file, and so is the result.
    :raises OutputError: the name has over 1023 bytes, which is the most that qcow2 has room for.
    """
    if base_path is None:
        return None
    asked, written = os.path.abspath(output), os.path.realpath(output)
    directory = os.path.dirname(written)
    if given is None or os.path.isabs(given) or os.path.realpath(os.path.dirname(asked)) != directory:
        name = base_path
    else:
        folder, last = os.path.split(base_path)
        name = os.path.relpath(os.path.join(os.path.realpath(folder), last), directory)
        if ":" in name.split("/", 1)[0]:
            name = f"./{name}"  # a colon before any slash is the end of a protocol's name, to QEMU
    _checked(name)
    return name


def _checked(name: str) -> bytes:
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError as error:
        raise OutputError(f"the name of the base, {name!r}, cannot be written: {error.reason}") from error
    if b"\0" in raw:
        raise OutputError(f"the name of the base, {name!r}, contains a NUL, which no file's name does")
    if not 0 < len(raw) <= LONGEST_BACKING_NAME:
        raise OutputError(
            f"the name of the base has {len(raw)} bytes, and qcow2 has room for 1 to {LONGEST_BACKING_NAME}: "
            "write the image nearer to the base, or give the base a shorter path"
        )
    return raw
