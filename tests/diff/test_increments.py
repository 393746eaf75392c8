"""Differences between two states of a disk: since a checkpoint, and at one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowkit import CowDisk
from cowkit.diff import Qcow2Image, write_diff
from cowkit.disk import Kind
from cowkit.errors import BaseChangedError, CheckpointError, OutputError, UsageError
from tests.diff.helpers import Doing, base_pieces, check_with_qemu, content, doings, make_base, noise

SIZE = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base.img", SIZE, {0: noise(SIZE, 1)})


@pytest.mark.requires("qemu-img")
def test_a_chain_of_increments_reads_as_each_state_was(base: Path, tmp_path: Path) -> None:
    states = []
    with CowDisk(base) as disk:
        disk.pwrite(b"monday", 1000)
        disk.checkpoint("monday")
        states.append(content(disk.engine))
        disk.pwrite(b"tuesday", 300_000)
        disk.zero(100_000, 0)
        disk.checkpoint("tuesday")
        states.append(content(disk.engine))
        disk.pwrite(b"now", 5)
        states.append(content(disk.engine))
        disk.diff(tmp_path / "d1.qcow2", at="monday")
        disk.diff(tmp_path / "d2.qcow2", since="monday", at="tuesday", backing_file="d1.qcow2")
        report = disk.diff(tmp_path / "d3.qcow2", since="tuesday", backing_file="d2.qcow2")
        assert (report.dirty_bytes, report.changed_bytes, report.backing_format) == (4096, 4096, "qcow2")
    for number, expected in enumerate(states, 1):
        check_with_qemu(tmp_path / f"d{number}.qcow2", expected)


def test_what_was_zeroed_since_a_checkpoint_is_zeroed_over_what_was_written_before_it(
    base: Path, tmp_path: Path
) -> None:
    with CowDisk(size=SIZE) as disk:
        disk.pwrite(noise(200_000, 2), 0)
        point = disk.checkpoint()
        disk.trim(131072, 0)
        report = disk.diff(tmp_path / "d.qcow2", since=point, backing_file="before.qcow2")
    assert report.zeroed_bytes == 131072
    with Qcow2Image(tmp_path / "d.qcow2") as image:
        assert [(e.offset, e.length) for e in image.extents() if e.kind is Kind.ZERO] == [(0, 131072)]


def test_what_was_written_back_as_it_was_at_the_checkpoint_is_left_out(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        disk.pwrite(b"then", 0)
        point = disk.checkpoint()
        disk.pwrite(b"then", 0)
        report = disk.diff(tmp_path / "d.qcow2", since=point, backing_file="d1.qcow2")
    assert (report.dirty_bytes, report.changed_bytes) == (4096, 0)


def test_the_report_names_the_state_that_what_was_written_is_the_same_as(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        disk.pwrite(base.read_bytes()[:4096], 0)
        disk.checkpoint("installed")
        from_base = disk.diff(tmp_path / "d1.qcow2", at="installed")
        disk.pwrite(base.read_bytes()[:4096], 0)
        increment = disk.diff(tmp_path / "d2.qcow2", since="installed", backing_file="d1.qcow2")
    with CowDisk(size=SIZE) as disk:
        disk.pwrite(bytes(4096), 0)
        blank = disk.diff(tmp_path / "blank.qcow2")
    said = [report.summary().splitlines()[1] for report in (from_base, increment, blank)]
    assert said == [
        "  4 KiB more were written but are the same as in the base",
        "  4 KiB more were written but are as at checkpoint installed",
        "  4 KiB more were written but are zeroes, as before",
    ]
    assert [report.to_json()["since"] for report in (from_base, increment, blank)] == [None, "installed", None]


def test_a_view_of_a_checkpoint_outlives_a_rollback_past_it(base: Path) -> None:
    with CowDisk(base) as disk:
        first = disk.checkpoint("first")
        disk.pwrite(b"seen", 0)
        disk.checkpoint("second")
        disk.pwrite(b"later", 0)
        with disk.engine.freeze("second") as view:
            disk.rollback(first)
            disk.pwrite(b"other", 0)
            assert view.pread(4, 0) == b"seen"
        assert disk.pread(5, 0) == b"other"


def test_a_state_that_is_not_there_or_in_the_wrong_order_is_refused_and_an_old_file_stays(
    base: Path, tmp_path: Path
) -> None:
    target = tmp_path / "d.qcow2"
    target.write_text("old")
    with CowDisk(base) as disk:
        disk.checkpoint("one")
        disk.checkpoint("two")
        with pytest.raises(CheckpointError, match="no checkpoint 'three'"):
            disk.diff(target, at="three")
        with pytest.raises(CheckpointError, match="no checkpoint 'three'"):
            disk.diff(target, since="three", backing_file="d1.qcow2")
        with pytest.raises(CheckpointError, match="'one' is older than 'two'"):
            disk.diff(target, since="two", at="one", backing_file="d1.qcow2")
    assert target.read_text() == "old"


def test_an_increment_wants_the_name_of_what_was_kept_before_it(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        disk.checkpoint("one")
        with pytest.raises(UsageError, match=r"checkpoint 'one' of .*base.img is no file.*keep it first"):
            disk.diff(tmp_path / "d.qcow2", since="one")
        with pytest.raises(UsageError, match="its own backing file"):
            disk.diff(tmp_path / "d.qcow2", since="one", backing_file="d.qcow2")


@pytest.mark.requires("qemu-img")
@pytest.mark.parametrize("options", [{}, {"raw": True}], ids=["qcow2", "raw"])
def test_an_increment_records_what_its_backing_file_is(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with CowDisk(base) as disk:
        disk.pwrite(b"one", 0)
        disk.checkpoint("one")
        disk.diff(tmp_path / "kept", **options)
        disk.pwrite(b"two", 70_000)
        report = disk.diff(tmp_path / "d.qcow2", since="one", backing_file="kept")
        assert report.backing_format == ("raw" if options else "qcow2")
        check_with_qemu(tmp_path / "d.qcow2", content(disk.engine))


def test_an_increment_stands_on_no_other_state_than_that_of_its_checkpoint(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        disk.pwrite(b"one", 50_000)  # not among the blocks that a base is sampled at
        disk.checkpoint("one")
        disk.diff(tmp_path / "one.qcow2")
        disk.diff(tmp_path / "one.img", raw=True)
        disk.pwrite(b"two", 90_000)
        disk.diff(tmp_path / "two.qcow2")
        (tmp_path / "folder").mkdir()
        (tmp_path / "short.img").write_bytes(bytes(4096))
        (tmp_path / "name.qcow2").write_bytes(base.read_bytes())
        (tmp_path / "kept.gz").write_bytes(b"\x1f\x8b\x08")
        for name, why in (
            ("base.img", "blocks that were sampled differ"),
            ("two.qcow2", "blocks that were sampled differ"),
            ("short.img", "it has 4096 bytes, not"),
            ("folder", "is a directory"),
            ("name.qcow2", "is called a qcow2 file and does not begin like one"),
            ("kept.gz", "begins like a file of gzip"),
        ):
            with pytest.raises(UsageError, match=why):
                disk.diff(tmp_path / "d.qcow2", since="one", backing_file=name)
        with pytest.raises(UsageError, match="begins like a qcow2 file and was read as raw"):
            disk.diff(tmp_path / "d.qcow2", since="one", backing_file="one.qcow2", backing_format="raw")
        with pytest.raises(UsageError, match="is no qcow2 image"):
            disk.diff(tmp_path / "d.qcow2", since="one", backing_file="one.img", backing_format="qcow2")
        assert not (tmp_path / "d.qcow2").exists()
        for name, format in (("one.qcow2", "qcow2"), ("one.img", "raw"), ("not-yet", "qcow2")):
            assert disk.diff(tmp_path / "d.qcow2", since="one", backing_file=name).backing_format == format


@pytest.mark.parametrize("window", [{"partition": 1}, {"offset": 4096}])
def test_a_copy_of_the_window_is_wanted_as_the_backing_file_and_not_the_whole(
    base: Path, tmp_path: Path, window: dict[str, Any]
) -> None:
    mbr = bytearray(512)
    mbr[446:462] = b"\0\0\0\0\x83\0\0\0" + (8).to_bytes(4, "little") + (8).to_bytes(4, "little")
    mbr[510:512] = b"\x55\xaa"
    base.write_bytes(mbr + base.read_bytes()[512:])
    with CowDisk(base, **window) as disk:
        (tmp_path / "copy.img").write_bytes(disk.pread(disk.size, 0))
        (tmp_path / "other.img").write_bytes(bytes(disk.size))
        disk.pwrite(b"x", 0)
        with pytest.raises(UsageError, match=r"base\.img is not what the difference stands on, .*: it has"):
            disk.diff(tmp_path / "d.qcow2", backing_file="base.img")
        with pytest.raises(UsageError, match="blocks that were sampled differ"):
            disk.diff(tmp_path / "d.qcow2", backing_file="other.img")
        disk.diff(tmp_path / "d.qcow2", backing_file="copy.img")


def test_an_increment_replaces_neither_the_base_nor_what_its_backing_file_stands_on(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        disk.checkpoint("one")
        disk.diff(tmp_path / "d1.qcow2", at="one")
        disk.diff(tmp_path / "d2.qcow2", since="one", backing_file="d1.qcow2")
        for spared in ("base.img", "d1.qcow2"):
            with pytest.raises(OutputError, match="the same file as"):
                disk.diff(tmp_path / spared, since="one", backing_file="d2.qcow2")


def test_an_increment_alone_has_all_of_the_disk(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        disk.checkpoint("one")
        disk.pwrite(b"x", 0)
        disk.diff(tmp_path / "whole.img", since="one", raw=True)
        assert (tmp_path / "whole.img").read_bytes() == content(disk.engine)


@pytest.mark.requires("qemu-img")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.integers(1, 300_000),
    pieces=base_pieces,
    block=st.sampled_from([512, 4096, 65536]),
    before=doings,
    between=doings,
    after=doings,
)
def test_of_random_disks_the_chain_reads_as_each_state_was(
    size: int, pieces: dict[int, int], block: int, before: list[Doing], between: list[Doing], after: list[Doing]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = make_base(Path(folder, "base.img"), size, {at: noise(length, 9) for at, length in pieces.items()})
        one, two, three = (Path(folder, f"d{number}.qcow2") for number in (1, 2, 3))
        with CowDisk(path, block_size=block, tmpdir=folder) as disk:
            states = []
            for step in (before, between, after):
                for doing in step:
                    doing.do(disk.engine)
                disk.checkpoint()
                states.append(content(disk.engine))
            disk.diff(one, at="checkpoint-1")
            disk.diff(two, since="checkpoint-1", at="checkpoint-2", backing_file="d1.qcow2")
            disk.diff(three, since="checkpoint-2", backing_file="d2.qcow2")
        for image, expected in zip((one, two, three), states, strict=True):
            check_with_qemu(image, expected)


def test_a_base_that_is_cut_short_while_its_mapping_is_written_is_to_blame(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", SIZE, {0: noise(SIZE, 1)})
    disk = CowDisk(base)
    disk.pwrite(b"x", SIZE - 65536 + 4096)
    with disk.engine.freeze() as view, pytest.raises(BaseChangedError, match="its size went from"):

        def cut(done: int, total: int) -> None:
            with base.open("r+b") as file:
                file.truncate(4096)

        write_diff(view, tmp_path / "d.qcow2", backing_file="base.img", progress=cut)
    with pytest.raises(BaseChangedError):
        disk.close()
