"""Writes the difference of a disk to an image: without any other program, unless another engine is given."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from cowkit.diff.batch import Batch
from cowkit.diff.changed import Changes
from cowkit.diff.engine import Engine, Filled, Order
from cowkit.diff.identity import BLOCK, BaseIdentity, Progress, identify, sampled_bytes
from cowkit.diff.image_output import ImageOutput
from cowkit.diff.options import EngineName, ImageOptions
from cowkit.diff.output import AtomicOutput
from cowkit.diff.qcow2.bitmap_writer import add_bitmap, granularity_for
from cowkit.diff.qcow2.header import backing_chain
from cowkit.diff.qcow2.layout import LONGEST_BACKING_NAME, Geometry, check_format_name, geometry, image_size
from cowkit.diff.qcow2.subcluster_writer import SubclusterWriter
from cowkit.diff.qcow2.writer import Qcow2Writer
from cowkit.diff.raw_writer import RawWriter
from cowkit.diff.rbd_writer import RbdWriter
from cowkit.diff.recorded import record
from cowkit.diff.report import DiffReport, count_changed
from cowkit.diff.resized import is_resized
from cowkit.diff.scattered import settled
from cowkit.diff.whole import Whole
from cowkit.disk.view_base import ViewBase
from cowkit.errors import OutputError, OverlayError, UsageError

if TYPE_CHECKING:
    from cowkit.diff.view import View
    from cowkit.disk import Base

DEFAULTS = ImageOptions()


def write_diff(
    view: View,
    path: str | os.PathLike[str],
    *,
    backing_file: str | None,
    backing_format: str = "raw",
    progress: Callable[[int, int], None] | None = None,
    options: ImageOptions = DEFAULTS,
    engine: Engine | None = None,
    spare: Iterable[str] = (),
    snapshots: tuple[str | None, str | None] = (None, None),
) -> DiffReport:
    """Write what differs between ``view`` and its base to an image at ``path``, all at once or not at all.

    The image is written beside ``path`` and renamed at the end; a file that is there already is replaced then.

    :param backing_file: the base's name as the image is to have it, see :func:`backing_name`; None for a blank disk, and for
        an image that has all of the disk: those stand alone.
    :param backing_format: the base's format as QEMU names it.
    :param progress: called with the dirty bytes dealt with and those there are in all, about 200 times; what it raises
        ends the writing.
    :param options: the kind of image; qcow2 version 3 with clusters of 64 KiB unless given.
    :param engine: who writes it: cowkit itself, unless given.
    :param spare: files that ``path`` must not be, beside those that the image stands on.
    :param snapshots: what the checkpoints are called that are the state before and the state now; None where there is none.
    :raises UsageError: the options make no sense, the disk is too large for them, or ``backing_file`` does not fit the disk.
    :raises OutputError: the image cannot be written; an old file at ``path`` is as it was.
    :raises BaseChangedError: the base is not what it was when the disk was opened; an old file is as it was.
    """
    begun = time.perf_counter()
    engine = engine or NATIVE
    options.check()
    if engine is NATIVE:
        options = settled(options, view)
    shape = shape_for(view.size, options)
    if options.bitmap is not None and not view.size:
        raise UsageError("an empty disk has nothing for a bitmap to mark, and QEMU refuses such an image: leave it out")
    if not view.size and options.needs_qemu is not None:
        raise UsageError(
            f"an empty disk cannot be written with {options.needs_qemu}: QEMU makes no such image of 0 bytes"
        )
    if backing_file is None and options.names_base and (view.base.path or view.base.given):
        raise UsageError(f"a difference to {view.base.given} needs a name for it: give backing_file")
    if backing_file is not None and not options.names_base:
        what = "a difference for rbd" if options.is_rbd else "an image with all of the disk"
        raise UsageError(f"{what} has no backing file: leave out {backing_file}")
    if backing_file is not None:
        _checked(backing_file)
    check_format_name(backing_format)
    view.base.verify_path()
    spared = [*_spared(view.base, path, backing_file), *spare]
    if options.secret_file is not None:
        spared.append(os.fsdecode(options.secret_file))
    with _base_blamed(view.base), AtomicOutput(path, spare=spared) as output:
        identity = None
        if backing_file is not None and options.kind == "qcow2":
            identity, progress = identity_of(view, full=options.hash == "full", progress=progress)
        recorded = record(view, identity) if options.kind == "qcow2" else None
        order = Order(view, shape, backing_file, backing_format, options, recorded, progress, snapshots)
        filled = engine.fill(order, output)
        resized = is_resized(view)
        view.base.verify_path()
    tally = filled.tally
    changed_bytes, changed_extents, zeroed_bytes, zeroed_extents = count_changed(tally.changed)
    return DiffReport(
        path=os.fspath(path),
        backing_file=backing_file,
        backing_format=backing_format if backing_file is not None else None,
        virtual_size=filled.virtual_size,
        cluster_size=shape.cluster_size,
        dirty_bytes=tally.dirty_bytes,
        dirty_extents=tally.dirty_extents,
        changed_bytes=changed_bytes,
        changed_extents=changed_extents,
        zeroed_bytes=zeroed_bytes,
        zeroed_extents=zeroed_extents,
        bytes_read=tally.bytes_read + (_cost(recorded.base) if recorded and recorded.base else 0),
        bytes_written=output.bytes_written,
        seconds=time.perf_counter() - begun,
        changed=tuple(tally.changed),
        engine=engine.name,
        format=options.kind,
        size=view.size,
        base_size=None if view.base.given is None else view.base.size,
        subclusters=shape.subclusters,
        since=snapshots[0],
        resized=resized,
    )


def shape_for(size: int, options: ImageOptions) -> Geometry:
    """The geometry of the image of a disk of ``size`` bytes.

    :raises UsageError: the disk is too large for it.
    """
    if options.is_raw or options.is_rbd:  # without tables that could be too small
        return Geometry(image_size(size), options.cluster)
    return geometry(size, options.cluster, subclusters=bool(options.subclusters))


class Native:
    """Writes images without any other program."""

    name: EngineName = "native"

    def fill(self, order: Order, output: ImageOutput) -> Filled:
        """See :meth:`cowkit.diff.engine.Engine.fill`."""
        view, shape, options = order.view, order.shape, order.options
        # The other kinds of image must see their content, or have it where it belongs.
        plain = not (options.has_all or options.is_rbd or options.compress)
        changes = Changes(view, order.portion, order.progress, in_parts=plain)
        with closing(changes):
            found: Iterable[Batch] = Whole(view, changes, order.portion) if options.has_all else changes
            batches = _one_at_a_time(found, output)
            if options.is_raw or options.is_rbd:
                stream: RawWriter | RbdWriter
                if options.is_rbd:
                    since, at = order.snapshots
                    stream = RbdWriter(output, view.size, since=since, at=at)
                else:
                    stream = RawWriter(output, view.size)
                for batch in batches:
                    stream.add(batch)
                stream.finish()
                return Filled(changes.tally, view.size)
            self._qcow2(order, output, batches)
        return Filled(changes.tally, shape.size)

    @staticmethod
    def _qcow2(order: Order, output: ImageOutput, batches: Iterable[Batch]) -> None:
        view, options = order.view, order.options
        name = None if order.backing_file is None else _checked(order.backing_file)
        with _writer(output, order.shape, name, order.backing_format, options) as writer:
            writer.identity = order.identity and order.identity.to_bytes()
            for batch in batches:
                writer.add(batch)
            bitmaps = None
            if options.bitmap is not None:
                granularity = granularity_for(view.size, view.block_size)
                bitmaps = add_bitmap(writer, options.bitmap, view.dirty_extents(), granularity)
            writer.finish(bitmaps)


NATIVE = Native()


@contextmanager
def _base_blamed(base: Base) -> Iterator[None]:
    """A write from a mapping that fails since its file was cut short is a fault of the base or the overlay, not of the image."""
    try:
        yield
    except OutputError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EFAULT:
            base.verify()
            raise OverlayError(
                "the overlay's file cannot be read any more: it was cut short, or its disk fails"
            ) from error
        raise


def identity_of(view: View, *, full: bool, progress: Progress | None) -> tuple[BaseIdentity | None, Progress | None]:
    """Who the base of ``view`` is, and what tells of the progress of what comes next.

    There is none of a compressed base, of which some blocks cost as much as all, unless all is what is asked for.

    :param full: with the digest of the whole base.
    """
    base = view.base
    if not full:
        if base.scattered_reads_are_slow:
            return None, progress
        return identify(base), progress
    if progress is None:
        return identify(base, full=True), None
    tell, dirty = progress, view.dirty_bytes
    whole = identify(base, full=True, progress=_every(200, base.size, lambda done, total: tell(done, total + dirty)))
    return whole, lambda done, total: tell(base.size + done, base.size + total)


def _every(times: int, total: int, progress: Progress) -> Progress:
    """The same, called not much more often than that."""
    told = 0

    def tell(done: int, _: int) -> None:
        nonlocal told
        if (done - told) * times >= total:
            told = done
            progress(done, total)

    return tell


def _cost(identity: BaseIdentity) -> int:
    """How many bytes of the base were read for its identity."""
    written = 0 if identity.written is None else len(identity.written.at) * BLOCK
    return sampled_bytes(identity.size) + written + (identity.size if identity.full is not None else 0)


def _one_at_a_time(batches: Iterable[Batch], output: ImageOutput) -> Iterator[Batch]:
    """The same, but a batch's memory is never used for another one while it is still being written."""
    for batch in batches:
        if not batch.size:  # whose writing would wait for that of the last one
            output.drain()
        yield batch


