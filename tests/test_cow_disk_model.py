"""A disk in this process, one in the host, and a bytearray agree on everything, whatever is done to them."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cowkit import Checkpoint, CowDisk
from cowkit.diff import Qcow2Image

SIZE = 40_000


class Modes(RuleBasedStateMachine):
    folder: Path

    @initialize(block=st.sampled_from([512, 4096]), blank=st.booleans(), seed=st.integers(0, 2**32))
    def make(self, block: int, blank: bool, seed: int) -> None:
        self.random = random.Random(seed)
        path = self.folder / "base.img"
        if not path.exists():
            path.write_bytes(random.Random(0).randbytes(SIZE))
        self.model = bytearray(SIZE) if blank else bytearray(path.read_bytes())
        self.first = bytes(self.model)
        base = None if blank else path
        size = SIZE if blank else None
        self.disks = [CowDisk(base, size=size, block_size=block, server=where) for where in ("thread", "process")]
        self.points: list[tuple[list[Checkpoint], bytes]] = []

    ranges = st.tuples(st.integers(0, SIZE), st.integers(0, 12_000)).map(lambda r: (r[0], min(r[1], SIZE - r[0])))

    @rule(at=ranges)
    def write(self, at: tuple[int, int]) -> None:
        offset, length = at
        data = self.random.randbytes(length)
        for disk in self.disks:
            disk.pwrite(data, offset)
        self.model[offset : offset + length] = data

    @rule(at=ranges, trim=st.booleans())
    def clear(self, at: tuple[int, int], trim: bool) -> None:
        offset, length = at
        for disk in self.disks:
            (disk.trim if trim else disk.zero)(length, offset)
        self.model[offset : offset + length] = bytes(length)

    @rule(at=ranges)
    def cache(self, at: tuple[int, int]) -> None:
        for disk in self.disks:
            disk.cache(at[1], at[0])

    @rule()
    def checkpoint(self) -> None:
        self.points.append(([disk.checkpoint() for disk in self.disks], bytes(self.model)))

    @rule(data=st.data(), by_name=st.booleans())
    def rollback(self, data: st.DataObject, by_name: bool) -> None:
        if self.points:
            index = data.draw(st.integers(0, len(self.points) - 1))
            points, then = self.points[index]
            for disk, point in zip(self.disks, points, strict=True):
                disk.rollback(point.name if by_name else point)
            del self.points[index + 1 :]
            self.model[:] = then

    @rule()
    def reset(self) -> None:
        for disk in self.disks:
            disk.reset()
        self.points.clear()
        self.model[:] = self.first

    @rule(data=st.data())
    def since(self, data: st.DataObject) -> None:
        if self.points:
            points, _ = data.draw(st.sampled_from(self.points))
            here, there = (
                list(disk.dirty_extents(since=point)) for disk, point in zip(self.disks, points, strict=True)
            )
            assert here == there

    @rule()
    def differ(self) -> None:
        images = []
        for number, disk in enumerate(self.disks):
            disk.diff(self.folder / f"{number}.qcow2")
            images.append((self.folder / f"{number}.qcow2").read_bytes())
        assert images[0] == images[1]
        with Qcow2Image(self.folder / "0.qcow2") as image:
            assert image.size >= SIZE

    @invariant()
    def agree(self) -> None:
        here, there = self.disks
        assert here.pread(SIZE, 0) == there.pread(SIZE, 0) == bytes(self.model)
        assert list(here.dirty_extents()) == list(there.dirty_extents())
        assert here.dirty_bytes == there.dirty_bytes
        names = [[point.name for point in points] for points in (here.checkpoints, there.checkpoints)]
        assert names[0] == names[1] == [points[0].name for points, _ in self.points]

    def teardown(self) -> None:
        for disk in getattr(self, "disks", []):
            disk.close()


def test_both_modes_and_a_bytearray_agree(tmp_path: Path) -> None:
    Modes.folder = tmp_path
    run_state_machine_as_test(
        Modes,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
