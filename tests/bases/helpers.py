"""What the tests of bases share: content, compressed files of several shapes, servers, and reading from several threads."""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import os
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cowkit.disk import Base, Kind

MIB = 1 << 20


def content_of(size: int, seed: int = 1) -> bytes:
    """Noise, text and holes, in pieces of a few hundred KiB."""
    chance = random.Random(seed)
    content = bytearray()
    while len(content) < size:
        length = chance.randrange(1, 300_000)
        content += chance.choice([chance.randbytes(length), bytes(length), b"base " * (length // 5)])
    return bytes(content[:size])


def write_compressed(path: Path, content: bytes, shape: str) -> Path:
    """A compressed file: ``shape`` is the format, and whether it has one block (``xz-1``) or many."""
    pieces = [content[at : at + 400_000] for at in range(0, len(content), 400_000)]
    if shape == "xz":
        path.write_bytes(content)
        xz = ["xz", "--stdout", "-1", "--block-size=400000", str(path)]
        path.write_bytes(subprocess.run(xz, check=True, capture_output=True).stdout)
    elif shape == "xz-1":
        path.write_bytes(lzma.compress(content, preset=0))
    elif shape == "xz-streams":
        path.write_bytes(b"".join(lzma.compress(piece, preset=0) for piece in pieces))
    elif shape == "gz":
        path.write_bytes(gzip.compress(content, 1))
    elif shape == "gz-members":
        path.write_bytes(b"".join(gzip.compress(piece, 1) for piece in pieces))
    elif shape == "bz2":
        path.write_bytes(bz2.compress(content, 1))
    else:
        zstd = importlib.import_module("backports.zstd")
        checksum = {zstd.CompressionParameter.checksum_flag: 1}
        if shape == "zst":
            path.write_bytes(zstd.compress(content, options=checksum))
        elif shape == "zst-frames":
            skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
            path.write_bytes(
                skippable + b"".join(zstd.compress(piece, options=checksum) for piece in pieces) + skippable
            )
        else:
            assert shape == "zst-pipe"  # the frame does not say its size
            options = {zstd.CompressionParameter.content_size_flag: 0, **checksum}
            path.write_bytes(zstd.compress(content, options=options))
    return path


SHAPES = ["xz", "xz-1", "xz-streams", "gz", "gz-members", "bz2", "zst", "zst-frames", "zst-pipe"]


def check_reads(base: Base, content: bytes, *, threads: int = 4, rounds: int = 40) -> None:
    """Random ranges, read by several threads at once, are the content's; the extents cover it, and holes are zeroes."""
    assert base.size == len(content)
    wrong: list[object] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(rounds):
                offset = chance.randrange(len(content))
                length = min(chance.choice([1, 512, 4096, 70_000, 900_000]), len(content) - offset)
                if base.pread(length, offset) != content[offset : offset + length]:
                    wrong.append((length, offset))
        except BaseException as error:
            wrong.append(error)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(threads)]
    for each in readers:
        each.start()
    for each in readers:
        each.join()
    assert wrong == []
    assert base.pread(len(content), 0) == content
    check_extents(base, content, 0, len(content))
    middle = len(content) // 3 + 1
    check_extents(base, content, middle, len(content) // 2)


def check_extents(base: Base, content: bytes, offset: int, length: int) -> int:
    """The extents cover the range in order, and holes are zeroes; how many bytes are holes."""
    place, holes = offset, 0
    for extent in base.extents(offset, length):
        assert extent.offset == place and extent.length > 0
        place = extent.end
        if extent.kind is Kind.HOLE:
            holes += extent.length
            assert not any(content[extent.offset : extent.end])
    assert place == offset + length
    return holes


@contextmanager
def nbdkit(*arguments: str | Path, unix: Path | None = None) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """nbdkit on a socket that is there before it is, so that nobody waits for it: its URI and its process."""
    listener = socket.socket(socket.AF_INET if unix is None else socket.AF_UNIX)
    with listener:
        listener.bind(("127.0.0.1", 0) if unix is None else str(unix))
        listener.listen(16)
        uri = f"nbd://127.0.0.1:{listener.getsockname()[1]}" if unix is None else f"nbd+unix:///?socket={unix}"
        script = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 0</dev/null'
        command = ["sh", "-c", script, "sh", "nbdkit", "--foreground", *map(str, arguments)]
        process = subprocess.Popen(command, stdin=listener.fileno(), stderr=subprocess.DEVNULL)
    try:
        yield uri, process
    finally:
        process.kill()
        process.wait()


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def own_threads() -> list[str]:
    """The threads that cowkit has started and that are still there."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cowkit")]


def children() -> list[str]:
    """The processes that this one has started and that are still there, zombies included."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            pass  # a thread that has just ended has none
    return found
