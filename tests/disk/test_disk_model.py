"""The disk against a simple model: a bytearray, a set of dirty blocks and copies of both for each checkpoint."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cowkit.disk import Checkpoint, Disk, FileBase, FrozenView, Kind, ZeroBase


class DiskMachine(RuleBasedStateMachine):
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.disk: Disk | None = None
        self.points: list[tuple[Checkpoint, bytes, dict[int, Kind]]] = []
        self.views: list[tuple[FrozenView, bytes, dict[int, Kind]]] = []

    @initialize(
        size=st.one_of(st.integers(1, 70_000), st.sampled_from([4096, 65536, 130_000])),
        block_shift=st.integers(9, 13),
        extra=st.sampled_from([0, 0, 1, 5000]),
        blank=st.booleans(),
        seed=st.integers(0, 2**32),
        on_cache=st.booleans(),
        on_read=st.booleans(),
    )
    def make(
        self, size: int, block_shift: int, extra: int, blank: bool, seed: int, on_cache: bool, on_read: bool
    ) -> None:
        self.block = 1 << block_shift
        self.copies = (on_cache or on_read) and not blank
        if blank:
            self.model = bytearray(size + extra)
            base: FileBase | ZeroBase = ZeroBase(size)
        else:
            content = bytearray(random.Random(seed).randbytes(size))
            content[size // 3 : size // 2] = bytes(size // 2 - size // 3)
            path = self.folder / "base.img"
            path.write_bytes(content)
            base = FileBase(path)
            self.model = content + bytearray(extra)
        self.disk = Disk(
            base,
            block_size=self.block,
            size=size + extra,
            tmpdir=self.folder,
            cow_on_cache=on_cache,
            cow_on_read=on_read,
        )
        self.dirty: dict[int, Kind] = {}
        self.size = size + extra

    def range_of(self, data: st.DataObject) -> tuple[int, int]:
        offset = data.draw(st.integers(0, self.size))
        length = data.draw(st.one_of(st.integers(0, self.size - offset), st.integers(0, min(600, self.size - offset))))
        if data.draw(st.booleans()):
            offset -= offset % self.block
            length = min(-(-length // self.block) * self.block, self.size - offset)
        return offset, length

    def touch(self, offset: int, length: int) -> None:
        if length:
            for block in range(offset // self.block, (offset + length - 1) // self.block + 1):
                self.dirty[block] = Kind.DATA

    @rule(data=st.data(), seed=st.integers(0, 2**32))
    def pwrite(self, data: st.DataObject, seed: int) -> None:
        assert self.disk
        offset, length = self.range_of(data)
        payload = random.Random(seed).randbytes(length)
        self.disk.pwrite(payload, offset)
        self.model[offset : offset + length] = payload
        self.touch(offset, length)

    @rule(data=st.data(), trim=st.booleans())
    def zero(self, data: st.DataObject, trim: bool) -> None:
        assert self.disk
        offset, length = self.range_of(data)
        (self.disk.trim if trim else self.disk.zero)(length, offset)
        end = offset + length
        self.model[offset:end] = bytes(length)
        for block in range(self.size // self.block + 1):
            start, stop = block * self.block, min((block + 1) * self.block, self.size)
            if offset <= start < stop <= end:
                self.dirty[block] = Kind.ZERO
            elif start < end and offset < stop and length and self.dirty.get(block) is not Kind.ZERO:
                if not (isinstance(self.disk.base, ZeroBase) and block not in self.dirty):
                    self.dirty[block] = Kind.DATA

    @rule(data=st.data())
    def cache(self, data: st.DataObject) -> None:
        assert self.disk
        offset, length = self.range_of(data)
        self.disk.cache(length, offset)

    @rule()
    def checkpoint(self) -> None:
        assert self.disk
        self.points.append((self.disk.checkpoint(), bytes(self.model), dict(self.dirty)))

    @precondition(lambda self: self.points)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        assert self.disk
        index = data.draw(st.integers(0, len(self.points) - 1))
        point, content, dirty = self.points[index]
        self.disk.rollback(point if data.draw(st.booleans()) else point.name)
        del self.points[index + 1 :]
        self.model, self.dirty = bytearray(content), dict(dirty)

    @rule()
    def reset(self) -> None:
        assert self.disk
        self.disk.reset()
        self.points.clear()
        self.model = bytearray(self.disk.base.pread(self.disk.base.size, 0)).ljust(self.size, b"\0")
        self.dirty.clear()

    @rule()
    def freeze(self) -> None:
        assert self.disk
        self.views.append((self.disk.freeze(), bytes(self.model), dict(self.dirty)))

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def close_view(self, data: st.DataObject) -> None:
        view, content, dirty = self.views.pop(data.draw(st.integers(0, len(self.views) - 1)))
        self.compare_view(view, content, dirty)
        view.close()

    def compare_view(self, view: FrozenView, content: bytes, dirty: dict[int, Kind]) -> None:
        assert view.pread(self.size, 0) == content
        if not self.copies:
            assert self.blocks(view) == dirty

    def blocks(self, source: Disk | FrozenView) -> dict[int, Kind]:
        found: dict[int, Kind] = {}
        end = 0
        for extent in source.dirty_extents():
            assert extent.length > 0 and extent.offset >= end and extent.end <= self.size
            end = extent.end
            for block in range(extent.offset // self.block, -(-extent.end // self.block)):
                found[block] = extent.kind
        return found

    @precondition(lambda self: self.disk)
    @invariant()
    def same(self) -> None:
        assert self.disk
        if not self.copies:
            assert self.blocks(self.disk) == self.dirty
        assert self.disk.pread(self.size, 0) == self.model
        kinds = bytearray()
        for extent in self.disk.allocation(0, self.size):
            assert extent.offset == len(kinds)
            kinds += bytes(extent.length) if extent.kind is Kind.DATA else b"\1" * extent.length
        assert len(kinds) == self.size
        assert not any(self.model[i] for i in range(self.size) if kinds[i])

    def teardown(self) -> None:
        for view, content, dirty in self.views:
            self.compare_view(view, content, dirty)
        if self.disk:
            assert self.points == [] or len(self.disk.overlay.stack) <= 2 * (len(self.points) + len(self.views)) + 2
            self.disk.close()
        for view, content, dirty in self.views:
            self.compare_view(view, content, dirty)
            view.close()


def test_a_disk_is_a_bytearray_with_checkpoints_views_and_a_dirty_map(tmp_path: Path) -> None:
    DiskMachine.folder = tmp_path
    run_state_machine_as_test(
        DiskMachine,
        settings=settings(
            max_examples=120,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=False,
        ),
    )


@pytest.mark.parametrize("block_size", [512, 4096, 65536])
def test_what_changed_since_a_checkpoint_is_what_was_touched_since(tmp_path: Path, block_size: int) -> None:
    rng = random.Random(block_size)
    size = 40 * 8192 * block_size // 8 + 777  # several chunks of the owner map
    with Disk(ZeroBase(size), block_size=block_size, tmpdir=tmp_path) as disk:
        for _ in range(50):
            disk.pwrite(b"early", rng.randrange(size - 5))
        point = disk.checkpoint()
        touched: dict[int, Kind] = {}
        for _ in range(100):
            block = rng.randrange(size // block_size)
            if rng.random() < 0.3 and touched.get(block) is not Kind.ZERO:
                before = dict.fromkeys(touched)
                disk.trim(block_size, block * block_size)
                touched[block] = Kind.ZERO
                assert set(before) <= set(touched)
            else:
                disk.pwrite(b"late", block * block_size)
                touched[block] = Kind.DATA
        found = {
            block: extent.kind
            for extent in disk.dirty_extents(since=point)
            for block in range(extent.offset // block_size, -(-extent.end // block_size))
        }
        assert found == touched
