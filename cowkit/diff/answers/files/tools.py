"""The programs that know file systems."""

from __future__ import annotations

from cowkit.errors import MissingToolError
from cowkit.programs import find_program

_REMEDIES = {
    "debugfs": "install e2fsprogs (Debian: apt install e2fsprogs)",
    "e2fsck": "install e2fsprogs (Debian: apt install e2fsprogs)",
    "guestfish": "install libguestfs (Debian: apt install libguestfs-tools; Fedora: dnf install guestfs-tools)",
}


def need(program: str, file_system: str) -> str:
    """Where ``program`` is, which tells the files of such a file system.

    :raises MissingToolError: it is not installed.
    """
    found = find_program(program)
    if found is None:
        raise MissingToolError(
            program, purpose=f"telling which files of {file_system} changed", remedy=_REMEDIES[program]
        )
    return found
