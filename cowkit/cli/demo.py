"""`cowkit demo`: the main job on a real file system, with nothing but this package and e2fsprogs."""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cowkit.diff.answers.strip import strip
from cowkit.disk.extent import Kind
from cowkit.disk.sizes import format_size
from cowkit.errors import DiffError, MissingToolError, OutputError, ToolFailedError
from cowkit.programs import find_program

if TYPE_CHECKING:
    from cowkit import CowDisk
    from cowkit.diff import DiffReport

DESCRIPTION = (
    "Show the main job on a real file system: make an ext4 image, serve a throwaway view of it, wreck that, see with e2fsck "
    "that it is wrecked and the image is not, keep the difference, check it, and roll back. Takes a few seconds, needs no root."
)
EXAMPLES = """
cowkit demo
cowkit demo --keep /tmp/demo
"""

_BASE, _DIFF = "disk.img", "diff.qcow2"
"""What the files that are kept are called."""

_IMAGE_SIZE = 64 << 20
_PACKAGES = ("asyncio", "email", "encodings", "json", "unittest", "xml")
"""Folders of Python's own library: some megabytes of files that are on every machine that can run this."""

_DAMAGE = (
    ("write", 4096, 64 << 10),
    ("write", 3 << 20, 512 << 10),
    ("zero", 8 << 20, 2 << 20),
    ("trim", 24 << 20, 8 << 20),
)
"""What is done to which bytes: the group descriptors and bitmaps behind the superblock, inodes, and files' contents."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit demo` takes."""
    parser.add_argument(
        "--keep",
        metavar="DIR",
        help="keep the image and the difference in DIR, which has no disk.img and no diff.qcow2 yet (default: thrown away)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Show it."""
    keep = None if arguments.keep is None else _folder_to_keep(arguments.keep)
    with tempfile.TemporaryDirectory(prefix="cowkit-demo-", dir=os.environ.get("TMPDIR") or "/var/tmp") as scratch:
        return _Demo(keep, Path(scratch)).run()


def _folder_to_keep(name: str) -> Path:
    """The directory of that name, made if need be, in which nothing is in the way.

    :raises OutputError: it cannot be had, or has files that the demonstration would replace.
    """
    try:
        os.makedirs(name, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the directory {name}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise OutputError(f"cannot make the directory {name!r}: {error}") from error
    for kept in (_BASE, _DIFF):
        if os.path.lexists(path := os.path.join(name, kept)):
            raise OutputError(f"{path} is there already, and would be replaced: move it, or name another directory")
    return Path(name)


class _Demo:
    """One showing: each step says what it did, and the table at the end what came of it."""

    def __init__(self, keep: Path | None, scratch: Path) -> None:
        folder = scratch if keep is None else keep
        self._kept = keep is not None
        self._base = folder / _BASE
        self._diff = folder / _DIFF
        self._scratch = scratch
        self._copy = scratch / "look.img"
        self._step = 0

    def run(self) -> int:
        from cowkit import CowDisk

        self._make_image()
        before = _sha256(self._base)
        with CowDisk(self._base) as disk:
            self._say(f"serve a throwaway view of it: {disk.uri}")
            clean = disk.checkpoint("clean")
            client = self._wreck(disk)
            broken = not self._is_sound(disk)
            self._say(f"e2fsck: the throwaway disk is {'broken' if broken else 'NOT broken'}")
            sound = not _e2fsck(self._base)
            untouched = sound and _sha256(self._base) == before
            self._say(
                f"e2fsck: the image is {'sound' if sound else 'NOT sound'}; its SHA-256 is {before[:16]}... as before"
            )
            report = disk.diff(self._diff)
            self._say(
                f"keep the difference: {self._diff.name}, {format_size(report.bytes_written)}, in {report.seconds * 1000:.0f} ms"
            )
            checked_by = self._check_diff(disk)
            self._say(f"{checked_by}: the difference on top of the image is the wrecked disk, byte for byte")
            begun = time.perf_counter()
            disk.rollback(clean)
            back = (time.perf_counter() - begun) * 1000
            mended = self._is_sound(disk)
            self._say(
                f"roll back to the checkpoint in {back:.1f} ms: e2fsck finds the disk {'sound' if mended else 'NOT sound'}"
            )
        self._summary(report, client)
        if broken and untouched and mended:
            return 0
        print("cowkit: the demonstration did not show what it should: see above", file=sys.stderr)
        return 1

    def _say(self, text: str) -> None:
        self._step += 1
        print(f"{self._step}. {text}", flush=True)

    def _make_image(self) -> None:
        source = Path(os.__file__).parent
        with tempfile.TemporaryDirectory(prefix="files-", dir=self._scratch) as files:
            for package in _PACKAGES:
                if (source / package).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(
                        source / package, Path(files, package), ignore=ignored, copy_function=shutil.copyfile
                    )
            count = sum(len(names) for _, _, names in os.walk(files))
            command = [
                "mke2fs",
                "-q",
                "-F",
                "-t",
                "ext4",
                "-L",
                "cowkit-demo",
                "-d",
                files,
                _argument(self._base),
                str(_IMAGE_SIZE >> 10),
            ]
            _run(command, "making the file system")
        self._say(f"make an ext4 image of {count} files of this machine: {self._base.name}, {format_size(_IMAGE_SIZE)}")

    def _wreck(self, disk: CowDisk) -> str:
        """Damage the disk over NBD, with a real client where there is one; returns which."""
        name, damage = _client(disk)
        noise = random.Random(0)
        for what, offset, length in _DAMAGE:
            damage(what, offset, length, noise)
        self._say(f"wreck it ({name}): overwrite, zero and trim {format_size(sum(length for _, _, length in _DAMAGE))}")
        return name

    def _is_sound(self, disk: CowDisk) -> bool:
        """Whether e2fsck is content with the disk as it is now. It wants a file, so it gets a sparse copy."""
        shutil.copyfile(self._base, self._copy)
        with self._copy.open("r+b") as copy:
            for extent in disk.dirty_extents():
                for offset in range(extent.offset, extent.end, 1 << 20):
                    copy.seek(offset)
                    copy.write(disk.pread(min(1 << 20, extent.end - offset), offset))
        return not _e2fsck(self._copy)

    def _check_diff(self, disk: CowDisk) -> str:
        """Compare the difference with the live disk, by QEMU's own tool where it is there; returns by what."""
        if find_program("qemu-img"):
            _run(["qemu-img", "check", "-q", _argument(self._diff)], "checking the difference")
            _run(
                ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", _argument(self._diff), disk.uri],
                "comparing the difference",
            )
            return "qemu-img check and compare"
        from cowkit.diff import Qcow2Image

        base = disk.engine.base
        with Qcow2Image(self._diff, base.pread, base.size) as image:
            for offset in range(0, disk.size, 1 << 20):
                length = min(1 << 20, disk.size - offset)
                if image.pread(length, offset) != disk.pread(length, offset):
                    raise DiffError(f"{self._diff} differs from the disk within the {length} bytes at offset {offset}")
        return "cowkit's own reader"

    def _summary(self, report: DiffReport, client: str) -> None:
        zeroed = sum(extent.length for extent in report.changed if extent.kind is Kind.ZERO)
        rows = [
            ("image", f"{format_size(report.virtual_size)}, unchanged"),
            ("damaged by", client),
            ("dirty", f"{format_size(report.dirty_bytes)} in {report.dirty_extents} extents"),
            ("changed", f"{format_size(report.changed_bytes)} in {report.changed_extents} extents"),
            ("of it zeroed", format_size(zeroed)),
            ("read for the difference", format_size(report.bytes_read)),
            ("diff.qcow2", format_size(report.bytes_written)),
        ]
        print()
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.table import Table

            table = Table(title="what became of the throwaway disk", show_header=False, title_justify="left")
            for name, value in rows:
                table.add_row(name, value)
            Console().print(table)
        else:
            for name, value in rows:
                print(f"{name:<24}{value}")
        print("\nwhere it changed (0: reads as zeroes now):")
        print(strip(report.changed, report.virtual_size, 64))
        if self._kept:
            print(f"\nto look at it: qemu-img info {shlex.quote(_argument(self._diff))}")


def _client(disk: CowDisk) -> tuple[str, Callable[[str, int, int, random.Random], None]]:
    try:
        import nbd
    except ImportError:
        pass
    else:
        handle = nbd.NBD()
        handle.connect_uri(disk.uri)

        def by_libnbd(what: str, offset: int, length: int, noise: random.Random) -> None:
            if what == "write":
                handle.pwrite(noise.randbytes(length), offset)
            else:
                getattr(handle, what)(length, offset)

        return "libnbd", by_libnbd
    if find_program("qemu-io"):

        def by_qemu_io(what: str, offset: int, length: int, noise: random.Random) -> None:
            words = {"write": f"write -P {noise.randrange(1, 256)}", "zero": "write -z", "trim": "discard"}
            _run(["qemu-io", "-f", "raw", "-c", f"{words[what]} {offset} {length}", disk.uri], "damaging the disk")

        return "qemu-io", by_qemu_io

    def in_process(what: str, offset: int, length: int, noise: random.Random) -> None:
        if what == "write":
            disk.pwrite(noise.randbytes(length), offset)
        else:
            getattr(disk, what)(length, offset)

    return "in process: no NBD client is installed", in_process


def _e2fsck(image: Path) -> bool:
    """Whether e2fsck finds errors (e2fsck(8): exit status 4, or 8 where it could not even begin on such a file system)."""
    return _run(["e2fsck", "-f", "-n", _argument(image)], "checking the file system", answers=(0, 4, 8, 12)) != 0


def _run(command: Sequence[str], purpose: str, answers: tuple[int, ...] = (0,)) -> int:
    program = find_program(command[0])
    if program is None:
        raise MissingToolError(command[0], purpose=purpose, remedy="install e2fsprogs (Debian: apt install e2fsprogs)")
    done = subprocess.run(
        [program, *command[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode not in answers:
        raise ToolFailedError(command, done.returncode, done.stdout.decode(errors="replace"))
    return done.returncode


def _argument(path: Path) -> str:
    """The path as programs take it for one: not for an option, and not, as QEMU's do, for ``PROTOCOL:NAME``."""
    return str(path) if path.is_absolute() else f"./{path}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
