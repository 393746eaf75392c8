"""What the tests of differences between foreign sources share: servers, images, and who is right about their content."""

from __future__ import annotations

import random
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cowkit.diff import DiffReport, ImageOptions
from cowkit.keeping.foreign import keep_foreign

MIB = 1 << 20


def run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def keep(now: str | Path, base: str | Path, path: Path, **options: Any) -> DiffReport:
    options.setdefault("options", ImageOptions())
    return keep_foreign(now, base, path, **options)


def write(uri: str, writes: dict[int, bytes | int]) -> None:
    """Bytes are written there, a number is how many bytes are zeroed."""
    import nbd

    client = nbd.NBD()
    client.set_uri_allow_local_file(True)
    client.connect_uri(uri)
    for offset, data in writes.items():
        if isinstance(data, int) and client.can_zero():
            client.zero(data, offset)
        elif isinstance(data, int):
            client.trim(data, offset)
        else:
            client.pwrite(data, offset)
    client.flush()
    client.shutdown()


def write_to_image(image: Path, writes: dict[int, int], *, seed: int = 1) -> None:
    """Write as many bytes at the offsets with qemu-io; a negative number of them is zeroed."""
    command = ["qemu-io", "-f", image.suffix[1:]]
    for offset, length in writes.items():
        kind = f"write -P {seed}" if length > 0 else "write -z"
        command += ["-c", f"{kind} {offset} {abs(length)}"]
    run(*command, image)


def same(image: str | Path, other: str | Path, *, format: str = "qcow2", other_format: str = "qcow2") -> None:
    """qemu-img reads the same from both, up to zeroes at the end of the longer one, and finds the first one sound."""
    run("qemu-img", "compare", "-f", format, "-F", other_format, image, other)
    if format == "qcow2":
        run("qemu-img", "check", "-q", image)


def noise_file(path: Path, size: int, *, seed: int = 1) -> Path:
    """Noise, with a hole of about a quarter in the middle."""
    chance = random.Random(seed)
    with path.open("wb") as file:
        file.write(chance.randbytes(size // 2))
        file.seek(size // 2 + size // 4)
        file.write(chance.randbytes(size - size // 2 - size // 4))
    return path


@contextmanager
def qemu_nbd(*arguments: str | Path, image: str) -> Iterator[str]:
    """qemu-nbd on a socket that is there before it is: its URI."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        uri = f"nbd://127.0.0.1:{listener.getsockname()[1]}"
        script = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 0</dev/null'
        command = ["sh", "-c", script, "sh", "qemu-nbd", "--persistent", *map(str, arguments), image]
        process = subprocess.Popen(command, stdin=listener.fileno(), stderr=subprocess.DEVNULL)
    try:
        yield uri
    finally:
        process.kill()
        process.wait()


def overlay(path: Path, on: Path, *, format: str = "raw", size: int | None = None) -> Path:
    """An empty qcow2 image on top of another."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", format, "-b", on, path, *([str(size)] if size else []))
    return path
