"""Windows of a disk, and partition tables: MBR with logical partitions, GPT, and tables that lie."""

from __future__ import annotations

import binascii
import json
import os
import random
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowkit.bases import open_base
from cowkit.bases.partitions import Partition, read_partitions
from cowkit.disk import Base, Disk, FileBase
from cowkit.errors import BaseError, BaseOpenError, UsageError
from tests.bases.helpers import MIB, check_reads, nbdkit, write_compressed

GPT = "label: gpt\n- : start=2048, size=2048\n- : start=6144, size=1000\n- : start=8192, size=2048\n"
MBR = (
    "label: dos\n"
    "1 : start=2048, size=2048, type=83\n"
    "2 : start=4096, size=8192, type=5\n"
    "3 : start=12288, size=1024, type=83\n"
    "5 : size=1000, type=83\n"
    "6 : size=2048, type=83\n"
)


def sfdisk(path: Path, script: str) -> list[Partition]:
    """Make the partition table; what sfdisk itself says is in it."""
    command = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", str(path)]
    subprocess.run(command, input=script.encode(), check=True, capture_output=True)
    told = subprocess.run(["sfdisk", "--json", str(path)], check=True, capture_output=True)
    table = json.loads(told.stdout)["partitiontable"]
    unit = table.get("sectorsize", 512)
    return [
        Partition(
            int(each["node"].removeprefix(str(path))),
            each["start"] * unit,
            each["size"] * unit,
            each["type"] in ("5", "f"),
        )
        for each in table["partitions"]
    ]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(8 * MIB))
    return path


@pytest.mark.requires("sfdisk")
@pytest.mark.parametrize("script", [GPT, MBR])
def test_partitions_are_where_sfdisk_says(disk: Path, script: str) -> None:
    expected = sfdisk(disk, script)
    with disk.open("rb") as file:
        content = file.read()
    whole = open_base(disk)
    assert sorted(read_partitions(whole)) == sorted(expected)
    whole.release()
    assert len(expected) == script.count("size=")
    for each in expected:
        if not each.extended:
            base = open_base(disk, partition=each.number)
            check_reads(base, content[each.offset : each.offset + each.size], rounds=5)
            base.release()


def test_a_gpt_of_4096_byte_sectors_is_read(disk: Path) -> None:
    table = struct.pack("<16s16sQQ", b"type", b"itself", 256, 767).ljust(128, b"\0") + bytes(127 * 128)
    fields = (0, 1, 2047, 6, 2041, b"disk", 2, 128, 128, binascii.crc32(table))
    crc = binascii.crc32(struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, *fields))
    header = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, crc, *fields)
    with disk.open("r+b") as file:
        file.write(record((0xEE, 1, 2047)).ljust(4096, b"\0") + header.ljust(4096, b"\0") + table)
    base = FileBase(disk)
    assert read_partitions(base) == [Partition(1, 1 * MIB, 2 * MIB)]
    base.release()


