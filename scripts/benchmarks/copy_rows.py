"""nbdcopy of a whole disk."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping

from scripts.benchmarks.bench import Bench
from scripts.benchmarks.model import BenchError, Experiment, Row
from scripts.benchmarks.servers import SERVERS, serving

_SECONDS = 120.0


def _copy(bench: Bench, contender: str) -> Mapping[str, float]:
    image = bench.image()
    with serving(contender, image, bench.new_room()) as served:
        begun = time.perf_counter()
        try:
            done = subprocess.run(
                ["nbdcopy", served.uri, "null:"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BenchError(f"nbdcopy did not end within {_SECONDS:g} s") from None
        taken = time.perf_counter() - begun
    if done.returncode:
        raise BenchError(f"nbdcopy failed: {done.stderr.strip()[-500:] or done.returncode}")
    return {"nbdcopy": os.path.getsize(image) / taken / 1e6}


EXPERIMENTS = (
    Experiment(
        "Copy",
        (Row("nbdcopy", "nbdcopy of a whole disk to null:", "MB/s", picture=True),),
        # The null plugin has no data for nbdcopy to ask for.
        tuple(name for name in SERVERS if name not in ("nbdkit-cow-4k", "nbdkit-null")),
        _copy,
        ("nbdcopy",),
        quick=True,
    ),
)
