"""What a type checker makes of the interface for tests. mypy reads this; nothing runs it."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import assert_type

import pytest

from cowkit import CowDisk
from cowkit.fixtures import factories
from cowkit.fixtures.disks import DiskFactory
from cowkit.fixtures.goldens.fixture import GoldenFactory
from cowkit.fixtures.goldens.golden import Golden
from cowkit.unittest import CowDiskMixin


def load(disk: CowDisk) -> None:
    assert_type(disk.pread(1, 0), bytes)


def build(disk: CowDisk) -> int:  # what it returns is nobody's concern
    return disk.size


def wrong(disk: str) -> None: ...


my_disk = factories.cow_disk("disk.img", load=[load], scope="session", block_size="64K")
factories.cow_disk(load=[wrong])  # type: ignore[list-item]
factories.cow_disk(scope="test")  # type: ignore[arg-type]
factories.cow_disk(3.5)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def installed(cow_golden: GoldenFactory) -> Golden:
    golden = cow_golden("installed", build, base=Path("disk.img"), depends=[Path("recipe"), 3], size="1G")
    assert_type(golden, Golden)
    assert_type(golden.size, int)
    cow_golden("installed", wrong)  # type: ignore[arg-type]
    cow_golden("on top", build, base=golden)
    return golden


def test_it(cow_disk: CowDisk, cow_disk_factory: DiskFactory, installed: Golden) -> None:
    assert_type(cow_disk_factory(installed, name="one"), CowDisk)
    assert_type(cow_disk_factory("64M"), CowDisk)
    assert_type(cow_disk_factory(None), CowDisk)
    assert_type(CowDisk(installed), CowDisk)
    cow_disk_factory(3.5)  # type: ignore[arg-type]


class Case(CowDiskMixin, unittest.TestCase):
    cow_base = "disk.img"
    cow_options = {"size": "1G"}

    def test_it(self) -> None:
        assert_type(self.cow_disk, CowDisk)
        assert_type(self.make_cow_disk(size="1M"), CowDisk)


class AsyncCase(CowDiskMixin, unittest.IsolatedAsyncioTestCase):
    async def test_it(self) -> None:
        assert_type(self.cow_disk, CowDisk)
