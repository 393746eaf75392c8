"""Where programs from outside are looked for: on PATH, and then where the system has those of its administrator."""

from __future__ import annotations

import os
import shutil

_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
"""Where Debian has e2fsprogs, for one: an ordinary user's PATH is without."""


def find_program(name: str) -> str | None:
    """Where the program is; None where it is in none of the folders."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_PATH}")


def folder_off_path(name: str) -> str | None:
    """The folder that the program is in, where it is here and not on PATH: its bare name starts it in no shell and no test."""
    if shutil.which(name) is not None:
        return None
    found = find_program(name)
    return None if found is None else os.path.dirname(found)
