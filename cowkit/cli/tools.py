"""The outside tools that cowkit, its tests or its users' tests may want: what each is for and how to get it. Data alone."""

from __future__ import annotations

from typing import NamedTuple


class Tool(NamedTuple):
    """A program, or the Python binding of a library, that the distribution packages; or a Python module that pip installs."""

    name: str
    """What it is called: on PATH, or by ``import``."""
    purpose: str
    version: tuple[str, ...]
    """The arguments that make it tell its version; none for a module."""
    apt: str
    """Debian's and Ubuntu's package."""
    dnf: str
    """Fedora's package."""
    pip: str = ""
    """The package in the Python package index, of a module that comes from there; empty for others."""

    @property
    def is_module(self) -> bool:
        """Whether it is a Python module."""
        return not self.version


_LONG = ("--version",)
_SHORT = ("-V",)

TOOLS = (
    Tool("nbd", "being an NBD client from Python (libnbd's binding)", (), "python3-libnbd", "python3-libnbd"),
    Tool(
        "qemu-img", "checking, comparing and writing differences (--engine qemu-img)", _LONG, "qemu-utils", "qemu-img"
    ),
    Tool("qemu-io", "reading and writing a served disk by hand", _LONG, "qemu-utils", "qemu-img"),
    Tool("qemu-nbd", "serving a difference, or attaching a disk to /dev/nbd0", _LONG, "qemu-utils", "qemu-img"),
    Tool(
        "qemu-storage-daemon",
        "writing differences in all of QEMU's formats (--engine qmp)",
        _LONG,
        "qemu-system-common",
        "qemu-system-core",
    ),
    Tool("nbdkit", "the reference that cowkit is compared with", _LONG, "nbdkit", "nbdkit"),
    Tool("nbdinfo", "looking at what a server offers", _LONG, "libnbd-bin", "libnbd"),
    Tool("nbdcopy", "filling and emptying a served disk fast", _LONG, "libnbd-bin", "libnbd"),
    Tool("nbdsh", "reading and writing a served disk in lines of Python", _LONG, "python3-libnbd", "python3-libnbd"),
    Tool("nbdfuse", "having a served disk as a file", _LONG, "libnbd-bin", "nbdfuse"),
    Tool("nbd-client", "attaching a served disk to /dev/nbd0 (root)", _SHORT, "nbd-client", "nbd"),
    Tool("fio", "measuring speed (with its nbd engine)", _LONG, "fio", "fio"),
    Tool("mke2fs", "making a file system on a disk, as `cowkit demo` does", _SHORT, "e2fsprogs", "e2fsprogs"),
    Tool("e2fsck", "checking that file system", _SHORT, "e2fsprogs", "e2fsprogs"),
    Tool("debugfs", "telling which of its files changed (`cowkit diff --files`)", _SHORT, "e2fsprogs", "e2fsprogs"),
    Tool(
        "guestfish",
        "telling which files of xfs, vfat, ntfs and others changed",
        _LONG,
        "libguestfs-tools",
        "guestfs-tools",
    ),
    Tool("qemu.qmp", "driving a QEMU storage daemon (--engine qmp)", (), "", "", "qemu.qmp"),
    Tool("xz", "reading compressed bases: .xz", (), "", "", "python-xz"),
    Tool("indexed_gzip", "reading compressed bases: .gz", (), "", "", "indexed-gzip"),
    Tool("indexed_bzip2", "reading compressed bases: .bz2", (), "", "", "indexed-bzip2"),
    Tool(
        "backports.zstd",
        "reading compressed bases: .zst, and --compress zstd (before Python 3.14)",
        (),
        "",
        "",
        "backports.zstd",
    ),
)
