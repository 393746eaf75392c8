"""`cowkit demo`: what it leaves in a folder of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.helpers import Run, complaint


@pytest.mark.parametrize("name", ["disk.img", "diff.qcow2"])
def test_a_file_of_the_users_is_not_replaced(cowkit: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("precious")
    said = complaint(cowkit("demo", "--keep", "mine"))
    assert said == f"mine/{name} is there already, and would be replaced: move it, or name another directory"
    assert [each.name for each in (tmp_path / "mine").iterdir()] == [name]
    assert (tmp_path / "mine" / name).read_text() == "precious"


@pytest.mark.requires("mke2fs", "e2fsck")
def test_nothing_else_is_touched_whatever_the_folder_is_called(cowkit: Run, tmp_path: Path) -> None:
    folder = tmp_path / "dé mo: x"
    folder.mkdir()
    (folder / "look.img").write_text("precious")
    done = cowkit("demo", "--keep", folder.name)
    assert (done.returncode, done.stderr) == (0, "")
    assert {each.name for each in folder.iterdir()} == {"disk.img", "diff.qcow2", "look.img"}
    assert (folder / "look.img").read_text() == "precious"
    assert f"qemu-img info './{folder.name}/diff.qcow2'" in done.stdout
