"""nbdcopy of a whole disk."""

from __future__ import annotations

import os
from collections.abc import Mapping

from scripts.benchmarks.bench import Bench
from scripts.benchmarks.model import NBDKIT_4K, Experiment, Row
from scripts.benchmarks.servers import SERVERS, serving
from scripts.benchmarks.timing import timed


def _copy(bench: Bench, contender: str) -> Mapping[str, float]:
    image = bench.image()
    with serving(contender, image, bench.new_room()) as served:
        taken, _ = timed(["nbdcopy", served.uri, "null:"], served.room.folder)
    return {"nbdcopy": os.path.getsize(image) / (taken / 1e3) / 1e6}


EXPERIMENTS = (
    Experiment(
        "Copy",
        (Row("nbdcopy", "nbdcopy of a whole disk to null:", "MB/s", picture=True),),
        # The null plugin has no data for nbdcopy to ask for.
        tuple(name for name in SERVERS if name not in (NBDKIT_4K, "nbdkit-null")),
        _copy,
        ("nbdcopy",),
        quick=True,
    ),
)
