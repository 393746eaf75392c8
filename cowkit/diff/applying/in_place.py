"""A difference merged into its base itself: `cowkit apply --in-place`.

Here alone cowkit writes to a base, and here alone it promises something about a power cut: see journal.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

from cowkit.bases.unfinished import journal_of, unready_journal_of
from cowkit.diff.applying.journal import Facts, Journal, JournalWriter, identity_of_file
from cowkit.diff.applying.report import ApplyReport, Others
from cowkit.diff.bottom import open_bottom
from cowkit.diff.chain import DiffChain
from cowkit.diff.identity import Progress, sampled_digest
from cowkit.diff.qcow2.layout import image_size
from cowkit.disk import Extent, FileBase, Kind
from cowkit.disk.files import pwrite_whole
from cowkit.disk.punch import punch_hole
from cowkit.disk.source import ZEROES
from cowkit.errors import CowkitError, OutputError, UsageError, WrongBaseError

_PIECE = 1 << 20


def target_of(path: str | os.PathLike[str], base: str | os.PathLike[str] | None) -> str:
    """The path of the base that the difference at ``path`` would be applied to.

    :param base: where the base is; where the difference says, unless given.
    :raises UsageError: it is nothing that can be written to.
    :raises ImageError: the difference is damaged.
    """
    if base is not None:
        return os.fspath(base)
    with DiffChain(path) as chain:
        if chain.below is None:
            raise UsageError(
                f"{os.fspath(path)} stands alone: there is no base to apply it to; `--to` writes it as a raw file"
            )
        if chain.missing is not None:
            raise WrongBaseError(f"there is no base to apply it to: {chain.missing}")
        if chain.below.path is None:
            raise UsageError(
                f"{chain.below.name} is no file that could be written to: apply the difference to a copy (--to)"
            )
        if chain.below.format not in (None, "raw"):
            raise UsageError(
                f"{chain.below.path} is a {chain.below.format} image, and cowkit writes to raw files alone: apply the difference to a "
                "copy (--to), or use qemu-img commit"
            )
        return chain.below.path


def apply_in_place(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    base_format: str | None = None,
    full: bool | None = None,
    progress: Progress | None = None,
    on_finished: Callable[[ApplyReport], None] | None = None,
) -> ApplyReport:
    """Write what the difference at ``path``, and those that it stands on, hold to their base, a raw file.

    All of it goes to a journal beside the base first. Killed before that is whole, the base is as it was; killed later, the next
    call for this base, or :func:`finish`, ends it. Afterwards the difference does not fit its base any more.

    :param base: where the base is; where the difference says, unless given.
    :param base_format: its format, as :func:`cowkit.bases.open_base` has it.
    :param full: compare the whole base with the digest in the difference, which was written with ``hash="full"``; None: where
        there is one; False: compare the sampled blocks alone.
    :param progress: called now and then with the bytes that are done and those there are.
    :param on_finished: called when an interrupted call for another difference has been ended first. If it was for this one,
        that is all there is to do.
    :raises UsageError: the base is no raw file, or would become smaller.
    :raises ImageError: the difference is damaged.
    :raises WrongBaseError: the base is not the one that it was made of.
    :raises OutputError: there is no room, or the base cannot be written to; the message says whether anything was.
    """
    begun = time.perf_counter()
    with _Target(target_of(path, base)) as target, ExitStack() as stack:
        if (ended := target.finish()) is not None:
            report, facts = ended
            if facts.diff_identity == identity_of_file(path):
                return report
            if on_finished is not None:
                on_finished(report)
        chain, bottom = open_bottom(path, base, base_format, stack)
        if not isinstance(bottom, FileBase):
            raise UsageError(
                f"{target.path} is no raw file, and cowkit writes to no other: apply the difference to a copy (--to), or use "
                "qemu-img commit"
            )
        if not os.path.samestat(os.fstat(bottom.fileno()), os.fstat(target.fd)):
            raise WrongBaseError(f"{target.path} was replaced by another file while it was being opened: try again")
        chain.stand_on(bottom, full=full, progress=progress)
        if chain.disk_size < bottom.size:
            raise UsageError(
                f"{chain.path} has {chain.disk_size} bytes and {target.path} {bottom.size}, of which the end would be lost: apply it "
                "to a copy (--to)"
            )
        before = sampled_digest(bottom, bottom.size)
        facts = _write_journal(chain, target, bottom.size, progress)
        with Journal(target.path) as journal:
            target.replay(journal, progress)
        return ApplyReport(
            path=os.fspath(path),
            target=target.path,
            in_place=True,
            size=facts.size,
            written_bytes=facts.written_bytes,
            zeroed_bytes=facts.zeroed_bytes,
            finished=False,
            recognised=chain.recognised == "identity",
            others=target.others(facts, before),
            seconds=time.perf_counter() - begun,
            base=target.path,
            lowest=chain.images[-1].path,
            size_before=facts.size_before,
        )


def finish(base: str | os.PathLike[str]) -> ApplyReport | None:
    """End what an interrupted :func:`apply_in_place` to ``base`` began; None where there is nothing to end.

    :raises OutputError: there is no room, or the journal is damaged.
    """
    with _Target(os.fspath(base)) as target:
        ended = target.finish()
        return None if ended is None else ended[0]


def _write_journal(chain: DiffChain, target: _Target, size_before: int, progress: Progress | None) -> Facts:
    """Bring to the disk what is to be written, and see that there is room for it in the base."""
    size = chain.disk_size
    held = [each._replace(length=min(each.end, size) - each.offset) for each in chain.held() if each.offset < size]
    facts = Facts(
        size_before=size_before,
        size=size,
        diff=os.path.abspath(chain.path),
        diff_identity=identity_of_file(chain.path),
        written_bytes=sum(each.length for each in held if each.kind is Kind.DATA),
        zeroed_bytes=sum(each.length for each in held if each.kind is Kind.ZERO),
    )
    total = 2 * facts.written_bytes
    done = 0
    with JournalWriter(target.path, facts) as journal:
        for extent in held:
            if extent.kind is Kind.ZERO:
                journal.add(extent)
            elif extent.kind is Kind.DATA:
                target.reserve(extent, size_before)
                for offset in range(extent.offset, extent.end, _PIECE):
                    length = min(_PIECE, extent.end - offset)
                    journal.add(Extent(offset, length, Kind.DATA), chain.pread(length, offset))
                    done += length
                    if progress is not None:
                        progress(done, total)
        journal.commit()
    return facts


class _Target:
    """A base that is written to, by nobody else meanwhile; a context manager."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UsageError(
                    f"{path} is no regular file, and the journal needs a place beside one: apply to a copy (--to)"
                )
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        except CowkitError:
            raise
        except ValueError as error:  # a null byte in the path
            raise OutputError(f"cannot write {path!r}: {error}") from error
        self._locked = True
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.fd)
            raise OutputError(
                f"cannot write {path}: another `cowkit apply` is at work on it, or somebody else has it locked"
            ) from error
        except OSError:  # a file system without locks
            self._locked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)

    def finish(self) -> tuple[ApplyReport, Facts] | None:
        """End what a journal says that was begun; None where there is none. One that was never whole is removed."""
        begun = time.perf_counter()
        if self._locked:  # nobody is writing it any more
            with suppress(OSError):
                os.unlink(unready_journal_of(self.path))
        if not os.path.lexists(journal_of(self.path)):
            return None
        with Journal(self.path) as journal:
            self.replay(journal, None)
            facts = journal.facts
        report = ApplyReport(
            path=facts.diff,
            target=self.path,
            in_place=True,
            size=facts.size,
            written_bytes=facts.written_bytes,
            zeroed_bytes=facts.zeroed_bytes,
            finished=True,
            recognised=True,
            seconds=time.perf_counter() - begun,
            base=self.path,
            size_before=facts.size_before,
        )
        return report, facts

    def others(self, facts: Facts, before: str) -> Others:
        """What becomes of other differences to the base, whose sampled blocks had the digest ``before``."""
        if image_size(facts.size) != image_size(facts.size_before):  # sizes are compared in sectors
            return "refused"
        if not facts.written_bytes + facts.zeroed_bytes:
            return "fit"
        written = FileBase(self.path)
        try:
            return "unnoticed" if sampled_digest(written, written.size) == before else "refused"
        finally:
            written.release()

    def reserve(self, extent: Extent, size: int) -> None:
        """See that there is room for data, also where the base has a hole; what it reads as stays the same.

        :raises OutputError: there is none.
        """
        length = min(extent.end, size) - extent.offset
        if length <= 0:
            return
        try:
            os.posix_fallocate(self.fd, extent.offset, length)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise OutputError(f"cannot write {self.path}: {error.strerror}; nothing of it has changed") from error
            # Where the file system does not know how, writing will tell.

    def replay(self, journal: Journal, progress: Progress | None) -> None:
        """Write all that the journal has to the base, bring that to the disk, and remove the journal."""
        total, done = 2 * journal.facts.written_bytes, journal.facts.written_bytes
        try:
            for extent, data in journal.records():
                if extent.kind is Kind.DATA:
                    pwrite_whole(self.fd, memoryview(data), extent.offset)
                    done += extent.length
                    if progress is not None:
                        progress(done, total)
                else:
                    self._zero(extent, journal.facts.size)
            os.ftruncate(self.fd, journal.facts.size)
            os.fsync(self.fd)
            journal.remove()
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}; part of it is written, and nothing is lost: make room and finish it "
                f"with `cowkit apply --finish {self.path}`"
            ) from error

    def _zero(self, extent: Extent, size: int) -> None:
        end = min(extent.end, size)
        if end <= extent.offset or punch_hole(self.fd, extent.offset, end - extent.offset):
            return
        for offset in range(extent.offset, end, len(ZEROES)):
            pwrite_whole(self.fd, ZEROES[: end - offset], offset)
