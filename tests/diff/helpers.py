"""What the tests of differences share: bases with holes, random doings, and other people's readers of qcow2."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

from cowkit.diff import DiffReport, ImageOptions, Qcow2Image, backing_name, write_diff
from cowkit.disk import Disk, FileBase


def make_base(path: Path, size: int, pieces: dict[int, bytes]) -> Path:
    """A sparse file of ``size`` bytes with ``pieces`` of data at their offsets."""
    with path.open("wb") as file:
        for offset, data in pieces.items():
            file.seek(offset)
            file.write(data)
        file.truncate(size)
    return path


def diff(disk: Disk, path: Path, *, cluster_size: int = 65536) -> DiffReport:
    """The difference of ``disk``, as it is now."""
    with disk.freeze() as view:
        name = backing_name(disk.base.given, disk.base.path, path)
        return write_diff(view, path, backing_file=name, options=ImageOptions(cluster_size=cluster_size))


def content(disk: Disk) -> bytes:
    """All of the disk, padded to whole sectors as QEMU has it."""
    data = disk.pread(disk.size, 0)
    return data.ljust(-(-len(data) // 512) * 512, b"\0")


def check_with_qemu(path: Path, expected: bytes | None = None) -> None:
    """qemu-img finds no error and no leak, and reads what is expected."""
    run("qemu-img", "check", "-q", path)
    if expected is not None:
        raw = path.with_suffix(".expected")
        raw.write_bytes(expected)
        run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", raw, path)


def read_with_cowkit(path: Path, base: FileBase | None) -> bytes:
    """What our own reader has, after it has checked the whole image."""
    with Qcow2Image(path, *((base.pread, base.size) if base else ())) as image:
        image.check()
        return image.pread(image.size, 0)


def read_with_dissect(path: Path, base: Path | None, size: int) -> bytes:
    """What dissect.hypervisor has; it wants a backing file that is as long as the image."""
    from dissect.hypervisor.disk.qcow2 import QCow2

    with path.open("rb") as file:
        if base is None:
            return bytes(QCow2(file).open().read(size))
        long_base = base.with_suffix(".long")
        long_base.write_bytes(base.read_bytes()[:size].ljust(size, b"\0"))
        with long_base.open("rb") as backing:
            return bytes(QCow2(file, backing_file=backing).open().read(size))


_BAD_CLOCK = "Unable to get accurate CPU usage"
"""What QEMU says, and does no more, if its clock of processor time stood still while it measured how quick it is (LUKS)."""
_TRIES = 10


def run(*command: str | os.PathLike[str]) -> str:
    """The output of a command that succeeds."""
    for _ in range(_TRIES):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if _BAD_CLOCK not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Doing(NamedTuple):
    """Something to do to a disk; ``at`` and ``length`` are shares of its size, in thousandths."""

    what: str
    at: int
    length: int
    seed: int

    def do(self, disk: Disk) -> None:
        """Do it."""
        offset = disk.size * self.at // 1000
        length = min(max(1, disk.size * self.length // 1000), disk.size - offset)
        if self.what == "block":  # whole blocks
            offset -= offset % disk.block_size
            length = min(-(-length // disk.block_size) * disk.block_size, disk.size - offset)
        if length <= 0:
            return
        if self.what == "trim":
            disk.trim(length, offset)
        elif self.what == "zero":
            disk.zero(length, offset)
        elif self.what == "write zeroes":
            disk.pwrite(bytes(length), offset)
        elif self.what == "rewrite":
            inside = max(0, min(length, disk.base.size - offset))
            disk.pwrite((disk.base.pread(inside, offset) if inside else b"").ljust(length, b"\0"), offset)
        else:
            disk.pwrite(noise(length, self.seed), offset)


def noise(length: int, seed: int) -> bytes:
    """Bytes without a zero, different for each seed."""
    return (bytes((seed * 31 + i * 7) % 255 + 1 for i in range(min(length, 255))) * (length // 255 + 1))[:length]


doings = st.lists(
    st.builds(
        Doing,
        what=st.sampled_from(["write", "block", "trim", "zero", "write zeroes", "rewrite"]),
        at=st.integers(0, 1000),
        length=st.one_of(st.integers(0, 30), st.integers(0, 600)),
        seed=st.integers(0, 5),
    ),
    max_size=12,
)

base_pieces = st.dictionaries(st.integers(0, 60).map(lambda n: n * 4096), st.integers(1, 40000), max_size=5)
"""Where a base has data and how much; what lies beyond its size is cut off."""
