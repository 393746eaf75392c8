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
    expected = dict(EXPECTED)
    if "-I" in options:  # inodes without fractions of seconds, or when they were made: a file that was written again is another
        pass
    assert told(found.changes) == expected
    (renamed,) = (each for each in found.changes if each.change == "renamed")
    assert (renamed.renamed_from, renamed.path) == ("/moved", "/after")
    by_path = {each.path: each for each in found.changes}
    assert (by_path["/added"].size, by_path["/removed"].size_before, by_path["/fresh"].type) == (9000, 7000, "directory")
