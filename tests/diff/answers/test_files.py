"""Which files changed inside ext file systems: exactly those that a script changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cowkit import CowDisk
from tests.diff.answers.ext_images import (
    EXPECTED,
    MIB,
    SCRIPT,
    change_in_place,
    debugfs,
    files,
    make_image,
    make_tree,
    put_on,
    told,
    tool,
)

pytestmark = pytest.mark.requires("mke2fs", "debugfs", "e2image")


@pytest.mark.parametrize(
    "options",
    [
        ("-t", "ext4", "-b", "4096"),
        ("-t", "ext4", "-b", "1024", "-O", "64bit"),
        ("-t", "ext4", "-b", "4096", "-O", "^64bit,inline_data"),
        ("-t", "ext4", "-I", "128", "-O", "^64bit,^metadata_csum"),
        ("-t", "ext3", "-b", "2048"),
        ("-t", "ext2", "-b", "1024"),
    ],
    ids=" ".join,
)
def test_exactly_the_files_that_a_script_changed_are_told(tmp_path: Path, options: tuple[str, ...]) -> None:
    base = make_image(tmp_path / "disk.img", make_tree(tmp_path / "tree"), *options)
    changed = Path(shutil.copyfile(base, tmp_path / "changed.img"))
    debugfs(changed, SCRIPT)
    change_in_place(changed, "/deep/er/in place")
    with CowDisk(base) as disk:
        put_on(disk, changed)
        (found,) = files(disk)
    assert (found.partition, found.file_system, found.problem) == (None, options[1], None)
    assert told(found.changes) == EXPECTED
    (renamed,) = (each for each in found.changes if each.change == "renamed")
    assert (renamed.renamed_from, renamed.path) == ("/moved", "/after")
    by_path = {each.path: each for each in found.changes}
    assert (by_path["/added"].size, by_path["/removed"].size_before, by_path["/fresh"].type) == (
        9000,
        7000,
        "directory",
    )


@pytest.mark.requires("sfdisk")
def test_files_in_a_partition_are_told_under_its_number(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    base = tmp_path / "disk.img"
    with base.open("wb") as file:
        file.truncate(48 * MIB)
    tool("sfdisk", "-q", base, given="label: gpt\nstart=2048, size=16M\nsize=20M\nsize=1M\nsize=1M, type=swap\n")
    make_image(base, tree, "-t", "ext4", size=16 * MIB, offset=1 * MIB)
    make_image(base, tree, "-t", "ext2", size=20 * MIB, offset=17 * MIB)
    changed = Path(shutil.copyfile(base, tmp_path / "changed.img"))
    change_in_place(changed, "/same", offset=17 * MIB)
    with CowDisk(base) as disk:
        put_on(disk, changed)
        disk.pwrite(b"unknown", 37 * MIB)
        first, second, third = files(disk)
        stat = disk.changes()
    assert (first.partition, first.file_system, first.changes) == (1, "ext4", ())
    assert (second.partition, second.file_system) == (2, "ext2")
    assert told(second.changes) == {"/same": ("changed", ("content",))}
    assert (third.partition, third.problem) == (3, "no known file system, so its files cannot be told")
    assert [(each.number, each.amounts.changed.bytes) for each in stat.partitions] == [
        (1, 0),
        (2, 4096),
        (3, 4096),
        (4, 0),
    ]


@pytest.mark.parametrize("change", ["removed", "added"])
def test_swap_has_no_files_so_all_are_removed_by_making_it_and_added_in_its_place(tmp_path: Path, change: str) -> None:
    ext = make_image(tmp_path / "ext.img", make_tree(tmp_path / "tree"), "-t", "ext2")
    swap = tmp_path / "swap.img"
    swap.write_bytes((bytes(4086) + b"SWAPSPACE2").ljust(ext.stat().st_size, b"\0"))
    base, now = (ext, swap) if change == "removed" else (swap, ext)
    with CowDisk(base) as disk:
        put_on(disk, now)
        (found,) = files(disk)
    assert (found.file_system, found.problem) == ("swap" if change == "removed" else "ext2", None)
    assert {each.change for each in found.changes} == {change}
    assert {"/mode", "/moved", "/deep"} <= {each.path for each in found.changes}


def test_a_directory_that_is_renamed_takes_its_files_along(tmp_path: Path) -> None:
    base = make_image(tmp_path / "disk.img", make_tree(tmp_path / "tree"), "-t", "ext4")
    changed = Path(shutil.copyfile(base, tmp_path / "changed.img"))
    debugfs(changed, 'ln /deep /shallow\nunlink /deep\nwrite new.bin "/shallow/er/in place 2"\n')
    change_in_place(changed, "/shallow/small 3", at=3)
    with CowDisk(base) as disk:
        put_on(disk, changed)
        (found,) = files(disk)
    assert [str(each) for each in found.changes] == [
        "R /deep -> /shallow/",
        "A /shallow/er/in place 2",
        "R /deep/small 3 -> /shallow/small 3  (content)",
    ]


def test_large_directories_are_read_whole(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "many").mkdir(parents=True)
    for number in range(300):
        (tree / "many" / f"a file with a long name so that the directory is hashed {number}").touch()
    base = make_image(tmp_path / "disk.img", tree, "-t", "ext4", "-b", "1024", "-O", "dir_index")
    tool("e2fsck", "-fyD", base, answers=(0, 1))
    assert "0x81000" in tool("debugfs", "-R", "stat /many", base), "a hashed directory of extents"
    changed = Path(shutil.copyfile(base, tmp_path / "changed.img"))
    debugfs(changed, 'rm "/many/a file with a long name so that the directory is hashed 150"\n')
    with CowDisk(base) as disk:
        put_on(disk, changed)
        (found,) = files(disk)
    assert [each.path[-4:] for each in found.changes] == [" 150"]


def test_what_is_in_the_journal_alone_counts_as_a_mount_would_show_it(tmp_path: Path) -> None:
    """debugfs writes a transaction to the journal and does not carry it out: `jw` with blocks of the inode table."""
    base = make_image(
        tmp_path / "disk.img", make_tree(tmp_path / "tree"), "-t", "ext4", "-b", "4096", "-O", "^metadata_csum"
    )
    carried_out = Path(shutil.copyfile(base, tmp_path / "other.img"))
    debugfs(carried_out, "set_inode_field /mode mode 0100600\n")
    where = tool("debugfs", "-R", "imap /mode", base).split("located at block ")[1]
    block = int(where.split(",")[0])
    (tmp_path / "block").write_bytes(carried_out.read_bytes()[block * 4096 : (block + 1) * 4096])
    changed = Path(shutil.copyfile(base, tmp_path / "changed.img"))
    debugfs(changed, f"jo\njw -b {block} block\njc\n")
    with CowDisk(base) as disk:
        put_on(disk, changed)
        assert disk.pread(4096, block * 4096) == base.read_bytes()[block * 4096 :][:4096], "not in its place yet"
        (found,) = files(disk)
    assert told(found.changes) == {"/mode": ("changed", ("mode",))}


@pytest.mark.requires("qemu-img", "qemu-nbd", modules=["nbd"])
def test_other_bases_than_raw_files_do_as_well(tmp_path: Path) -> None:
    raw = make_image(tmp_path / "disk.img", make_tree(tmp_path / "tree"), "-t", "ext4")
    tool("qemu-img", "convert", "-O", "qcow2", raw, tmp_path / "disk.qcow2")
    changed = Path(shutil.copyfile(raw, tmp_path / "changed.img"))
    debugfs(changed, SCRIPT)
    change_in_place(changed, "/deep/er/in place")
    with CowDisk(tmp_path / "disk.qcow2") as disk:
        put_on(disk, changed)
        (found,) = files(disk)
    assert told(found.changes) == EXPECTED


def test_files_are_told_since_a_checkpoint_and_at_one(tmp_path: Path) -> None:
    base = make_image(tmp_path / "disk.img", make_tree(tmp_path / "tree"), "-t", "ext4")
    changed = Path(shutil.copyfile(base, tmp_path / "changed.img"))
    with CowDisk(base) as disk:
        debugfs(changed, "rm /removed\n")
        put_on(disk, changed)
        disk.checkpoint("one")
        debugfs(changed, "write new.bin added\n")
        put_on(disk, changed)
        disk.checkpoint("two")
        debugfs(changed, "rm /added\n")
        put_on(disk, changed)
        assert told(files(disk, at="one")[0].changes) == {"/removed": ("removed", ())}
        assert told(files(disk, since="one", at="two")[0].changes) == {"/added": ("added", ())}
        assert told(files(disk, since="two")[0].changes) == {"/added": ("removed", ())}
        assert told(files(disk)[0].changes) == {"/removed": ("removed", ())}


def test_on_a_disk_that_was_blank_all_files_are_added(tmp_path: Path) -> None:
    image = make_image(tmp_path / "new.img", make_tree(tmp_path / "tree"), "-t", "ext4")
    with CowDisk(size=image.stat().st_size) as disk:
        assert disk.changes(files=True).files == ()
        put_on(disk, image)
        (found,) = files(disk)
    assert {each.change for each in found.changes} == {"added"}
    assert {"/same", "/deep/er", "/lost+found", os.fsdecode(b"/new\nline \xff")} <= {
        each.path for each in found.changes
    }


def test_a_file_system_that_was_made_anew_is_compared_as_it_is(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    base = make_image(tmp_path / "disk.img", tree, "-t", "ext4", "-b", "4096")
    (tree / "same").write_bytes(b"other" * 1400)
    again = make_image(tmp_path / "again.img", tree, "-t", "ext4", "-b", "1024")
    with CowDisk(base) as disk:
        put_on(disk, again)
        (found,) = files(disk)
    contents = {each.path for each in found.changes if "content" in each.what}
    assert "/same" in contents
    assert {each.change for each in found.changes} == {"changed"}


def test_a_wrecked_file_system_is_a_problem_and_no_list_of_removed_files(tmp_path: Path) -> None:
    base = make_image(tmp_path / "disk.img", make_tree(tmp_path / "tree"), "-t", "ext4")
    with CowDisk(base) as disk:
        point = disk.checkpoint()
        disk.zero(4096, 0)
        (gone,) = files(disk)
        disk.rollback(point)
        disk.pwrite(os.urandom(900), 1024 + 58)
        (damaged,) = files(disk)
    assert gone.problem == "there was ext4, and nothing known is there now: its superblock is damaged or overwritten"
    assert damaged.problem
    assert "\n" not in damaged.problem
    assert gone.changes == damaged.changes == ()


@pytest.mark.requires("sfdisk")
def test_a_damaged_partition_table_is_a_problem_and_no_list_of_removed_files(tmp_path: Path) -> None:
    base = tmp_path / "disk.img"
    with base.open("wb") as file:
        file.truncate(24 * MIB)
    tool("sfdisk", "-q", base, given="label: gpt\nstart=2048, size=16M\n")
    make_image(base, make_tree(tmp_path / "tree"), "-t", "ext4", size=16 * MIB, offset=1 * MIB)
    with CowDisk(base) as disk:
        disk.zero(32768, 512)
        disk.zero(32768, disk.size - 32768)
        report = disk.changes(files=True)
    assert report.partition_table == "damaged"
    assert [each.problem for each in report.files or ()] == [
        "the partition table is damaged, so nothing tells where its file systems are"
    ]


def test_without_debugfs_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_image(tmp_path / "disk.img", make_tree(tmp_path / "tree"), "-t", "ext4")
    monkeypatch.setattr("cowkit.programs.shutil.which", lambda *_, **__: None)
    with CowDisk(base) as disk:
        disk.pwrite(b"x", 20 * MIB)
        (found,) = files(disk)
    assert found.problem == (
        "debugfs is not installed, and telling which files of ext4 changed needs it: "
        "install e2fsprogs (Debian: apt install e2fsprogs)"
    )


def test_nothing_is_left_in_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_image(tmp_path / "disk.img", make_tree(tmp_path / "tree"), "-t", "ext4")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    with CowDisk(base) as disk:
        disk.pwrite(b"x", 20 * MIB)
        files(disk)
    assert list(scratch.iterdir()) == []
