"""Images of other formats, read by a qemu-nbd that goes with its base."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cowkit.bases import open_base
from cowkit.bases.image import ImageBase
from cowkit.disk import Base, Disk
from cowkit.errors import BaseChangedError, BaseError, BaseOpenError, MissingToolError
from tests.bases.helpers import MIB, check_extents, check_reads, children, qemu_img

pytestmark = [
    pytest.mark.requires("qemu-img", "qemu-nbd", "setpriv", modules=["nbd"]),
    pytest.mark.usefixtures("no_leaks"),
]

NAMES = {
    "qcow2": "qcow2",
    "qcow": "qcow",
    "vmdk": "vmdk",
    "vdi": "vdi",
    "vhdx": "vhdx",
    "vpc": "vhd",
    "qed": "qed",
    "parallels": "hdd",
}


def pid_of(base: Base) -> int:
    assert isinstance(base, ImageBase)
    process = base._server._process
    assert process is not None
    return process.pid


@pytest.mark.parametrize("format", NAMES)
def test_random_reads_of_several_threads_are_the_raw_disks(raw: Path, tmp_path: Path, format: str) -> None:
    os.truncate(raw, 8 * MIB)  # whole clusters of each format, and some without data
    content = raw.read_bytes()
    image = tmp_path / f"disk.{NAMES[format]}"
    options = ["-o", "force_size=on"] if format == "vpc" else []
    qemu_img("convert", "-f", "raw", "-O", format, *options, raw, image)
    base = open_base(image)
    assert (base.backing_format, base.backing_refusal) == (format, None)
    assert base.path == base.given == str(image)
    if base.size > len(content):  # some formats round up
        content += bytes(base.size - len(content))
    check_reads(base, content)
    # QEMU's drivers of vhdx and parallels tell nothing about holes.
    assert check_extents(base, content, 0, len(content)) > 0 or format in ("vhdx", "parallels")
    base.verify()
    base.verify_path()
    base.release()


@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
def test_both_kinds_of_vhd_are_known_by_their_footer_or_header(raw: Path, tmp_path: Path, subformat: str) -> None:
    os.truncate(raw, 3 * MIB)
    image = tmp_path / "disk.vhd"
    qemu_img("convert", "-f", "raw", "-O", "vpc", "-o", f"subformat={subformat},force_size=on", raw, image)
    base = open_base(image)
    assert base.pread(3 * MIB, 0) == raw.read_bytes()
    base.release()


def test_a_vmdk_of_several_files_is_read_and_watched(raw: Path, tmp_path: Path) -> None:
    os.truncate(raw, 3 * MIB)
    image = tmp_path / "disk.vmdk"
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", raw, image)
    base = open_base(image)
    check_reads(base, raw.read_bytes(), rounds=5)
    with (tmp_path / "disk-flat.vmdk").open("r+b") as file:
        file.write(b"changed")
    with pytest.raises(BaseChangedError, match=r"disk-flat\.vmdk changed while it was in use"):
        base.verify()
    base.release()


def chain(raw: Path, tmp_path: Path) -> tuple[Path, bytes]:
    """A raw disk, a qcow2 image on it, one more on that; names with a comma and a space; and what they read as."""
    content = bytearray(raw.read_bytes())
    middle, top = tmp_path / "mid, dle.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", raw.name, middle)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", middle.name, top)
    for image, offset in ((middle, 4096), (top, 1 << 20)):
        subprocess.run(["qemu-io", "-c", f"write -P 7 {offset} 4096", image], check=True, stdout=subprocess.DEVNULL)
        content[offset : offset + 4096] = b"\x07" * 4096
    return top, bytes(content)


@pytest.mark.requires("qemu-io")
def test_a_chain_of_backing_files_is_followed_and_watched(raw: Path, tmp_path: Path) -> None:
    top, content = chain(raw, tmp_path)
    base = open_base(top)
    check_reads(base, content, rounds=10)
    base.verify_path()
    with raw.open("r+b") as file:
        file.write(b"changed")
    with pytest.raises(BaseChangedError, match=r"disk\.img changed while it was in use"):
        base.verify()
    base.release()


@pytest.mark.requires("qemu-io")
def test_a_missing_backing_file_is_told(raw: Path, tmp_path: Path) -> None:
    top, _ = chain(raw, tmp_path)
    raw.unlink()
    with pytest.raises(BaseOpenError, match=r"mid, dle\.qcow2 needs .*disk\.img: .*No such file or directory"):
        open_base(top)


def without_backing_format(image: Path, backing: Path) -> None:
    """As QEMU made them before 6.1: the image names its backing file and not its format."""
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", backing, image, "3M")
    head = bytearray(image.read_bytes())
    assert head[104:108] == b"\xe2\x79\x2a\xca" or head[112:116] == b"\xe2\x79\x2a\xca"
    place = head.index(b"\xe2\x79\x2a\xca")
    head[place : place + 4] = b"\x7f\x7f\x7f\x7f"  # an extension that nobody knows, to be ignored
    image.write_bytes(head)


def test_a_backing_file_of_untold_format_is_never_guessed(raw: Path, tmp_path: Path, content: bytes) -> None:
    image = tmp_path / "disk.qcow2"
    without_backing_format(image, raw)
    base = open_base(image)  # neither its name nor its content speaks of a format: raw
    assert base.pread(MIB, 0) == content[:MIB]
    base.release()

    secret = tmp_path / "secret"
    secret.write_bytes(b"the host's secret".ljust(MIB, b"\0"))
    evil = tmp_path / "evil.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, evil)
    with raw.open("r+b") as file:  # what a guest with this raw disk could do
        file.write(evil.read_bytes())
    with pytest.raises(BaseOpenError, match=r"does not say which format its backing file .* guessing is not safe"):
        open_base(image)
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", raw, image)
    base = open_base(image)
    assert base.pread(4, 0) == b"QFI\xfb"
    base.release()


def test_an_image_that_qemu_refuses_is_one_line(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    image.write_bytes(b"QFI\xfb\0\0\0\x03" + bytes(5000))
    with pytest.raises(BaseOpenError, match=r"cannot open base .*disk\.qcow2 as qcow2: ") as caught:
        open_base(image)
    assert "\n" not in str(caught.value)


def test_a_qemu_nbd_that_does_not_start_tells_why(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    program = tmp_path / "qemu-nbd"
    program.write_text("#!/bin/sh\necho 'qemu-nbd: Failed to open: Permission denied' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(BaseOpenError, match=r"cannot open base .*disk\.qcow2: Failed to open: Permission denied$"):
        open_base(image)


@pytest.mark.parametrize("program", ["qemu-nbd", "qemu-img", "setpriv"])
def test_a_missing_program_is_told_with_how_to_get_it(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == program else which(name))
    with pytest.raises(MissingToolError, match=f"{program} is not installed, .*apt install"):
        open_base(image)


def test_a_qemu_nbd_that_dies_fails_reads_and_leaves_no_zombie(raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    before = children()  # of tests in this process that came before
    base = open_base(image)
    watched = os.pidfd_open(pid_of(base))
    os.kill(pid_of(base), signal.SIGKILL)
    assert select.select([watched], [], [], 30)[0]
    os.close(watched)
    with pytest.raises(BaseError, match="the NBD server behind it has gone"):
        base.pread(4096, 0)
    assert isinstance(base, ImageBase)
    base._server._keeper.join()  # it has taken away what was left of the process
    assert children() == before
    base.release()


def test_closing_leaves_nothing_and_a_base_of_a_thread_that_ended_lives_on(
    raw: Path, tmp_path: Path, content: bytes
) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    before = children()
    opened: list[Base] = []
    opener = threading.Thread(target=lambda: opened.append(open_base(image)))
    opener.start()
    opener.join()  # PR_SET_PDEATHSIG goes by the thread
    (base,) = opened
    assert base.pread(4096, 0) == content[:4096]
    assert len(children()) == len(before) + 1
    base.release()
    assert children() == before


def test_qemu_nbd_goes_when_python_is_killed(raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    program = (
        "import sys; from cowkit.bases import open_base; base = open_base(sys.argv[1]); base.pread(4096, 0)\n"
        "print(base._server._process.pid, flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", program, str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as python:
        assert python.stdout is not None
        watched = os.pidfd_open(int(python.stdout.readline()))
        assert not select.select([watched], [], [], 0)[0]
        python.kill()
    assert select.select([watched], [], [], 30)[0]
    os.close(watched)
    assert list(temporary.iterdir()) == []


def test_the_engine_reads_and_writes_on_top_of_it(raw: Path, content: bytes, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    before = image.read_bytes()
    with Disk(open_base(image), tmpdir=tmp_path) as disk:
        disk.pwrite(b"boo", 1_000_001)
        assert disk.pread(4096, 1_000_000) == content[1_000_000:1_000_001] + b"boo" + content[1_000_004:1_004_096]
    assert image.read_bytes() == before
