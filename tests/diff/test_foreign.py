"""The view of two sources that are compared: it finds each block that differs, and no other, whatever their holes and sizes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowkit.diff import ImageOptions, write_diff
from cowkit.diff import foreign as foreign_module
from cowkit.diff import pieces as pieces_module
from cowkit.diff.foreign import ForeignView
from cowkit.disk import Base, Extent, FileBase, Kind, ZeroBase
from cowkit.errors import BaseChangedError, BaseError
from tests.diff.helpers import make_base, noise, read_with_cowkit

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the disks of these tests were large ones."""
    monkeypatch.setattr(pieces_module, "PIECE", 32768)
    monkeypatch.setattr(foreign_module, "PIECE", 32768)
    monkeypatch.setattr(foreign_module, "_COARSE", 8192)
    monkeypatch.setattr(pieces_module, "_SHORT", 8192)


def blocks_that_differ(now: bytes, base: bytes) -> set[int]:
    base = base[: len(now)].ljust(len(now), b"\0")
    return {at // BLOCK for at in range(0, len(now), BLOCK) if now[at : at + BLOCK] != base[at : at + BLOCK]}


def blocks_of(extents: list[Extent], size: int) -> set[int]:
    """The blocks of extents that are in order, and in whole blocks."""
    end = 0
    found: set[int] = set()
    for extent in extents:
        assert extent.offset >= end and extent.offset % BLOCK == 0
        end = extent.end
        assert end == size or end % BLOCK == 0
        found.update(range(extent.offset // BLOCK, -(-end // BLOCK)))
    return found


sizes = st.one_of(st.integers(0, 200_000), st.sampled_from([4096, 65536, 65537, 130_000, 131_072]))
writes = st.lists(
    st.tuples(st.integers(0, 200_000), st.integers(1, 40_000), st.integers(0, 3)),
    max_size=6,
)
"""Where, how much, and which content: 0 is zeroes."""


def with_writes(content: bytes, size: int, done: list[tuple[int, int, int]]) -> bytes:
    data = bytearray(content[:size].ljust(size, b"\0"))
    for offset, length, seed in done:
        length = max(0, min(length, size - offset))
        data[offset : offset + length] = noise(length, seed) if seed else bytes(length)
    return bytes(data)


def sparse_file(path: Path, content: bytes) -> Path:
    """Holes where there are 4096 zeroes at a multiple of that."""
    blocks = {at: content[at : at + BLOCK] for at in range(0, len(content), BLOCK)}
    return make_base(path, len(content), {at: data for at, data in blocks.items() if any(data)})


class Case:
    def __init__(self, place: Path, now: bytes, base: bytes, *, sparse: bool) -> None:
        def make(name: str, data: bytes) -> Path:
            path = place / name
            if sparse:
                return sparse_file(path, data)
            path.write_bytes(data)
            return path

        self.now, self.base = FileBase(make("now", now)), FileBase(make("base", base))


two_files = given(
    base_size=sizes,
    now_size=sizes,
    base_writes=writes,
    now_writes=writes,
    sparse=st.booleans(),
    cluster=st.sampled_from([4096, 16384, 65536]),
)


@pytest.mark.usefixtures("small_pieces")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@two_files
def test_any_two_files_are_told_apart_exactly(**case: Any) -> None:
    check_two_files(**case)


@pytest.mark.slow
@pytest.mark.usefixtures("small_pieces")
@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@two_files
def test_many_more_files_are_told_apart_exactly(**case: Any) -> None:
    check_two_files(**case)


def check_two_files(
    base_size: int,
    now_size: int,
    base_writes: list[tuple[int, int, int]],
    now_writes: list[tuple[int, int, int]],
    sparse: bool,
    cluster: int,
) -> None:
    base = with_writes(b"", base_size, base_writes)
    now = with_writes(base, now_size, now_writes)
    with TemporaryDirectory() as made:
        place = Path(made)
        case = Case(place, now, base, sparse=sparse)
        with ForeignView(case.now, case.base) as view:
            extents = list(view.dirty_extents())
            assert blocks_of(extents, now_size) == blocks_that_differ(now, base)
            for extent in extents:
                assert extent.kind is not Kind.ZERO or not any(now[extent.offset : extent.end])
            assert view.dirty_bytes == sum(extent.length for extent in extents)
        case = Case(place, now, base, sparse=sparse)
        below = case.base.hold()
        with ForeignView(case.now, case.base) as view:
            report = write_diff(
                view, place / "d", backing_file=str(place / "base"), options=ImageOptions(cluster_size=cluster)
            )
        assert read_with_cowkit(place / "d", below) == now.ljust(-(-now_size // 512) * 512, b"\0")
        assert sum(-(-extent.length // BLOCK) for extent in report.changed) == len(blocks_that_differ(now, base))
        below.release()


def test_where_both_have_holes_nothing_is_read(tmp_path: Path) -> None:
    size = 1 << 40
    now = FileBase(make_base(tmp_path / "now", size, {1 << 39: b"now" * 1000, 5 * MIB: b"same"}))
    base = FileBase(make_base(tmp_path / "base", size, {1 << 38: b"base", 5 * MIB: b"same"}))
    with ForeignView(now, base) as view:
        assert list(view.dirty_extents()) == [
            Extent(1 << 38, BLOCK, Kind.ZERO),
            Extent(1 << 39, BLOCK, Kind.DATA),
        ]
        assert view.bytes_read < MIB


def test_a_hole_over_zeroes_of_the_base_is_no_difference(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(MIB))
    with ForeignView(ZeroBase(MIB), FileBase(tmp_path / "base")) as view:
        assert list(view.dirty_extents()) == []


def test_only_suspects_are_read(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(noise(8 * MIB, 1))
    (tmp_path / "now").write_bytes(noise(8 * MIB, 2))
    suspects = [(100, 200), (150, 5000), (4 * MIB, 4 * MIB + 1), (8 * MIB - 1, 9 * MIB), (20 * MIB, 21 * MIB)]
    with ForeignView(FileBase(tmp_path / "now"), FileBase(tmp_path / "base"), suspects=lambda: suspects) as view:
        found = list(view.dirty_extents())
        assert [(each.offset, each.end) for each in found] == [
            (0, 8192),
            (4 * MIB, 4 * MIB + BLOCK),
            (8 * MIB - BLOCK, 8 * MIB),
        ]
        assert view.bytes_read == 2 * 4 * BLOCK


@pytest.mark.parametrize("options", [ImageOptions(), ImageOptions(cluster_size=2 * MIB), ImageOptions(bitmap="b")])
def test_nothing_is_read_twice(tmp_path: Path, options: ImageOptions) -> None:
    size = 16 * MIB
    (tmp_path / "base").write_bytes(noise(size, 1))
    (tmp_path / "now").write_bytes(noise(size, 2))
    with ForeignView(FileBase(tmp_path / "now"), FileBase(tmp_path / "base")) as view:
        report = write_diff(view, tmp_path / "d", backing_file="base", options=options)
        assert report.changed_bytes == size
        assert view.bytes_read == 2 * size
        assert view.dirty_runs == 1


def test_progress_is_told_and_may_end_it(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(noise(8 * MIB, 1))
    told: list[tuple[int, int]] = []
    with ForeignView(
        FileBase(tmp_path / "base"), FileBase(tmp_path / "base"), progress=lambda *p: told.append(p)
    ) as view:
        assert list(view.dirty_extents()) == []
    assert told == sorted(told) and told[-1] == (8 * MIB, 8 * MIB) and len(told) == 9

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with (
        ForeignView(FileBase(tmp_path / "base"), FileBase(tmp_path / "base"), progress=interrupted) as view,
        pytest.raises(KeyboardInterrupt),
    ):
        list(view.dirty_extents())


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    for name in ("now", "base"):
        (tmp_path / name).write_bytes(noise(3 * MIB, 1))
    with ForeignView(FileBase(tmp_path / "now"), FileBase(tmp_path / "base")) as view:
        (tmp_path / "now").write_bytes(noise(3 * MIB, 2))
        with pytest.raises(BaseChangedError, match=f"^source {tmp_path}/now changed while it was in use"):
            list(view.dirty_extents())


class Stuck(Base):
    """Does not answer until it is interrupted."""

    size = 8 * MIB
    given = "stuck"

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.ended = threading.Event(), threading.Event()

    @property
    def view(self) -> None:
        return None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.asked.set()
        assert self.ended.wait(60)
        raise BaseError(f"cannot read base {self.given} at byte {offset}: interrupted")

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, Kind.DATA)

    def verify(self) -> None:
        pass

    def interrupt(self) -> None:
        self.ended.set()

    def _close(self) -> None:
        pass


def test_a_comparison_with_a_server_that_does_not_answer_can_be_ended(tmp_path: Path) -> None:
    source = Stuck()
    view = ForeignView(source, ZeroBase(8 * MIB))
    failed: list[BaseException] = []

    def compare() -> None:
        try:
            list(view.dirty_extents())
        except BaseException as error:
            failed.append(error)

    waiting = threading.Thread(target=compare)
    waiting.start()
    assert source.asked.wait(60)
    view.close()
    waiting.join()
    assert len(failed) == 1 and str(failed[0]).startswith("cannot read source stuck at byte ")
    view.close()


def test_its_extents_are_those_of_now(tmp_path: Path) -> None:
    now = FileBase(make_base(tmp_path / "now", 4 * MIB, {MIB: noise(MIB, 1)}))
    base = FileBase(make_base(tmp_path / "base", 3 * MIB, {0: noise(MIB // 2, 1)}))
    with ForeignView(now, base) as view:
        assert list(view.extents(0, 4 * MIB)) == [
            Extent(0, MIB // 2, Kind.ZERO),
            Extent(MIB // 2, MIB // 2, Kind.HOLE),
            Extent(MIB, MIB, Kind.DATA),
            Extent(2 * MIB, MIB, Kind.HOLE),
            Extent(3 * MIB, MIB, Kind.HOLE),
        ]
