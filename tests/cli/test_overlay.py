"""`cowkit serve --overlay` and `cowkit run --overlay`, and `cowkit diff --hash`."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from cowkit.cow_disk import CowDisk
from cowkit.diff import Qcow2Image
from cowkit.diff.recorded import Recorded
from cowkit.errors import WrongBaseError
from tests.cli.helpers import COWKIT, Run, Serve, complaint, content, read, write

pytestmark = pytest.mark.requires(modules=["nbd"])


def test_serving_goes_on_from_an_earlier_difference(cowkit: Run, serve: Serve, base: Path, tmp_path: Path) -> None:
    server = serve("disk.img")
    write(server.uri, b"first", 4096)
    assert cowkit("diff", "--base", "disk.img", "-o", "d1.qcow2").returncode == 0
    server.end()
    server = serve("disk.img", "--overlay", "d1.qcow2")
    assert read(server.uri, 5, 4096) == b"first"
    write(server.uri, b"second", 70_000)
    assert (
        cowkit("diff", "--base", "disk.img", "--since", "overlay", "--backing", "d1.qcow2", "-o", "d2.qcow2").returncode
        == 0
    )
    assert cowkit("diff", "--base", "disk.img", "-o", "both.qcow2").returncode == 0
    server.end()
    both = content(tmp_path / "both.qcow2", base)
    assert (both[4096:4101], both[70_000:70_006]) == (b"first", b"second")
    done = cowkit("run", "disk.img", "--overlay", "d2.qcow2", "--", "true")
    assert done.stderr == "cowkit: nothing was written on top of disk.img with d2.qcow2\n"
    done = cowkit("run", "disk.img", "--overlay", "d2.qcow2", "--diff", "same.qcow2", "--", "true")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "same.qcow2", base) == both


def test_what_is_said_to_be_written_is_what_clients_wrote_and_not_what_the_difference_held(
    cowkit: Run, serve: Serve, base: Path
) -> None:
    server = serve("disk.img")
    write(server.uri, b"first", 4096)
    assert cowkit("diff", "--base", "disk.img", "-o", "d1.qcow2").returncode == 0
    server.end()
    server = serve("disk.img", "--overlay", "d1.qcow2")
    assert read(server.uri, 5, 4096) == b"first"
    assert server.end() == (0, "", "cowkit: nothing was written on top of disk.img with d1.qcow2\n")
    server = serve("disk.img", "--overlay", "d1.qcow2")
    write(server.uri, b"again", 4096)
    write(server.uri, b"more", 70_000)
    assert server.end() == (0, "", "cowkit: 8 KiB written on top of disk.img with d1.qcow2, thrown away\n")
    server = serve("disk.img", "--overlay", "d1.qcow2")
    assert cowkit("reset", "--base", "disk.img").returncode == 0
    write(server.uri, b"after", 4096)
    assert server.end() == (0, "", "cowkit: 4 KiB written on top of disk.img, thrown away\n")


def test_a_difference_to_another_base_is_refused_in_one_line(cowkit: Run, base: Path, tmp_path: Path) -> None:
    assert cowkit("run", "disk.img", "--diff", "d1.qcow2", "--", "true").returncode == 0
    (tmp_path / "other.img").write_bytes(bytes(base.stat().st_size))
    said = complaint(cowkit("serve", "other.img", "--overlay", "d1.qcow2"))
    assert said.startswith("d1.qcow2 is a difference to another base than other.img: blocks that were sampled differ; ")


def test_what_an_overlay_stood_on_is_not_replaced(cowkit: Run, serve: Serve, base: Path, tmp_path: Path) -> None:
    assert cowkit("run", "disk.img", "--diff", "d1.qcow2", "--", "true").returncode == 0
    serve("disk.img", "--overlay", "d1.qcow2")
    assert cowkit("diff", "--since", "overlay", "--backing", "d1.qcow2", "-o", "d2.qcow2").returncode == 0
    before = (tmp_path / "d1.qcow2").read_bytes()
    said = complaint(cowkit("run", base, "--overlay", "d2.qcow2", "--diff", "d1.qcow2", "--", "touch", "was-run"))
    assert said.startswith("cannot write d1.qcow2: it is the same file as ") and said.endswith(
        ", which is still needed"
    )
    serve("disk.img", "--overlay", "d2.qcow2", "--name", "two")
    said = complaint(cowkit("diff", "--from", "two", "-o", "d1.qcow2"))
    assert said.startswith(f"cannot write {tmp_path / 'd1.qcow2'}: it is the same file as ")
    assert not (tmp_path / "was-run").exists()
    assert (tmp_path / "d1.qcow2").read_bytes() == before
    assert cowkit("diff", "--from", "two", "-o", "d2.qcow2").returncode == 0, "what was loaded itself is not needed"


def test_the_digest_of_the_whole_base_is_that_of_sha256sum(
    cowkit: Run, serve: Serve, base: Path, tmp_path: Path
) -> None:
    serve("disk.img")
    assert cowkit("diff", "--base", "disk.img", "-o", "d.qcow2", "--hash", "full").returncode == 0
    with Qcow2Image(tmp_path / "d.qcow2") as image:
        identity = Recorded.of_image(image).base
    assert identity is not None
    assert identity.full == hashlib.sha256(base.read_bytes()).hexdigest()
    said = complaint(cowkit("diff", "--base", "disk.img", "-o", "d.qcow2", "--hash", "full", "--raw"))
    assert "leave out hash" in said


@pytest.mark.parametrize(
    "command",
    [
        ("serve", "disk.img", "--overlay", "pipe"),
        ("verify", "pipe"),
        ("apply", "pipe", "--to", "new.img"),
        ("map", "pipe"),
    ],
    ids=lambda words: words[0],
)
def test_a_pipe_is_no_difference_and_nobody_waits_for_its_writer(
    cowkit: Run, base: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is a pipe, and no image" in complaint(cowkit(*command))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_its_base_is_being_opened(tmp_path: Path, number: signal.Signals) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "silent"))
        listener.listen()
        uri = f"nbd+unix:///?socket={tmp_path}/silent"
        process = subprocess.Popen([*COWKIT, "serve", uri], stdout=subprocess.PIPE)
        client, _ = listener.accept()  # it waits for a greeting from here on
        with client, process:
            process.send_signal(number)
            assert process.communicate(timeout=20)[0] == b""
            assert process.returncode == 128 + number


def test_a_base_does_not_stand_in_for_a_difference_that_is_missing(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(b"x".ljust(64 << 20, b"\0"))
    with CowDisk(base) as disk:
        disk.pwrite(b"1" * 4096, 30728 * 1024)  # where no block is sampled
        disk.checkpoint("mon")
        disk.diff(tmp_path / "d1.qcow2", at="mon")
        disk.pwrite(b"2" * 4096, 50 << 20)
        disk.diff(tmp_path / "d2.qcow2", since="mon", backing_file="d1.qcow2")
    with CowDisk(base, overlay=tmp_path / "d2.qcow2") as disk:
        assert disk.pread(1, 30728 * 1024) == b"1"
    (tmp_path / "d1.qcow2").unlink()
    with pytest.raises(WrongBaseError, match=r"d1\.qcow2, which is missing"):
        CowDisk(base, overlay=tmp_path / "d2.qcow2")
