"""The rows that fio measures: requests each second, or bytes, and the server's processor time for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from scripts.benchmarks.bench import GIB, MIB, Bench
from scripts.benchmarks.fio import Load, fill, run_fio
from scripts.benchmarks.model import COWKIT, NBDKIT, NBDKIT_4K, QEMU, Experiment, Row, Target, Times
from scripts.benchmarks.processes import cpu_seconds, wait_until_idle
from scripts.benchmarks.servers import SERVERS, serving

_WRITTEN_AREA = GIB // 4
"""What is rewritten, in bytes; written in whole before."""

_PEERS = {COWKIT, NBDKIT, QEMU}

Before = Literal["nothing", "filled", "striped"]
"""What was written before: nothing, the whole area, or every other 64 KiB of it."""


def _experiment(
    group: str,
    row: Row,
    load: Load,
    *,
    before: Before = "nothing",
    tcp: bool = False,
    cpu: Row | None = None,
    quick: bool = False,
    main: bool = True,
) -> Experiment:
    """:param main: whether all servers take part, and not only the two that come nearest to cowkit in what they do."""

    def measure(bench: Bench, contender: str) -> Mapping[str, float]:
        image = bench.image()
        area = bench.area if before == "nothing" else min(_WRITTEN_AREA, bench.area)
        room = bench.new_room()
        with serving(contender, image, room, tcp=tcp) as served:
            if before == "filled":
                fill(served.uri, area=area, folder=room.folder)
            elif before == "striped":
                fill(served.uri, area=area, folder=room.folder, stripe=65536)
            wait_until_idle(served.child.pid)
            used = cpu_seconds(served.child.pid)
            done = run_fio(served.uri, load, area=area, seconds=bench.seconds, folder=room.folder)
            used = cpu_seconds(served.child.pid) - used
        values = {row.name: done.per_second if row.unit == "req/s" else done.bytes_per_second / 1e6}
        if cpu is not None:
            values[cpu.name] = used / done.requests * 1e6
        return values

    return Experiment(
        group,
        (row,) if cpu is None else (row, cpu),
        tuple(name for name in SERVERS if (main or name in _PEERS) and _takes_part(name, load, before)),
        measure,
        ("fio",),
        quick,
    )


def _takes_part(name: str, load: Load, before: Before) -> bool:
    server = SERVERS[name]
    if name == NBDKIT_4K:  # the block's size matters where less than a block is written
        return load.kind == "randwrite"
    if server.separate:  # what another connection has written is not there
        return load.jobs == 1 and before == "nothing"
    return True


def _small() -> list[Experiment]:
    kinds: tuple[tuple[str, str, str, Before], ...] = (
        ("read", "read", "randread", "nothing"),
        ("rewrite", "write, blocks already written", "randwrite", "filled"),
        ("fresh", "write, fresh blocks", "randwrite", "nothing"),
    )
    loads = (
        ("d1", "depth 1", 1, 1),
        ("d8", "depth 8", 8, 1),
        ("d32", "depth 32", 32, 1),
        ("c4", "4 × depth 16", 16, 4),
    )
    found = []
    for short, what, kind, before in kinds:
        for suffix, at, depth, jobs in loads:
            targets: tuple[Target, ...] = (Times(1.4 if suffix == "d32" else 2, NBDKIT), Times(3, QEMU))
            if suffix == "d8":  # none but qemu-nbd's was agreed on
                targets = (Times(3, QEMU),)
            row = Row(
                f"{short}-4k-{suffix}", f"4 KiB random {what}, {at}", "req/s", targets=targets, picture=suffix != "d8"
            )
            cpu = None
            if suffix == "d32":
                level = 3 if short == "read" else 2
                title = f"server CPU for each 4 KiB {what}, {at}"
                cpu = Row(f"cpu-{short}-4k", title, "µs", "lower", (Times(level, NBDKIT),))
            load = Load(kind, 4096, depth, jobs, once=short == "fresh")
            found.append(
                _experiment(
                    "4 KiB random",
                    row,
                    load,
                    before=before,
                    cpu=cpu,
                    quick=suffix != "d8" and short != "rewrite",
                    main=suffix != "d8",
                )
            )
    return found


def _large() -> list[Experiment]:
    found = []
    for size, block in (("256k", 256 * 1024), ("1m", MIB)):
        for short, what, kind, before in (
            ("read", "read", "read", "nothing"),
            ("rewrite", "write, blocks already written", "write", "filled"),
            ("fresh", "write, fresh blocks", "write", "nothing"),
        ):
            name = "256 KiB" if size == "256k" else "1 MiB"
            row = Row(
                f"{short}-{size}",
                f"{name} sequential {what}, depth 8",
                "MB/s",
                targets=(Times(1.0 if short == "fresh" else 1.15, NBDKIT),),
                picture=size == "256k",
            )
            load = Load(kind, block, 8, once=short == "fresh")
            found.append(_experiment("Sequential", row, load, before=before, quick=size == "256k", main=size == "256k"))  # type: ignore[arg-type]
    return found


def _others() -> list[Experiment]:
    mixed = Row("mixed-4k-d32", "4 KiB random, 70 % reads, depth 32", "req/s")
    striped = Row("striped-256k", "256 KiB sequential read, every other 64 KiB written, depth 8", "MB/s")
    return [
        _experiment("Others", mixed, Load("randrw", 4096, 32), main=False),
        _experiment("Others", striped, Load("read", 256 * 1024, 8), before="striped", main=False),
    ]


def _tcp() -> list[Experiment]:
    found = []
    for name, title, load in (
        ("tcp-read-4k-d1", "4 KiB random read, depth 1, TCP", Load("randread", 4096, 1)),
        ("tcp-read-4k-d32", "4 KiB random read, depth 32, TCP", Load("randread", 4096, 32)),
        ("tcp-fresh-4k-d32", "4 KiB random write, fresh blocks, depth 32, TCP", Load("randwrite", 4096, 32, once=True)),
        ("tcp-read-4k-c4", "4 KiB random read, 4 × depth 16, TCP", Load("randread", 4096, 16, 4)),
        ("tcp-read-256k", "256 KiB sequential read, depth 8, TCP", Load("read", 256 * 1024, 8)),
        (
            "tcp-fresh-256k",
            "256 KiB sequential write, fresh blocks, depth 8, TCP",
            Load("write", 256 * 1024, 8, once=True),
        ),
    ):
        unit = "req/s" if "-4k" in name else "MB/s"
        found.append(
            _experiment(
                "TCP loopback", Row(name, title, unit), load, tcp=True, quick=name == "tcp-read-4k-d32", main=False
            )
        )
    return found


EXPERIMENTS = (*_small(), *_large(), *_others(), *_tcp())
