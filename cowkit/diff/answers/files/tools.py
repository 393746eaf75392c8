"""The programs that know file systems."""

from __future__ import annotations

import os
import shutil

from cowkit.errors import MissingToolError

_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
"""Where Debian has them, which is not on an ordinary user's PATH."""

_REMEDIES = {
    "debugfs": "install e2fsprogs (Debian: apt install e2fsprogs)",
    "e2fsck": "install e2fsprogs (Debian: apt install e2fsprogs)",
    "guestfish": "install libguestfs (Debian: apt install libguestfs-tools; Fedora: dnf install guestfs-tools)",
}


def find(program: str) -> str | None:
    """Where ``program`` is; None where it is not installed."""
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_PATH}")


def need(program: str, file_system: str) -> str:
    """Where ``program`` is, which tells the files of such a file system.

    :raises MissingToolError: it is not installed.
    """
    found = find(program)
    if found is None:
        raise MissingToolError(
            program, purpose=f"telling which files of {file_system} changed", remedy=_REMEDIES[program]
        )
    return found
