"""The structure that a byte lies in, against what e2fsprogs and sfdisk say of the same image."""

from __future__ import annotations

import random
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowkit.bases import open_base
from cowkit.testing.contents import BytesBase
from cowkit.testing.structures import structure_at

KINDS = {
    "ext2": ["-t", "ext2", "-b", "1024"],
    "ext2-old": ["-t", "ext2", "-r", "0", "-b", "1024"],
    "ext3": ["-t", "ext3", "-b", "1024", "-J", "size=4"],
    "ext4": ["-t", "ext4", "-b", "4096"],
    "ext4-small-groups": ["-t", "ext4", "-b", "1024", "-g", "2048", "-O", "64bit"],
    "ext4-sparse-super2": ["-t", "ext4", "-b", "1024", "-O", "sparse_super2,^resize_inode", "-g", "4096"],
    "ext4-meta-bg": ["-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode", "-g", "1024"],
}


def shown(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.requires("mke2fs", "dumpe2fs", "debugfs")
@pytest.mark.parametrize("kind", KINDS)
def test_each_place_that_dumpe2fs_names_has_that_name(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "fs.img"
    with image.open("wb") as file:
        file.truncate(48 << 20)
    shown("mke2fs", "-q", "-F", *KINDS[kind], image)
    told = shown("dumpe2fs", image)
    size = int(re.findall(r"Block size: +(\d+)", told)[0])
    base = open_base(image)

    def at(block: str | int) -> str:
        return structure_at(base, int(block) * size) or ""

    try:
        groups = re.split(r"^Group (\d+): ", told, flags=re.MULTILINE)[1:]
        assert len(groups) >= 2
        for number, text in zip(groups[::2], groups[1::2], strict=True):
            group = int(number)
            for block in re.findall(r"Block bitmap at (\d+)", text):
                assert at(block).endswith(f"the block bitmap of group {group}")
            for block in re.findall(r"Inode bitmap at (\d+)", text):
                assert at(block).endswith(f"the inode bitmap of group {group}")
            for first, last in re.findall(r"Inode table at (\d+)-(\d+)", text):
                assert f"the inode table of group {group}, inode " in at(first)
                assert f"the inode table of group {group}, inode " in at(last)
            for block in re.findall(r"Backup superblock at (\d+)", text):
                assert f"the copy of the superblock in group {group}" in at(block)
            for first, last in re.findall(r"Group descriptors? at (\d+)(?:-(\d+))?", text):
                assert "the group descriptors: that of group " in at(first)
                assert "the group descriptors: that of group " in at(last or first)
            for first, last in re.findall(r"Reserved GDT blocks at (\d+)-(\d+)", text):
                assert at(first).endswith(f"room for more group descriptors in group {group}")
                assert at(last).endswith(f"room for more group descriptors in group {group}")
            for first in re.findall(r"Free blocks: (\d+)", text):
                assert re.search(rf": data block {first} in group {group}(, free)?$", at(first))
        assert "the superblock, byte 56 of it" in (structure_at(base, 1024 + 56) or "")
        if kind.startswith(("ext3", "ext4")):
            blocks = shown("debugfs", "-R", "blocks <8>", image).split()
            assert len(blocks) > 100
            assert [at(block).partition(": ")[2] for block in blocks[:3]] == [
                f"the journal, block {n} of it" for n in range(3)
            ]
            assert all(": the journal, block " in at(block) for block in (blocks[-1], *random.sample(blocks, 20)))
        assert structure_at(base, (48 << 20) - 1) is not None
    finally:
        base.release()


@pytest.mark.requires("mke2fs", "debugfs")
def test_an_inode_is_named_by_its_number(tmp_path: Path) -> None:
    image = tmp_path / "fs.img"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    shown("mke2fs", "-q", "-F", "-t", "ext4", image)
    base = open_base(image)
    try:
        for inode, meant in ((2, " (the root directory)"), (8, " (the journal)"), (11, " (lost+found)"), (12, "")):
            place = re.findall(
                r"located at block (\d+), offset 0x([0-9a-f]+)", shown("debugfs", "-R", f"imap <{inode}>", image)
            )
            block, inside = place[0]
            size = int(re.findall(r"Block size: +(\d+)", shown("dumpe2fs", "-h", image))[0])
            found = structure_at(base, int(block) * size + int(inside, 16))
            assert found == f"ext4: the inode table of group 0, inode {inode}{meant}"
    finally:
        base.release()


@pytest.mark.requires("sfdisk", "mke2fs")
@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_partitions_and_their_table_are_named(tmp_path: Path, label: str) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    lines = f"label: {label}\nstart=2048,size=20480\nstart=40960,size=8192\n"
    subprocess.run(["sfdisk", "-q", image], input=lines, text=True, check=True)
    shown("mke2fs", "-q", "-F", "-E", "offset=1048576", "-t", "ext2", image, "10M")
    base = open_base(image)
    try:
        assert structure_at(base, 0) == "MBR: boot code"
        assert structure_at(base, 446 + 16) == "MBR: entry 2 of the partition table"
        assert structure_at(base, 511) == "MBR: signature 55 aa"
        where = "partition 1 (10 MiB from byte 1048576 on)"
        assert structure_at(base, 1048576 + 1024) == f"{where}, byte 1024 of it: ext2: the superblock, byte 0 of it"
        assert structure_at(base, 40960 * 512 + 5) == "partition 2 (4 MiB from byte 20971520 on), byte 5 of it"
        assert structure_at(base, 31 << 20) == "no partition"
        if label == "gpt":
            last = (32 << 20) - 512
            assert structure_at(base, 512) == "GPT: the primary header"
            assert structure_at(base, 1024 + 130) == "GPT: entry 2 of the primary table"
            assert structure_at(base, last) == "GPT: the backup header"
            assert structure_at(base, last - 16384) == "GPT: entry 1 of the backup table"
    finally:
        base.release()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    image = tmp_path_factory.mktemp("fs") / "fs.img"
    image.write_bytes(bytes(256 << 10))
    shown("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", image)
    return image.read_bytes()


@pytest.mark.requires("mke2fs")
@given(
    damage=st.lists(st.tuples(st.integers(0, 8191), st.binary(min_size=1, max_size=8)), max_size=12),
    offset=st.integers(0, (256 << 10) - 1),
)
def test_a_damaged_disk_never_raises(small: bytes, damage: list[tuple[int, bytes]], offset: int) -> None:
    data = bytearray(small)
    for place, what in damage:
        data[place : place + len(what)] = what
    structure_at(BytesBase(data[: 256 << 10]), offset)
