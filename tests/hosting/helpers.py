"""What the tests of the host process share."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cowkit import CowDisk
from cowkit.hosting.process import Host

ROOT = Path(__file__).resolve().parent.parent.parent


def host_of(disk: CowDisk) -> Host:
    assert disk._hosted is not None
    return disk._hosted._host


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def runtime() -> Iterator[Path]:
    """A short directory to be COWKIT_RUNTIME_DIR."""
    with tempfile.TemporaryDirectory(prefix="cow") as folder:
        yield Path(folder)


@contextmanager
def program(source: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A Python program that uses disks, with pipes to it."""
    environment = os.environ | {"COWKIT_RUNTIME_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
