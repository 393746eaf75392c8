"""fio with its nbd engine, the client of most rows."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.benchmarks.bench import MIB
from scripts.benchmarks.model import BenchError

_MOST_SECONDS = 60.0
"""How long fio may take beyond what it was told to."""
_MIXED_READS = 70
"""With randrw: the share of reads in per cent."""


@dataclass(frozen=True)
class Load:
    """What fio is to do. Sizes are in bytes."""

    kind: str
    """fio's word: read, write, randread, randwrite, randrw."""
    block: int
    depth: int
    """Requests in flight on each connection."""
    jobs: int = 1
    """Connections, each from a process of its own and with an equal part of the area."""
    once: bool = False
    """Whether to write each block once and then stop, however long is left."""


@dataclass(frozen=True)
class Done:
    """What came of it, all connections together."""

    requests: int
    per_second: float
    bytes_per_second: float


def run_fio(uri: str, load: Load, *, area: int, seconds: float, folder: str) -> Done:
    """Put ``load`` on the first ``area`` bytes of the export, for ``seconds``.

    :raises BenchError: fio failed.
    """
    part = area // load.jobs
    command = [
        "fio",
        "--name=bench",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--rw={load.kind}",
        f"--bs={load.block}",
        f"--iodepth={load.depth}",
        f"--numjobs={load.jobs}",
        f"--size={part}",
        f"--offset_increment={part}",
        "--group_reporting",
        "--randrepeat=1",
        f"--runtime={round(seconds * 1000)}ms",
    ]
    if not load.once:
        command.append("--time_based")
    if load.kind == "randrw":
        command.append(f"--rwmixread={_MIXED_READS}")
    return _parse(_run(command, folder, seconds + _MOST_SECONDS))


def fill(uri: str, *, area: int, folder: str, stripe: int | None = None) -> None:
    """Write each byte of the first ``area`` bytes once; with ``stripe``, of every other ``stripe`` bytes.

    :raises BenchError: fio failed.
    """
    kind, block, amount = ("write", MIB, area) if stripe is None else (f"write:{stripe}", stripe, area // 2)
    command = ["fio", "--name=fill", "--ioengine=nbd", f"--uri={uri}", f"--rw={kind}", f"--bs={block}", "--iodepth=4"]
    _run([*command, f"--size={area}", f"--io_size={amount}"], folder, _MOST_SECONDS)


def _run(command: Sequence[str], folder: str, seconds: float) -> str:
    report = os.path.join(folder, "fio.json")  # its standard output has other lines as well
    try:
        done = subprocess.run(
            [*command, "--output-format=json", f"--output={report}"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"fio did not end within {seconds:g} s") from None
    said = (done.stderr + done.stdout).strip()
    if done.returncode:
        raise BenchError(f"fio failed: {said[-500:] or done.returncode}")
    with open(report) as file:
        return file.read()


def _parse(text: str) -> Done:
    try:
        # Lines of its own may stand before the object.
        job = json.loads(text[text.index("{") :])["jobs"][0]
    except (ValueError, LookupError):
        raise BenchError(f"fio's report cannot be read: {text[:200]!r}") from None
    ways = [job["read"], job["write"]]
    requests = sum(way["total_ios"] for way in ways)
    if job["error"] or not requests:
        raise BenchError(f"fio did not do a single request (error {job['error']})")
    return Done(requests, sum(way["iops"] for way in ways), sum(way["bw_bytes"] for way in ways))
