"""Standard output that says its name where it cannot be written: a full disk, a closed terminal.

The system's error has none, and it may come of any print(): of the first one where nothing is buffered (PYTHONUNBUFFERED), of
one in the middle where there is more than a buffer holds.
"""

from __future__ import annotations

import io
import sys

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

NAME = "standard output"


class _Named(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:  # whoever reads it has had enough: that is no failure, and needs no name
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, NAME) from error


def name_standard_output() -> None:
    """Have errors of ``sys.stdout`` be about "standard output", unless it is closed or somebody's own object."""
    before = sys.stdout
    if type(before) is not io.TextIOWrapper:
        return
    before.flush()
    raw = _Named(before.fileno(), "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        raw if before.write_through else io.BufferedWriter(raw),  # as Python itself does it
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )
