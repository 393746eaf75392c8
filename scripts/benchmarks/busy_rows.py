"""A server in the test's own process beside a thread that computes: how much of its speed is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from scripts.benchmarks.bench import Bench
from scripts.benchmarks.fio import Load, run_fio
from scripts.benchmarks.model import COWKIT, Experiment, Limit, Row, UnavailableError
from scripts.benchmarks.probe import probe, started

RECOMMENDED = "process"
"""The `server=` that the documentation recommends beside a busy thread: the target is for that one."""
_TARGET = 0.45

_LOADS = (
    ("read-d1", "4 KiB random read, depth 1", Load("randread", 4096, 1)),
    ("read-d32", "4 KiB random read, depth 32", Load("randread", 4096, 32)),
    ("fresh-d32", "4 KiB random write, fresh blocks, depth 32", Load("randwrite", 4096, 32, once=True)),
)


def _speed(bench: Bench, mode: str, company: str, load: Load) -> float:
    with bench.new_room() as room, started(bench, "serve", mode, company) as child:
        uri = child.line()
        return run_fio(uri, load, area=bench.area, seconds=bench.seconds, folder=room.folder).per_second


def _share(name: str, mode: str, load: Load) -> Callable[[Bench, str], Mapping[str, float]]:
    def measure(bench: Bench, contender: str) -> Mapping[str, float]:
        if mode == "process" and not probe(bench, "modes")["process"]:
            raise UnavailableError("this version has no CowDisk(server='process')")
        quiet = _speed(bench, mode, "quiet", load)
        busy = _speed(bench, mode, "busy", load)
        return {name: busy / quiet, f"{name}-speed": busy}

    return measure


def _experiments() -> list[Experiment]:
    found = []
    for mode in ("thread", "process"):
        for suffix, title, load in _LOADS:
            name = f"busy-{mode}-{suffix}"
            targets = (Limit(_TARGET),) if mode == RECOMMENDED else ()
            rows = (
                Row(name, f'server="{mode}" beside a busy thread, share of a quiet one: {title}', "×", targets=targets),
                Row(f"{name}-speed", f'server="{mode}" beside a busy thread: {title}', "req/s"),
            )
            quick = suffix == "read-d32"
            found.append(Experiment("Beside a busy thread", rows, (COWKIT,), _share(name, mode, load), ("fio",), quick))
    return found


EXPERIMENTS = tuple(_experiments())
