"""Writes a raw image: the disk's bytes at the disk's offsets, and holes where there are none but zeroes."""

from __future__ import annotations

from cowkit.diff.batch import Batch
from cowkit.diff.image_output import ImageOutput


class RawWriter:
    """A raw image of ``size`` bytes, written to ``output``; :meth:`finish` completes it."""

    def __init__(self, output: ImageOutput, size: int) -> None:
        self._output = output
        self._size = size

    def add(self, batch: Batch) -> None:
        """Write the content of ``batch``."""
        for run, content in batch.pieces():
            self._output.pwrite_meanwhile(content[: self._size - run.offset], run.offset)

    def finish(self) -> None:
        """Make the file as long as the disk is."""
        self._output.truncate(self._size)
