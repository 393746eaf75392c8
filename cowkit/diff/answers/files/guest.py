"""Which files changed in file systems that debugfs does not know (xfs, vfat, ntfs, btrfs ...): by guestfish, of libguestfs.

guestfish starts a small virtual machine with both states as its disks, mounts one after the other read-only, and sends its
files as a tar archive. So all files are read: it takes some seconds, and longer for a large file system. What differs is
found by types, modes, owners, contents, times in whole seconds, targets of links and extended attributes. There are no inodes
to recognise a file by: one that was renamed is told as removed and added.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import IO, NamedTuple

from cowkit.diff.answers.file_change import FileChange
from cowkit.diff.answers.files.scratch import remove
from cowkit.diff.answers.files.tools import need
from cowkit.errors import ToolFailedError

_PIECE = 1 << 20
_NOT_STARTED = re.compile(r"guestfs_launch|appliance", re.IGNORECASE)
_WITHOUT_KVM = (
    "its virtual machine does not start: where /dev/kvm does not work, set LIBGUESTFS_BACKEND_SETTINGS=force_tcg for the process "
    "that serves the disk; libguestfs-test-tool tells more"
)
_ATTRIBUTE = "SCHILY.xattr."

_TYPES = {
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "symlink",
    tarfile.FIFOTYPE: "fifo",
    tarfile.BLKTYPE: "block device",
    tarfile.CHRTYPE: "character device",
}


class _Member(NamedTuple):
    """A file as the archive has it. The names of the fields are those of :class:`FileChange`'s ``what``."""

    type: str
    content: bytes
    """A hash of it."""
    mode: int
    owner: tuple[int, int]
    times: int
    target: str
    device: tuple[int, int]
    attributes: tuple[tuple[str, str], ...]
    size: int


def guest_changes(before: str | None, now: str | None, name: str, check: Callable[[], None]) -> tuple[FileChange, ...]:
    """Each path that is not what it was, in order.

    :param before: the path of a copy of the file system as it was, which is removed once it is open; None where there was none,
        and so for ``now``.
    :param name: what messages call it, such as ``"xfs"``.
    :param check: called now and then; what it raises ends the work.
    :raises MissingToolError: guestfish is not installed.
    :raises ToolFailedError: it fails, or cannot mount the file system.
    """
    sides = [side for side in (before, now) if side is not None]
    trees = iter(_trees(need("guestfish", name), sides, check))
    old = {} if before is None else next(trees)
    new = {} if now is None else next(trees)
    return tuple(_compared(old, new))


def _compared(old: dict[str, _Member], new: dict[str, _Member]) -> Iterator[FileChange]:
    for path in sorted(old.keys() | new.keys(), key=os.fsencode):
        then, now = old.get(path), new.get(path)
        if then is None or now is None:
            there = now or then
            assert there is not None
            if path != "/":
                size = there.size if there.type == "file" else None
                if now is None:
                    yield FileChange(path, "removed", there.type, size_before=size)
                else:
                    yield FileChange(path, "added", there.type, size=size)
            continue
        what = _what(then, now)
        if what:
            size, size_before = (each.size if each.type == "file" else None for each in (now, then))
            yield FileChange(path, "changed", now.type, what, size=size, size_before=size_before)


def _what(then: _Member, now: _Member) -> tuple[str, ...]:
    if then.type != now.type:
        return ("type",)
    names = ["content", "mode", "owner", "times", "target", "device", "attributes"]
    if now.type == "directory":
        names.remove("times")  # of its entries, which are told themselves
    return tuple(name for name in names if getattr(then, name) != getattr(now, name))


def _trees(program: str, images: Sequence[str], check: Callable[[], None]) -> list[dict[str, _Member]]:
    """The files of each of ``images``, by path."""
    command = [program, "--ro"]
    script = ["run"]
    with ExitStack() as opened:
        pipes = []
        for index, image in enumerate(images):
            command += ["--format=raw", "-a", image]
            reading, writing = os.pipe()
            pipes.append((opened.enter_context(os.fdopen(reading, "rb")), writing))
            device = f"/dev/sd{'ab'[index]}"
            script += [
                f"mount-ro {device} /",
                f"tar-out / /dev/fd/{writing} numericowner:true xattrs:true",
                "umount-all",
            ]
        errors = opened.enter_context(tempfile.TemporaryFile())
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[writing for _, writing in pipes],
                env={"LIBGUESTFS_BACKEND": "direct", **os.environ, "LC_ALL": "C"},
            )
        finally:
            for _, writing in pipes:
                os.close(writing)
        try:
            assert process.stdin is not None
            with process.stdin as given:
                given.write("".join(f"{line}\n" for line in script).encode())
            try:
                pipes[0][0].peek(1)
                for image in images:  # the virtual machine is running, and has opened them
                    remove(image)
                found = [_tree(archive, check) for archive, _ in pipes]
                status = process.wait()
            except tarfile.TarError:
                found, status = [], process.wait()
        except BrokenPipeError:
            found, status = [], process.wait()
        finally:
            if process.poll() is None:
                process.terminate()  # its emulator ends with it
                process.wait()
        if status or not found:
            errors.seek(0)
            said = errors.read().decode(errors="replace")
            first = next((line for line in said.splitlines() if "error:" in line), said)
            hint = _WITHOUT_KVM if _NOT_STARTED.search(said) else "libguestfs-test-tool tells more"
            raise ToolFailedError(["guestfish", "--ro"], status or 1, f"{first} ({hint})")
        return found


def _tree(archive: IO[bytes], check: Callable[[], None]) -> dict[str, _Member]:
    found: dict[str, _Member] = {}
    with tarfile.open(fileobj=archive, mode="r|", encoding="utf-8", errors="surrogateescape") as members:
        for each in members:
            check()
            path = "/" + each.name.removeprefix(".").strip("/")
            if each.islnk():  # a further name of a file that came before
                other = found.get("/" + each.linkname.removeprefix(".").strip("/"))
                if other is not None:
                    found[path] = other
                continue
            content = hashlib.sha256()
            if each.isfile() and (file := members.extractfile(each)) is not None:
                with file:
                    while piece := file.read(_PIECE):
                        check()
                        content.update(piece)
            attributes = {key: value for key, value in each.pax_headers.items() if key.startswith(_ATTRIBUTE)}
            found[path] = _Member(
                _TYPES.get(each.type, "file"),
                content.digest(),
                each.mode,
                (each.uid, each.gid),
                int(each.mtime),
                each.linkname,
                (each.devmajor, each.devminor),
                tuple(sorted(attributes.items())),
                each.size,
            )
    return found
