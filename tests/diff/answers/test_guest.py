"""Files of file systems that guestfish reads. Most tests have a stand-in that sends prepared folders; a slow one the real program."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cowkit import CowDisk
from tests.diff.answers.ext_images import MIB, files, told

XFS = b"XFSB"
"""What a file system is known by; the stand-in does not look at the rest."""

STAND_IN = """#!/usr/bin/env bash
# Takes the script of the real guestfish, and sends ./state-a for /dev/sda and ./state-b for /dev/sdb.
printf '%s\\n' "$@" >arguments
for each; do [[ $each == *cowkit-files-* ]] && head -c 4 "$each" >>heads && printf '\\n' >>heads; done
while read -r command first second _; do
    case $command in
    mount-ro) folder=state-${first: -1} ;;
    tar-out) tar -C "$folder" --format=posix --numeric-owner --xattrs -cf "$second" . ;;
    esac
done
"""


@pytest.fixture
def guestfish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the stand-in finds what to send."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "guestfish"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_states(folder: Path) -> None:
    before = folder / "state-a"
    (before / "dir").mkdir(parents=True)
    for name in ("same", "content", "mode", "times", "gone", "dir/inside"):
        (before / name).write_bytes(name.encode() * 10)
    (before / "link").symlink_to("same")
    os.link(before / "same", before / "same again")
    for path in before.rglob("*"):
        os.utime(path, (10**9, 10**9), follow_symlinks=False)
    shutil.copytree(before, folder / "state-b", symlinks=True)
    now = folder / "state-b"
    (now / "content").write_bytes(b"CONTENT" * 10)
    (now / "mode").chmod(0o600)
    (now / "gone").unlink()
    (now / os.fsdecode(b"new \xff")).touch()
    (now / "link").unlink()
    (now / "link").symlink_to("elsewhere")
    for path in now.rglob("*"):
        os.utime(path, (10**9, 10**9), follow_symlinks=False)
    os.utime(now / "times", (1, 1))


EXPECTED = {
    "/content": ("changed", ("content",)),
    "/mode": ("changed", ("mode",)),
    "/times": ("changed", ("times",)),
    "/gone": ("removed", ()),
    "/link": ("changed", ("target",)),
    os.fsdecode(b"/new \xff"): ("added", ()),
}


def test_both_states_are_mounted_and_compared(guestfish: Path) -> None:
    make_states(guestfish)
    (guestfish / "disk.img").write_bytes(XFS + bytes(MIB))
    with CowDisk(guestfish / "disk.img") as disk:
        disk.pwrite(b"x", 4096)
        (found,) = files(disk)
    assert (found.file_system, found.problem) == ("xfs", None)
    assert told(found.changes) == EXPECTED
    assert (guestfish / "heads").read_bytes() == b"XFSB\nXFSB\n"
    assert list((guestfish / "scratch").iterdir()) == []


def test_a_file_system_that_is_new_has_all_files_added(guestfish: Path) -> None:
    (guestfish / "state-a").mkdir()
    (guestfish / "state-a" / "one").write_bytes(b"1")
    with CowDisk(size=MIB) as disk:
        disk.pwrite(XFS, 0)
        (found,) = files(disk)
    assert told(found.changes) == {"/one": ("added", ())}


def test_what_cannot_be_mounted_is_a_problem_in_one_line(guestfish: Path) -> None:
    (guestfish / "bin" / "guestfish").write_text(
        "#!/bin/sh\ncat >/dev/null\nprintf 'libguestfs: error: mount_ro: bad superblock\\nmore\\n' >&2\nexit 1\n"
    )
    with CowDisk(size=MIB) as disk:
        disk.pwrite(XFS, 0)
        (found,) = files(disk)
    assert found.problem == (
        "`guestfish --ro` ended with status 1: libguestfs: error: mount_ro: bad superblock (libguestfs-test-tool tells more)"
    )
    assert list((guestfish / "scratch").iterdir()) == []


def test_a_virtual_machine_that_does_not_start_is_told_with_what_helps(guestfish: Path) -> None:
    (guestfish / "bin" / "guestfish").write_text(
        "#!/bin/sh\ncat >/dev/null\nprintf 'libguestfs: error: guestfs_launch failed.\nThis usually means\n' >&2\nexit 1\n"
    )
    with CowDisk(size=MIB) as disk:
        disk.pwrite(XFS, 0)
        (found,) = files(disk)
    assert found.problem is not None
    assert "set LIBGUESTFS_BACKEND_SETTINGS=force_tcg" in found.problem


def test_without_guestfish_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cowkit.programs.shutil.which", lambda *_, **__: None)
    with CowDisk(size=MIB) as disk:
        disk.pwrite(XFS, 0)
        (found,) = files(disk)
    assert found.problem is not None
    assert "guestfish is not installed" in found.problem
    assert "apt install libguestfs-tools" in found.problem


def test_an_encrypted_or_a_volume_manager_s_partition_is_not_looked_into() -> None:
    with CowDisk(size=MIB) as disk:
        disk.pwrite(b"LUKS\xba\xbe", 0)
        (found,) = files(disk)
    assert (found.file_system, found.problem) == ("luks", "it holds an encrypted volume, which is not looked into")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_real_guestfish_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not all(map(shutil.which, ("guestfish", "mkfs.vfat", "mcopy", "mdel"))):
        pytest.skip("not installed: libguestfs-tools, dosfstools or mtools")
    monkeypatch.setenv("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
    base, changed = tmp_path / "base.img", tmp_path / "changed.img"
    with base.open("wb") as file:
        file.truncate(40 * MIB)
    (tmp_path / "file").write_text("x")
    subprocess.run(["mkfs.vfat", base], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["mcopy", "-i", base, tmp_path / "file", "::old"], check=True)
    shutil.copyfile(base, changed)
    subprocess.run(["mcopy", "-i", changed, tmp_path / "file", "::new"], check=True)
    subprocess.run(["mdel", "-i", changed, "::old"], check=True)
    data = changed.read_bytes()
    with CowDisk(base) as disk:
        for at in range(0, len(data), 4096):
            if data[at : at + 4096] != disk.pread(4096, at):
                disk.pwrite(data[at : at + 4096], at)
        (found,) = files(disk)
    assert found.problem is None
    assert told(found.changes) == {"/old": ("removed", ()), "/new": ("added", ())}
