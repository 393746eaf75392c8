"""The compressions of qcow2 clusters, each bit for bit as QEMU reads it."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any

from cowkit.errors import MissingToolError, with_pip

_WINDOW_BITS = -12
"""Raw deflate with a window of 4 KiB, which is all that QEMU's reader keeps ("Compressed Clusters Descriptor")."""

_NEEDS_BACKPORT = "compressing or reading clusters by zstd"


def compressor(name: str) -> Callable[[bytes], bytes]:
    """What compresses a cluster by ``name``, one of :data:`cowkit.diff.qcow2.layout.COMPRESSION_TYPES`; for any thread.

    :raises MissingToolError: the library that it needs is not installed.
    """
    if name == "zlib":
        return _deflate
    compress: Callable[[bytes], bytes] = _zstd().compress
    return compress


def decompress(name: str, data: bytes, size: int) -> bytes:
    """The first ``size`` bytes of what was compressed to ``data``, behind which there may be anything; fewer if there are fewer.

    :raises MissingToolError: the library that it needs is not installed.
    :raises ValueError: it cannot be decompressed.
    """
    if name == "zlib":
        try:
            return zlib.decompressobj(_WINDOW_BITS).decompress(data, size)
        except zlib.error as error:
            raise ValueError(str(error)) from error
    library = _zstd()
    decoder = library.ZstdDecompressor()
    try:
        return bytes(decoder.decompress(data, size))
    except library.ZstdError as error:
        raise ValueError(str(error)) from error


def _deflate(data: bytes) -> bytes:
    machine = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _WINDOW_BITS)
    return machine.compress(data) + machine.flush()


def _zstd() -> Any:
    """Python's own module, or its backport before 3.14."""
    try:
        return importlib.import_module("compression.zstd")
    except ImportError:
        pass
    try:
        return importlib.import_module("backports.zstd")
    except ImportError as error:
        raise MissingToolError("backports.zstd", purpose=_NEEDS_BACKPORT, remedy=with_pip("backports.zstd")) from error
