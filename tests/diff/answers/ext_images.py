"""Ext file systems made and changed without root: by mke2fs -d and debugfs -w."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from cowkit import CowDisk
from cowkit.diff.answers.file_change import FileChange, FileSystemChanges

MIB = 1 << 20
ENVIRONMENT = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "DEBUGFS_PAGER": "__none__"}

SCRIPT = """
set_inode_field /times mtime 20010101000000
set_inode_field /mode mode 0100600
set_inode_field /owner uid 1000
ea_set /attributes user.colour blue
rm /removed
write new.bin added
mkdir fresh
write new.bin fresh/inside
unlink link
symlink link elsewhere
rm /rewritten
write rewritten.bin rewritten
ln /moved after
unlink moved
mknod pipe p
"""
"""What is done to the tree below, besides the change in place; as debugfs(8) has it."""

EXPECTED = {
    "/times": ("changed", ("times",)),
    "/mode": ("changed", ("mode",)),
    "/owner": ("changed", ("owner",)),
    "/attributes": ("changed", ("attributes",)),
    "/removed": ("removed", ()),
    "/added": ("added", ()),
    "/fresh": ("added", ()),
    "/fresh/inside": ("added", ()),
    "/link": ("changed", ("target", "times")),
    "/rewritten": ("changed", ("content", "times")),
    "/after": ("renamed", ()),
    "/pipe": ("added", ()),
    "/deep/er/in place": ("changed", ("content",)),
}


def tool(
    *command: str | os.PathLike[str], given: str | None = None, cwd: Path | None = None, answers: tuple[int, ...] = (0,)
) -> str:
    """The output of a command that succeeds."""
    done = subprocess.run(
        command,
        input=given,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        env=ENVIRONMENT,
        cwd=cwd,
        check=False,
    )
    assert done.returncode in answers, done.stdout + done.stderr
    return done.stdout


def make_tree(folder: Path) -> Path:
    """The files that the script changes, and others beside each of them that it does not."""
    (folder / "deep" / "er").mkdir(parents=True)
    names = ["times", "mode", "owner", "attributes", "removed", "rewritten", "moved", "same", "deep/er/in place"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(bytes([number + 1]) * 7000)
    for number in range(20):  # files beside each other, several to a block of the disk
        (folder / "deep" / f"small {number}").write_bytes(b"%d" % number * 500)
    (folder / "link").symlink_to("somewhere")
    (folder / "slow").symlink_to("far/" * 40)
    (folder / os.fsdecode(b"new\nline \xff")).write_bytes(b"odd")
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (10**9, 10**9), follow_symlinks=False)
    return folder


def make_image(path: Path, tree: Path | None, *options: str, size: int = 24 * MIB, offset: int = 0) -> Path:
    """An image with such a file system from ``offset`` on."""
    part = path if not offset else path.with_suffix(".part")
    with part.open("wb") as file:
        file.truncate(size)
    tool("mke2fs", "-q", "-F", *options, *(() if tree is None else ("-d", tree)), part)
    if offset:
        with path.open("r+b") as whole:
            whole.seek(offset)
            whole.write(part.read_bytes())
        part.unlink()
    return path


def debugfs(image: Path, script: str, *, offset: int = 0) -> None:
    """Have debugfs change the image."""
    (image.parent / "new.bin").write_bytes(b"new" * 3000)
    (image.parent / "rewritten.bin").write_bytes(b"again" * 1400)
    tool("debugfs", "-w", "-f", "-", f"{image}?offset={offset}", given=script, cwd=image.parent)


def change_in_place(image: Path, name: str, *, offset: int = 0, at: int = 3000) -> None:
    """Change a byte of a file's content, and nothing else."""
    blocks = tool("debugfs", "-R", f'blocks "{name}"', f"{image}?offset={offset}").split()
    size = next(
        int(line.split(":")[1])
        for line in tool("debugfs", "-R", "stats -h", f"{image}?offset={offset}").splitlines()
        if line.startswith("Block size")
    )
    with image.open("r+b") as file:
        place = offset + int(blocks[at // size]) * size + at % size
        file.seek(place)
        old = file.read(1)
        file.seek(place)
        file.write(bytes([old[0] ^ 0xFF]))


def put_on(disk: CowDisk, image: Path) -> None:
    """Write to ``disk`` what ``image`` has differently, in pieces of 512 bytes."""
    data = image.read_bytes()
    for start in range(0, len(data), 65536):
        old = disk.pread(min(65536, len(data) - start), start)
        if old == data[start : start + len(old)]:
            continue
        for at in range(0, len(old), 512):
            if old[at : at + 512] != data[start + at : start + at + 512]:
                disk.pwrite(data[start + at : start + at + 512], start + at)


def files(disk: CowDisk, **options: object) -> tuple[FileSystemChanges, ...]:
    """What the disk's report has."""
    found = disk.changes(files=True, **options).files  # type: ignore[arg-type]
    assert found is not None
    return found


def told(changes: Iterable[FileChange]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Each path with what became of it."""
    return {each.path: (each.change, each.what) for each in changes}