@pytest.mark.requires("sfdisk")
def test_a_damaged_primary_gpt_leaves_its_backup(disk: Path) -> None:
    expected = sfdisk(disk, GPT)
    with disk.open("r+b") as file:
        file.seek(512 + 20)
        file.write(b"\xff")
    base = FileBase(disk)
    assert read_partitions(base) == expected
    base.release()
    with disk.open("r+b") as file:
        file.seek(-512, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(BaseOpenError, match="both its primary and its backup table are missing or damaged"):
        open_base(disk, partition=1)


@pytest.mark.requires("sfdisk")
def test_a_partition_that_is_not_there_is_answered_with_those_that_are(disk: Path) -> None:
    sfdisk(disk, MBR)
    with pytest.raises(BaseOpenError, match=r"has no partition 4; it has: 1 \(1 MiB at byte 1048576\), 2 \(4 MiB at"):
        open_base(disk, partition=4)
    with pytest.raises(BaseOpenError, match=r"partition 2 of base .* is an extended one"):
        open_base(disk, partition=2)
    with pytest.raises(UsageError, match="counted from 1"):
        open_base(disk, partition=0)
    os.truncate(disk, 5 * MIB)
    with pytest.raises(
        BaseOpenError, match=r"partition 3 of base .* would end at byte 6815744, and the base has only 5242880"
    ):
        open_base(disk, partition=3)


def test_a_disk_without_a_table_has_no_partitions(tmp_path: Path) -> None:
    for content in (b"", bytes(100), bytes(4096), b"\x42" * 510 + b"\x55\xaa"):
        path = tmp_path / "disk.img"
        path.write_bytes(content)
        with pytest.raises(BaseOpenError, match="has no partition table"):
            open_base(path, partition=1)


def record(*entries: tuple[int, int, int]) -> bytes:
    packed = b"".join(struct.pack("<B3xB3xII", 0, kind, first, count) for kind, first, count in entries)
    return bytes(446) + packed.ljust(64, b"\0") + b"\x55\xaa"


@pytest.mark.parametrize(
    ("chain", "why"),
    [
        (record((0x83, 1, 1), (5, 0, 8)), "runs in a circle"),
        (record((0x83, 1, 1), (5, 2, 8)), "breaks off"),
        (record((0x83, 1, 1), (5, 0xFFFFFFFF, 8)), "breaks off"),
    ],
)
def test_a_chain_of_logical_partitions_that_leads_nowhere_is_damage(tmp_path: Path, chain: bytes, why: str) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(record((5, 1, 100)) + chain + bytes(8192))
    with pytest.raises(BaseOpenError, match=f"chain of its logical partitions {why}"):
        open_base(path, partition=5)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_whatever_a_table_says_there_is_an_answer_or_one_line(tmp_path: Path, data: st.DataObject) -> None:
    kinds = st.sampled_from([0, 0x83, 5, 0x0F, 0xEE])
    numbers = st.one_of(st.integers(0, 12), st.just(0xFFFFFFFF))
    entries = st.lists(st.tuples(kinds, numbers, numbers), max_size=4)
    content = b"".join(record(*data.draw(entries)) if data.draw(st.booleans()) else bytes(512) for _ in range(6))
    noise = data.draw(st.binary(max_size=92))
    content += b"EFI PART" + noise.ljust(504, b"\0")
    path = tmp_path / "disk.img"
    path.write_bytes(content)
    for number in (1, 2, 5):
        try:
            base = open_base(path, partition=number)
        except BaseError as error:
            complaint = str(error)
            assert "\n" not in complaint
            continue
        base.pread(base.size, 0)
        base.release()


@pytest.mark.parametrize(
    ("offset", "size"), [(0, None), (0, 4097), (4096, 8192), (512, None), (777, 100_001), (8 * MIB, None), (5, 0)]
)
def test_a_window_reads_as_its_part_of_the_disk(disk: Path, offset: int, size: int | None) -> None:
    content = disk.read_bytes()[offset:][:size]
    base = open_base(disk, offset=offset, size=size)
    assert base.size == len(content)
    if content:
        check_reads(base, content, rounds=10)
        # A system call may read from the mapping: without a copy, also where the offset is within a page.
        view = base.view
        assert view is not None and len(view) == len(content)
        with open("/dev/null", "wb") as null:
            null.write(view)
        read_end, write_end = os.pipe()
        os.write(write_end, view[:100])
        assert os.read(read_end, 100) == content[:100]
        os.close(read_end)
        os.close(write_end)
        del view
    base.verify()
    base.release()


def test_a_window_keeps_the_holes_of_its_file(raw: Path, content: bytes) -> None:
    base = open_base(raw, offset=12_345)
    assert base.sparse
    check_reads(base, content[12_345:], rounds=5)
    base.release()


def test_a_window_beyond_the_end_is_refused(disk: Path) -> None:
    with pytest.raises(BaseOpenError, match="would reach byte 8388609, and the base has only 8388608"):
        open_base(disk, offset=8 * MIB - 1, size=2)
    with pytest.raises(BaseOpenError, match="would reach byte 9437184"):
        open_base(disk, offset=9 * MIB)
    for offset, size in ((-1, None), (0, -1)):
        with pytest.raises(UsageError, match="can be negative"):
            open_base(disk, offset=offset, size=size)


@pytest.mark.requires("sfdisk")
def test_offset_and_size_are_within_the_partition(disk: Path) -> None:
    sfdisk(disk, MBR)
    content = disk.read_bytes()
    base = open_base(disk, partition=1, offset=1000, size=5000)
    assert base.pread(5000, 0) == content[MIB + 1000 : MIB + 6000]
    base.release()
    with pytest.raises(
        UsageError, match=r"partition 1 of base .* has 1048576 bytes: offset 1048577 and size None are not within it"
    ):
        open_base(disk, partition=1, offset=MIB + 1)


@pytest.mark.requires("sfdisk")
def test_a_window_is_no_backing_file_and_says_so(disk: Path) -> None:
    sfdisk(disk, MBR)
    base = open_base(disk, partition=1)
    assert base.backing_refusal is not None
    assert base.backing_refusal.startswith("partition 1 of ") and "--backing COPY" in base.backing_refusal
    base.release()


@pytest.mark.requires("sfdisk", "nbdkit", modules=["nbd", "xz"])
@pytest.mark.usefixtures("no_leaks")
def test_partitions_of_other_kinds_of_bases_are_read_alike(disk: Path, tmp_path: Path) -> None:
    sfdisk(disk, GPT)
    content = disk.read_bytes()
    part = content[6144 * 512 :][: 1000 * 512]
    packed = write_compressed(tmp_path / "disk.img.xz", content, "xz")
    with nbdkit("file", disk) as (uri, _):
        for given_base in (packed, uri):
            base = open_base(given_base, partition=2)
            check_reads(base, part, rounds=5)
            base.release()


@pytest.mark.requires("sfdisk")
def test_the_engine_serves_a_partition(disk: Path, tmp_path: Path) -> None:
    sfdisk(disk, GPT)
    content = disk.read_bytes()[6144 * 512 :][: 1000 * 512]
    base: Base = open_base(disk, partition=2)
    with Disk(base, tmpdir=tmp_path) as top:
        top.pwrite(b"boo", 100)
        assert top.pread(len(content), 0) == content[:100] + b"boo" + content[103:]
    assert disk.read_bytes()[6144 * 512 :][: 1000 * 512] == content
