"""The mixin for ``unittest``, run by unittest itself; and disks among asyncio's tasks."""

from __future__ import annotations

import asyncio
import unittest
from pathlib import Path

import pytest

from cowkit import CowDisk
from cowkit.errors import UsageError
from cowkit.unittest import CowDiskMixin


def run(case: type[unittest.TestCase]) -> unittest.TestResult:
    return unittest.defaultTestLoader.loadTestsFromTestCase(case).run(unittest.TestResult())


@pytest.mark.parametrize("server", ["thread", "process"])
def test_each_test_has_a_disk_of_its_own_that_is_closed_at_its_end(tmp_path: Path, server: str) -> None:
    (tmp_path / "disk.img").write_bytes(b"base".ljust(8192, b"\0"))
    disks: list[CowDisk] = []

    class Case(CowDiskMixin, unittest.TestCase):
        cow_base = tmp_path / "disk.img"
        cow_options = {"size": "1M", "server": server}

        def test_one(self) -> None:
            disks.append(self.cow_disk)
            assert self.cow_disk is disks[-1]
            assert (self.cow_disk.pread(4, 0), self.cow_disk.size) == (b"base", 1 << 20)
            self.cow_disk.pwrite(b"ruin", 0)

        test_two = test_one

        def test_more(self) -> None:
            disks.append(self.make_cow_disk())
            assert disks[-1].size == 64 << 20
            raise AssertionError

    result = run(Case)
    assert (result.testsRun, len(result.failures), result.errors) == (3, 1, [])
    assert len(set(map(id, disks))) == 3
    assert all(disk.closed for disk in disks)


def test_a_base_that_changed_meanwhile_is_an_error_of_the_test(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(8192))

    class Case(CowDiskMixin, unittest.TestCase):
        cow_base = tmp_path / "disk.img"

        def test_one(self) -> None:
            assert self.cow_disk.size == 8192
            (tmp_path / "disk.img").write_bytes(bytes(4096))

        def test_other(self) -> None:
            pass

    result = run(Case)
    assert (result.testsRun, len(result.errors)) == (2, 1)
    assert "BaseChangedError" in result.errors[0][1]


def test_a_test_of_asyncio_uses_a_disk_without_holding_up_its_loop() -> None:
    class Case(CowDiskMixin, unittest.IsolatedAsyncioTestCase):
        cow_options = {"size": "1M"}

        async def test_it(self) -> None:
            disk = self.cow_disk
            reader, writer = await asyncio.open_unix_connection(disk.socket)
            assert (await reader.readexactly(8)) == b"NBDMAGIC"
            await asyncio.gather(*(asyncio.to_thread(disk.pwrite, bytes([n]) * 4096, n << 12) for n in range(16)))
            found = await asyncio.gather(*(asyncio.to_thread(disk.pread, 1, n << 12) for n in range(16)))
            assert found == [bytes([n]) for n in range(16)]
            writer.close()
            await writer.wait_closed()

    result = run(Case)
    assert (result.testsRun, result.failures, result.errors) == (1, [], [])


def test_options_that_there_are_not_are_named() -> None:
    class Case(CowDiskMixin, unittest.TestCase):
        cow_options = {"sise": 1}

        def test_class(self) -> None:
            with pytest.raises(UsageError, match="cow_options has no argument sise: it has size, "):
                self.cow_disk.flush()

        def test_call(self) -> None:
            with pytest.raises(UsageError, match="make_cow_disk has no argument sise: it has size, "):
                self.make_cow_disk(sise=1)

    class NoMapping(CowDiskMixin, unittest.TestCase):
        cow_options = ["size"]  # type: ignore[assignment]

        def test_it(self) -> None:
            with pytest.raises(UsageError, match=r"cow_options is a dict of CowDisk's options, .* not "):
                self.cow_disk.flush()

    for case in (Case, NoMapping):
        assert run(case).wasSuccessful()