@contextmanager
def _writer(
    output: ImageOutput, shape: Geometry, name: bytes | None, backing_format: str, options: ImageOptions
) -> Iterator[Qcow2Writer]:
    if options.compress is not None:
        from cowkit.diff.qcow2.compressed_writer import CompressedWriter  # its thread pool takes 10 ms to import

        with CompressedWriter(
            output, shape, backing_file=name, backing_format=backing_format, method=options.compress
        ) as compressed:
            yield compressed
        return
    kind = SubclusterWriter if options.subclusters else Qcow2Writer
    yield kind(output, shape, backing_file=name, backing_format=backing_format)


def check_output(base: Base, path: str | os.PathLike[str], *, spare: Iterable[str] = ()) -> None:
    """Look whether a difference to ``base`` could be written to ``path``, without writing anything.

    :param spare: files that ``path`` must not be, beside those that the image stands on.
    :raises OutputError: it could not.
    """
    AtomicOutput(path, spare=[*_spared(base, path, None), *spare]).check()


def _spared(base: Base, output: str | os.PathLike[str], backing_file: str | None) -> list[str]:
    """The files that the image stands on, which it must not replace."""
    while isinstance(base, ViewBase):
        base = base.shown.base
    bottoms = [] if base.path is None else [base.path]
    if backing_file is not None:
        bottoms.append(os.path.join(os.path.dirname(os.path.realpath(output)), backing_file))
    return [each for bottom in bottoms for each in (bottom, *backing_chain(bottom))]


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
