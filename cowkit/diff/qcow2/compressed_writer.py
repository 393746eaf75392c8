"""Writes images with compressed clusters, one behind the other from byte to byte.

Several of them share a cluster of the file, whose refcount is the number of those that touch it. They are compressed by
several threads, since the libraries let go of the interpreter, and written in order. What does not get smaller is
written as it is.
"""

from __future__ import annotations

import os
import struct
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

from cowkit.diff.batch import Batch, Run
from cowkit.diff.image_output import ImageOutput
from cowkit.diff.qcow2.compression import compressor
from cowkit.diff.qcow2.layout import (
    COMPRESSED,
    COMPRESSED_UNIT,
    COMPRESSION_TYPES,
    ENTRY,
    REFCOUNT_BYTES,
    Bitmaps,
    Geometry,
    up,
)
from cowkit.diff.qcow2.writer import Qcow2Writer
from cowkit.disk.extent import Kind

_AHEAD = 4
"""How many clusters wait for each thread."""


class _Pending(NamedTuple):
    run: Run
    content: bytes
    compressed: Future[bytes] | None


class CompressedWriter(Qcow2Writer):
    """An image whose clusters are compressed by ``method``; a context manager, which ends its threads.

    :raises MissingToolError: the library that it needs is not installed.
    """

    def __init__(
        self, output: ImageOutput, shape: Geometry, *, backing_file: bytes | None, backing_format: str, method: str
    ) -> None:
        super().__init__(output, shape, backing_file=backing_file, backing_format=backing_format)
        self.compression = COMPRESSION_TYPES.index(method)
        self._compress: Callable[[bytes], bytes] = compressor(method)
        workers = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="cowkit-diff-compress")
        self._most = workers * _AHEAD
        self._pending: deque[_Pending] = deque()
        self._free = self._free_end = 0
        """What is left of the last clusters that compressed ones were put into."""
        self._users: Counter[int] = Counter()
        """How many compressed clusters touch a cluster of the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, batch: Batch) -> None:
        """Have the clusters of ``batch`` compressed and written; batches come in the disk's order."""
        size = self.shape.cluster_size
        at = 0
        for run in batch.runs:
            if run.kind is Kind.ZERO:
                self._pending.append(_Pending(run, b"", None))
                continue
            for offset in range(run.offset, run.offset + run.length, size):
                content = bytes(batch.data[at : at + size])
                at += size
                job = self._pool.submit(self._compress, content)
                self._pending.append(_Pending(Run(offset, size, Kind.DATA), content, job))
                self._write(self._most)
        self._write(self._most)

    def finish(self, bitmaps: Bitmaps | None = None) -> None:
        """Write what is still being compressed, the tables and the header."""
        self._write(0)
        super().finish(bitmaps)

    def _write(self, most: int) -> None:
        """Write what comes first until ``most`` are left."""
        while len(self._pending) > most:
            run, content, compressed = self._pending.popleft()
            data = content if compressed is None else compressed.result()
            if compressed is None:
                self._map(run.offset, run.length, run.kind, 0)
            elif len(data) >= len(content):
                host = self.allocate(run.length)
                self.put(host, content)
                self._map(run.offset, run.length, run.kind, host)
            else:
                ((index, _),) = self._entries(run.offset, run.length)
                ENTRY.pack_into(self._l2, index * ENTRY.size, self._put_compressed(data))

    def _put_compressed(self, data: bytes) -> int:
        """Write a compressed cluster; returns its L2 entry ("Compressed Clusters Descriptor")."""
        size = self.shape.cluster_size
        if self._free + len(data) > self._free_end:
            more = self.allocate(0)
            if more != self._free_end:  # something else lies behind what is left
                self._free = more
            self._free_end = up(self._free + len(data), size)
            self.allocate(self._free_end - more)
        host = self._free
        self._free += len(data)
        self.put(host, data)
        last = host + len(data) - 1
        self._users.update(range(host // size, last // size + 1))
        sectors = last // COMPRESSED_UNIT - host // COMPRESSED_UNIT
        return COMPRESSED | sectors << self.shape.compressed_offset_bits | host

    def _count(self, refcounts: bytearray) -> None:
        # Never over 65,535: a cluster of 2 MiB that compresses best takes 80 bytes and more.
        for cluster, users in self._users.items():
            struct.pack_into(">H", refcounts, cluster * REFCOUNT_BYTES, users)
