"""The rows about a disk's life: being ready, being created, going back in time, and the memory it takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from scripts.benchmarks.bench import Bench
from scripts.benchmarks.model import COWKIT, NBDKIT, QEMU, Experiment, Limit, Row, Times
from scripts.benchmarks.probe import probe
from scripts.benchmarks.servers import milliseconds_to_greeting

_STARTS = 7
_DISKS = 1000
_READY = 200  # the first ones take longer, until Python and the kernel have what they need at hand


def _ready_command(bench: Bench, contender: str) -> Mapping[str, float]:
    image = bench.image()
    # The first start of a program finds its files cold; whoever tests has them warm.
    taken = [milliseconds_to_greeting(contender, image, bench.new_room()) for _ in range(_STARTS)][1:]
    return {"ready-command": statistics.median(taken)}


def _ready_in_process(bench: Bench, contender: str) -> Mapping[str, float]:
    if contender == COWKIT:
        return {"ready-in-process": probe(bench, "ready", str(_READY))["milliseconds"]}
    return {"ready-in-process": _ready_command(bench, contender)["ready-command"]}


def _probed(row: str, name: str, key: str, *arguments: str) -> Callable[[Bench, str], Mapping[str, float]]:
    def measure(bench: Bench, contender: str) -> Mapping[str, float]:
        return {row: probe(bench, name, *arguments)[key]}

    return measure


def _thousand(bench: Bench, contender: str) -> Mapping[str, float]:
    found = probe(bench, "thousand", str(_DISKS))
    return {"memory-1000": found["mebibytes"], "slower-1000": found["last"]}


def _row(name: str, title: str, unit: str, *targets: Limit | Times, picture: bool = False) -> Row:
    return Row(name, title, unit, "lower", targets, picture)


EXPERIMENTS = (
    Experiment(
        "A disk's life",
        (
            _row(
                "ready-in-process",
                "a disk made and served, until a client is greeted",
                "ms",
                Limit(1),
                Times(3, NBDKIT),
                picture=True,
            ),
        ),
        (COWKIT, NBDKIT, QEMU),
        _ready_in_process,
        quick=True,
    ),
    Experiment(
        "A disk's life",
        (_row("ready-command", "the command started, until a client is greeted", "ms", Limit(120)),),
        (COWKIT, NBDKIT, QEMU),
        _ready_command,
        quick=True,
    ),
    Experiment(
        "A disk's life",
        (_row("create-close", "each of 1,000 CowDisks created and closed", "ms", Limit(0.3)),),
        (COWKIT,),
        _probed("create-close", "create", "milliseconds", str(_DISKS)),
        quick=True,
    ),
    Experiment(
        "A disk's life",
        (_row("rollback-100m", "rollback of 100 MiB", "ms", Limit(2)),),
        (COWKIT,),
        _probed("rollback-100m", "rollback", "milliseconds"),
        quick=True,
    ),
    Experiment(
        "A disk's life",
        (_row("checkpoint-64g", "checkpoint of a disk of 64 GiB", "ms", Limit(5)),),
        (COWKIT,),
        _probed("checkpoint-64g", "checkpoint", "milliseconds"),
        quick=True,
    ),
    Experiment(
        "A disk's life",
        (
            _row("memory-1000", "memory of 1,000 served disks in one process", "MiB", Limit(150)),
            # What a clock shows of two equal things differs by so much.
            _row(
                "slower-1000", "making and serving the last hundred of them, beside the first hundred", "×", Limit(1.15)
            ),
        ),
        (COWKIT,),
        _thousand,
        quick=True,
    ),
    Experiment(
        "A disk's life",
        (_row("memory-16t", "memory of a served, untouched disk of 16 TiB", "MiB", Limit(30)),),
        (COWKIT,),
        _probed("memory-16t", "huge", "mebibytes"),
        quick=True,
    ),
)
