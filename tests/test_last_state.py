"""The last state of a closed disk: what can still be had of it, and that nothing of it stays when it is forgotten."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cowkit import CowDisk
from cowkit.errors import BaseChangedError, DiskClosedError

SERVERS = pytest.mark.parametrize("server", ["thread", "process"])


def content(image: Path) -> bytes:
    raw = image.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    return raw.read_bytes()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"base" * (1 << 18))
    return path


@pytest.mark.requires("qemu-img")
@SERVERS
def test_a_closed_disk_gives_the_difference_that_it_would_have_given_open(
    base: Path, tmp_path: Path, server: Any
) -> None:
    with CowDisk(base, server=server) as disk:
        disk.keep_last_state()
        disk.pwrite(b"first", 0)
        disk.checkpoint("point")
        disk.pwrite(b"second", 70_000)
        disk.zero(8192, 8192)
        before, seen = disk.diff(tmp_path / "open.qcow2"), disk.pread(1 << 20, 0)
    assert disk.closed
    assert disk.last_dirty_bytes == before.dirty_bytes == 16384
    after = disk.diff(tmp_path / "closed.qcow2")
    assert after.changed == before.changed
    assert content(tmp_path / "closed.qcow2") == seen
    with pytest.raises(DiskClosedError):
        disk.diff(tmp_path / "since.qcow2", since="point")
    for use in (lambda: disk.pread(1, 0), lambda: disk.pwrite(b"x", 0), disk.checkpoint):
        with pytest.raises(DiskClosedError):
            use()
    disk.forget_last_state()
    disk.forget_last_state()
    assert disk.last_dirty_bytes == 0
    with pytest.raises(DiskClosedError):
        disk.diff(tmp_path / "forgotten.qcow2")


@pytest.mark.requires("qemu-img", "qemu-nbd", modules=["nbd"])
@SERVERS
def test_a_base_behind_a_server_stays_there_until_the_last_state_is_forgotten(
    base: Path, tmp_path: Path, server: Any
) -> None:
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", base, image], check=True)
    with CowDisk(image, server=server) as disk:
        disk.keep_last_state()
        disk.pwrite(b"x", 5000)
        assert disk.uri
    disk.diff(tmp_path / "diff.qcow2")
    disk.forget_last_state()
    assert (
        content(tmp_path / "diff.qcow2")[4998:5003]
        == base.read_bytes()[4998:5000] + b"x" + base.read_bytes()[5001:5003]
    )


@SERVERS
def test_a_base_that_changed_is_told_at_closing_and_at_the_difference(base: Path, tmp_path: Path, server: Any) -> None:
    disk = CowDisk(base, server=server)
    disk.keep_last_state()
    disk.pwrite(b"x", 0)
    os.truncate(base, 4096)
    with pytest.raises(BaseChangedError):
        disk.close()
    with pytest.raises(BaseChangedError):
        disk.diff(tmp_path / "diff.qcow2")
    disk.forget_last_state()


def test_no_descriptor_is_left_when_it_is_forgotten_and_the_last_bytes_count(base: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for size in (130_000, 1 << 20):
        disk = CowDisk(size=size, block_size="64K")
        disk.keep_last_state()
        disk.pwrite(b"x", size - 1)
        disk.close()
        assert disk.last_dirty_bytes == size - (size - 1) // 65536 * 65536
        disk.forget_last_state()
    disk = CowDisk(base)
    disk.keep_last_state()
    disk.close()
    assert disk.last_dirty_bytes == 0
    disk.forget_last_state()
    assert len(os.listdir("/proc/self/fd")) == before
