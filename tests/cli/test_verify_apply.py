"""`cowkit verify` and `cowkit apply`."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from cowkit import CowDisk
from cowkit.bases.unfinished import journal_of
from cowkit.diff.applying.in_place import apply_in_place
from tests.cli.helpers import COWKIT, Run, Serve, complaint, write

pytestmark = pytest.mark.requires("qemu-img", "qemu-nbd", "setpriv", modules=["nbd"])


@pytest.fixture
def changed(base: Path, tmp_path: Path) -> bytes:
    """What the disk reads as whose difference is diff.qcow2."""
    with CowDisk(base) as disk:
        disk.pwrite(b"changed", 7000)  # where a block is sampled
        disk.zero(8192, 500_000)
        disk.diff(tmp_path / "diff.qcow2")
        return disk.pread(disk.size, 0)


@pytest.mark.usefixtures("changed")
def test_verify_ends_with_0_1_or_2(cowkit: Run, serve: Serve) -> None:
    done = cowkit("verify", "diff.qcow2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "held, the same to both readers" in done.stdout
    server = serve("disk.img", "--overlay", "diff.qcow2")
    assert cowkit("verify", "diff.qcow2", "--against", server.uri).returncode == 0
    write(server.uri, b"later", 4096)
    done = cowkit("verify", "diff.qcow2", "--against", server.uri, "--json")
    assert (done.returncode, done.stderr) == (1, "")
    told = json.loads(done.stdout)
    assert (told["schema"], told["same"]) == (1, False)
    assert told["differences"] == [{"offset": 4096, "length": 512, "reader": "against"}]
    assert "no qcow2 image" in complaint(cowkit("verify", "disk.img"))
    assert "No such file" in complaint(cowkit("verify", "none.qcow2"))


def test_apply_makes_a_copy(cowkit: Run, changed: bytes, tmp_path: Path) -> None:
    done = cowkit("apply", "diff.qcow2", "--to", "new.img", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "new.img").read_bytes() == changed
    assert json.loads(done.stdout)["in_place"] is False
    subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "new.img", "diff.qcow2"], cwd=tmp_path, check=True)


def test_apply_in_place_is_asked_for_twice(cowkit: Run, changed: bytes, base: Path) -> None:
    before = base.read_bytes()
    assert "say --force, too" in complaint(cowkit("apply", "diff.qcow2", "--in-place"))
    assert base.read_bytes() == before
    done = cowkit("apply", "diff.qcow2", "--in-place", "--force")
    assert (done.returncode, done.stderr) == (0, "")
    assert "it is another base now: differences to it as it was are refused from now on" in done.stdout
    assert base.read_bytes() == changed
    assert "another base" in complaint(cowkit("apply", "diff.qcow2", "--in-place", "--force"))
    assert "another base" in complaint(cowkit("serve", "disk.img", "--overlay", "diff.qcow2"))


@pytest.mark.parametrize("said", ["disk.img", "yes"])
def test_on_a_terminal_the_name_of_the_base_is_the_second_yes(
    said: str, changed: bytes, base: Path, tmp_path: Path
) -> None:
    before = base.read_bytes()
    ours, theirs = pty.openpty()
    command = [*COWKIT, "apply", "diff.qcow2", "--in-place"]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, cwd=tmp_path) as process:
        os.write(ours, said.encode() + b"\n")
        assert process.wait(60) == (0 if said == "disk.img" else 2)
    os.close(theirs)
    os.close(ours)
    assert base.read_bytes() == (changed if said == "disk.img" else before)


@pytest.mark.usefixtures("changed")
def test_a_base_that_is_being_served_is_left_alone(cowkit: Run, serve: Serve, base: Path) -> None:
    before = base.read_bytes()
    server = serve("disk.img")
    for arguments in (("diff.qcow2", "--in-place", "--force"), ("--finish", "disk.img")):
        said = complaint(cowkit("apply", *arguments))
        assert f"it is the base of the disk disk.img that process {server.pid} serves; end that first" in said
    assert base.read_bytes() == before


def test_a_base_that_a_served_difference_stands_on_is_left_alone(
    cowkit: Run, serve: Serve, base: Path, changed: bytes, tmp_path: Path
) -> None:
    before = base.read_bytes()
    server = serve("diff.qcow2")
    said = complaint(cowkit("apply", "diff.qcow2", "--in-place", "--force"))
    assert f"the disk diff.qcow2 that process {server.pid} serves stands on it, by way of its base" in said
    assert base.read_bytes() == before


def test_finish_goes_on_from_the_journal(
    cowkit: Run, changed: bytes, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(fd: int, data: memoryview, offset: int) -> None:
        raise KeyboardInterrupt

    assert "there is nothing to finish" in complaint(cowkit("apply", "--finish", "disk.img"))
    unready = Path(journal_of(str(base)) + ".new")
    unready.write_bytes(b"cowkit")
    done = cowkit("apply", "--finish", "disk.img")
    assert (done.returncode, unready.exists()) == (0, False)
    assert "disk.img is as it was" in done.stderr
    with monkeypatch.context() as patch:
        patch.setattr("cowkit.diff.applying.in_place.pwrite_whole", interrupted)
        with pytest.raises(KeyboardInterrupt):
            apply_in_place(tmp_path / "diff.qcow2")
    (tmp_path / "diff.qcow2").unlink()
    said = complaint(cowkit("serve", "disk.img"))
    assert said.endswith("finish it with `cowkit apply --finish disk.img`")
    done = cowkit("apply", "--finish", "disk.img")
    assert (done.returncode, done.stderr) == (0, "")
    assert base.read_bytes() == changed
    assert not os.path.exists(journal_of(str(base)))


def test_a_difference_of_another_program_is_taken_with_a_word_about_it(cowkit: Run, base: Path, tmp_path: Path) -> None:
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "disk.img", "diff.qcow2"]
    subprocess.run(create, cwd=tmp_path, check=True)
    for arguments in (("verify", "diff.qcow2"), ("apply", "diff.qcow2", "--to", "new.img")):
        done = cowkit(*arguments)
        assert done.returncode == 0
        assert done.stderr.startswith("cowkit: diff.qcow2 does not record who its base is: ")
        assert done.stderr.count("\n") == 1
    assert (tmp_path / "new.img").read_bytes() == base.read_bytes()


@pytest.mark.usefixtures("changed")
def test_of_a_chain_the_one_that_does_not_know_its_base_is_named(cowkit: Run, base: Path, tmp_path: Path) -> None:
    with CowDisk(tmp_path / "diff.qcow2") as disk:
        disk.pwrite(b"on top", 90_000)
        disk.diff(tmp_path / "top.qcow2")
    convert = ["qemu-img", "convert", "-O", "qcow2", "-B", "disk.img", "-F", "raw", "diff.qcow2", "again"]
    subprocess.run(convert, cwd=tmp_path, check=True)
    (tmp_path / "again").replace(tmp_path / "diff.qcow2")
    to_a_copy = ("apply", "top.qcow2", "--to", "new.img")
    for arguments in (("verify", "top.qcow2"), to_a_copy, ("apply", "top.qcow2", "--in-place", "--force")):
        done = cowkit(*arguments)
        assert done.returncode == 0
        assert done.stderr.startswith(f"cowkit: {tmp_path}/diff.qcow2 does not record who its base is: ")
        assert done.stderr.count("\n") == 1
    assert (tmp_path / "new.img").read_bytes() == base.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ("apply", "diff.qcow2"),
        ("apply", "diff.qcow2", "--to", "new.img", "--in-place"),
        ("apply", "diff.qcow2", "--to", "new.img", "--force"),
        ("apply", "--to", "new.img"),
        ("apply", "diff.qcow2", "--finish", "disk.img"),
        ("verify",),
        ("verify", "diff.qcow2", "--hash", "md5"),
    ],
)
@pytest.mark.usefixtures("changed")
def test_what_makes_no_sense_is_one_line(arguments: tuple[str, ...], cowkit: Run) -> None:
    assert complaint(cowkit(*arguments))


@pytest.mark.usefixtures("changed")
def test_no_output_replaces_the_base_of_a_disk_that_another_process_serves(
    cowkit: Run, serve: Serve, base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(base.read_bytes())
    top = tmp_path / "top.qcow2"
    with CowDisk(other) as disk:
        disk.diff(top)
    serve("disk.img")
    for served, words in (
        ("other.img", "it is the base of the disk other.img that process {} serves; end that first"),
        ("top.qcow2", "the disk top.qcow2 that process {} serves stands on it, by way of its base"),
    ):
        server = serve(served)
        for arguments in (
            ("run", "disk.img", "--diff", "other.img", "--", "true"),
            ("diff", "--base", "disk.img", "-o", "other.img"),
            ("diff", "--base", "disk.img", "-o", "other.img", "--raw"),
            ("diff", "--base", "disk.img", "--from", "diff.qcow2", "-o", "other.img"),
            ("diff", "--base", "disk.img", "--stat", "--svg", "other.img"),
            ("map", "diff.qcow2", "--svg", "other.img"),
            ("apply", "diff.qcow2", "--to", "other.img"),
        ):
            assert words.format(server.pid) in complaint(cowkit(*arguments)), arguments
            assert other.read_bytes() == base.read_bytes()
        server.end()
    # Nobody serves it any more
    assert cowkit("apply", "diff.qcow2", "--to", "other.img").returncode == 0


@pytest.mark.usefixtures("changed")
def test_apply_writes_no_file_called_as_standard_output(cowkit: Run, tmp_path: Path) -> None:
    said = complaint(cowkit("apply", "diff.qcow2", "--to", "-"))
    assert "cannot be written to standard output: name a file (./- if it is to be called -)" in said
    assert not (tmp_path / "-").exists()
    assert cowkit("apply", "diff.qcow2", "--to", "./-").returncode == 0
    assert (tmp_path / "-").exists()
