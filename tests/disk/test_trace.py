"""The last changes of a disk are known, in their order, and no more of them than were asked for."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from cowkit import CowDisk
from cowkit.disk import Disk, ZeroBase
from cowkit.errors import UsageError


def told(disk: CowDisk) -> list[str]:
    return [" ".join(str(event).split()[1:]) for event in disk.trace]


@pytest.mark.requires(modules=["nbd"])
@pytest.mark.parametrize("where", ["thread", "process"])
def test_what_clients_and_calls_do_is_told_in_order(where: str) -> None:
    import nbd

    with CowDisk(size="1M", trace=100, server=where) as disk:  # type: ignore[arg-type]
        disk.pwrite(b"abc", 5)
        disk.checkpoint("here")
        client = nbd.NBD()
        client.connect_uri(disk.uri)
        client.pwrite(bytes(4096), 8192)
        client.pwrite(bytes(1 << 19), 0)
        client.trim(4096, 0)
        client.zero(100, 50)
        client.flush()
        client.pread(512, 0)
        client.shutdown()
        disk.flush()
        disk.rollback("here")
        disk.reset()
        assert told(disk) == [
            *("write 5+3", "checkpoint here", "write 8192+4096", "write 0+524288", "zero 0+4096", "zero 50+100"),
            *("flush", "flush", "rollback here", "reset"),
        ]
        times = [event.seconds for event in disk.trace]
        assert times == sorted(times)


def test_the_oldest_are_forgotten_first() -> None:
    with CowDisk(size="1M", trace=2) as disk:
        for number in range(5):
            disk.pwrite(b"x", number)
        assert told(disk) == ["write 3+1", "write 4+1"]


def test_a_write_that_fails_is_told_too(tmp_path: Path) -> None:
    with CowDisk(size="1M", trace=9) as disk:
        disk.engine.overlay.directory = str(tmp_path / "gone")
        with pytest.raises(Exception, match="gone"):
            disk.pwrite(b"x", 0)
        assert told(disk) == ["write 0+1"]


@pytest.mark.parametrize("where", ["thread", "process"])
def test_a_closed_disk_that_keeps_its_last_state_has_its_trace(where: str) -> None:
    disk = CowDisk(size="1M", trace=9, server=where)  # type: ignore[arg-type]
    disk.keep_last_state()
    disk.pwrite(b"x", 0)
    disk.close()
    assert told(disk) == ["write 0+1"]
    disk.forget_last_state()


def test_a_disk_without_a_trace_has_none_and_its_own_methods() -> None:
    with CowDisk(size="1M") as disk:
        disk.pwrite(b"x", 0)
        assert disk.trace == []
        assert not {"write", "zero"} & set(vars(disk.engine.overlay))


def test_a_closed_disk_is_not_kept_alive_by_its_trace() -> None:
    disk = Disk(ZeroBase(1 << 20), trace=9)
    disk.pwrite(b"x", 0)
    overlay = weakref.ref(disk.overlay)
    disk.close()
    gc.disable()
    try:
        del disk
        assert overlay() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("trace", [-1, 1_000_001, True, "many"])
def test_a_length_that_makes_no_sense_is_refused(trace: int) -> None:
    with pytest.raises(UsageError, match="trace is how many events to keep, from 0 to 1000000"):
        CowDisk(size="1M", trace=trace)
