"""Measurements within one Python process, each in a fresh one: `python -m scripts.benchmarks.probes NAME IMAGE FOLDER ...`.

Each prints one line of JSON. What it imports before cowkit is little, since memory is counted from there.
"""

from __future__ import annotations

import json
import random
import resource
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from scripts.benchmarks.processes import own_memory

if TYPE_CHECKING:
    from cowkit import CowDisk

MIB = 1 << 20
_BLOCK = 4096
_DIRTY = 100 * MIB
_POINTS = 7
_HUNDRED = 100


def create(image: str, folder: str, count: str) -> dict[str, float]:
    """Disks of the image created and closed one after the other: milliseconds each."""
    from cowkit import CowDisk

    CowDisk(image, tmpdir=folder).close()  # the imports
    begun = time.perf_counter()
    for _ in range(int(count)):
        CowDisk(image, tmpdir=folder).close()
    return {"milliseconds": (time.perf_counter() - begun) * 1e3 / int(count)}


def ready(image: str, folder: str, count: str) -> dict[str, float]:
    """From the creation of a disk to the first byte of its server's greeting: milliseconds, the median."""
    from cowkit import CowDisk

    taken = []
    for _ in range(int(count) + 1):
        begun = time.perf_counter()
        with CowDisk(image, tmpdir=folder) as disk:
            _greet(disk)
            taken.append((time.perf_counter() - begun) * 1e3)
    return {"milliseconds": statistics.median(taken[1:]), "first": taken[0]}  # the first pays for the imports


def _greet(disk: CowDisk) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(disk.socket)
        client.recv(1)


def rollback(image: str, folder: str) -> dict[str, float]:
    """A rollback of 100 MiB in blocks of 4 KiB all over the disk, and the next write: milliseconds, the median."""
    from cowkit import CowDisk

    taken = []
    data = random.randbytes(_BLOCK)
    with CowDisk(image, tmpdir=folder) as disk:
        point = disk.checkpoint()
        for _ in range(_POINTS):
            for block in random.sample(range(disk.size // _BLOCK), _DIRTY // _BLOCK):
                disk.pwrite(data, block * _BLOCK)
            begun = time.perf_counter()
            disk.rollback(point)
            disk.pwrite(data, 0)  # what is put off until then counts, too
            taken.append((time.perf_counter() - begun) * 1e3)
    return {"milliseconds": statistics.median(taken)}


def checkpoint(image: str, folder: str) -> dict[str, float]:
    """A checkpoint of 64 GiB, a thousand blocks written since the one before, and the next write: milliseconds, the median."""
    from cowkit import CowDisk

    taken = []
    data = random.randbytes(_BLOCK)
    with CowDisk(size="64G", tmpdir=folder) as disk:
        for _ in range(_POINTS):
            for block in random.sample(range(disk.size // _BLOCK), 1000):
                disk.pwrite(data, block * _BLOCK)
            begun = time.perf_counter()
            disk.checkpoint()
            disk.pwrite(data, 0)
            taken.append((time.perf_counter() - begun) * 1e3)
    return {"milliseconds": statistics.median(taken)}


def thousand(image: str, folder: str, count: str) -> dict[str, float]:
    """Disks served at once from one process: the memory they take, and the last hundred's creation beside the first's."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    before = own_memory()
    from cowkit import CowDisk

    with CowDisk(image, tmpdir=folder) as disk:  # the imports
        _greet(disk)
    disks, taken = [], []
    for _ in range(int(count)):
        begun = time.perf_counter()
        disk = CowDisk(image, tmpdir=folder)
        disk.socket  # noqa: B018 - the server starts here
        taken.append(time.perf_counter() - begun)
        disks.append(disk)
    grown = own_memory() - before
    for disk in disks:
        disk.close()
    last, first = statistics.median(taken[-_HUNDRED:]), statistics.median(taken[:_HUNDRED])
    return {"mebibytes": grown / MIB, "last": last / first}


def huge(image: str, folder: str) -> dict[str, float]:
    """The memory that a served disk of 16 TiB takes before anything is written, cowkit's own included: MiB."""
    before = own_memory()
    from cowkit import CowDisk

    with CowDisk(size="16T", tmpdir=folder) as disk:
        _greet(disk)
        return {"mebibytes": (own_memory() - before) / MIB}


def serve(image: str, folder: str, mode: str, company: str) -> dict[str, float]:
    """Serve the image until standard input ends; ``company`` "busy" has a thread count meanwhile, "quiet" has not."""
    from cowkit import CowDisk

    options: dict[str, Any] = {} if mode == "thread" else {"server": mode}
    with CowDisk(image, tmpdir=folder, **options) as disk:
        ended = threading.Event()
        counter = threading.Thread(target=_count, args=(ended,))
        print(disk.uri, flush=True)
        if company == "busy":
            counter.start()
        sys.stdin.read()
        ended.set()
        if company == "busy":
            counter.join()
    return {}


def _count(ended: threading.Event) -> None:
    """What a test that computes something does to the interpreter."""
    number = 0
    while not ended.is_set():
        for _ in range(100_000):
            number += 1


def modes(image: str, folder: str) -> dict[str, float]:
    """Whether ``CowDisk(server="process")`` is there: 1 or 0."""
    from cowkit import CowDisk

    options: dict[str, Any] = {"server": "process"}
    try:
        CowDisk(size="1M", tmpdir=folder, **options).close()
    except TypeError:
        return {"process": 0}
    return {"process": 1}


_PROBES: dict[str, Callable[..., dict[str, float]]] = {
    each.__name__: each for each in (create, ready, rollback, checkpoint, thousand, huge, serve, modes)
}

if __name__ == "__main__":
    print(json.dumps(_PROBES[sys.argv[1]](*sys.argv[2:])))
