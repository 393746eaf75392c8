"""Another name for the file that is being written, for programs that write it.

The temporary file's own name would do, but for three things: some formats have the file's name in them (VMDK's descriptor);
messages have it, and users know another; and QMP carries no name that is no text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cowkit.diff.output import AtomicOutput
from cowkit.errors import OutputError


@contextmanager
def linked(output: AtomicOutput, directory: str) -> Iterator[str]:
    """The path of a symbolic link to what ``output`` writes, in ``directory``, called as the file is going to be."""
    name = os.path.basename(output.target)
    try:
        name.encode()
    except UnicodeEncodeError:
        name = "image"
    path = os.path.join(directory, name)
    try:
        os.symlink(output.temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {output.path}: a link in {directory}: {error.strerror}") from error
    try:
        yield path
    finally:
        with suppress(OSError):
            os.unlink(path)
