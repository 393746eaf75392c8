"""The reference's recipe (`qemu-img create` and `rebase`) against `cowkit diff`: both must give the very disk that was wrecked."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COWKIT = [sys.executable, "-m", "cowkit.cli.main"]
KIB, MIB, GIB, TIB = (1 << shift for shift in (10, 20, 30, 40))

pytestmark = pytest.mark.requires("qemu-img", modules=["nbd"])


def make_image(path: Path, size: int) -> None:
    """A sparse image with some data in it: at both ends, around 4 GiB, and here and there."""
    rng = random.Random(size)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(40):
            offset = rng.choice(
                [rng.randrange(size), rng.randrange(min(size, 64 * MIB)), max(0, min(size, 4 * GIB) - 50_000)]
            )
            file.seek(offset)
            file.write(rng.randbytes(min(rng.randrange(100_000), size - offset)))


def wreck(uri: str, size: int, count: int) -> None:
    """Random writes, zeroes and trims by libnbd; on large disks near each other, for what was written to be zeroed at times."""
    import nbd

    handle = nbd.NBD()
    handle.connect_uri(uri)
    rng = random.Random(size + 1)
    places = [rng.randrange(size) for _ in range(20)] + [
        0,
        max(0, min(size, 4 * GIB) - 300_000),
        max(0, size - 300_000),
    ]
    for _ in range(count):
        offset = min(rng.choice(places) + rng.randrange(300_000), size - 1)
        length = min(rng.choice([1, 511, 512, 4096, 10_000, 65_536]), size - offset)
        what = rng.random()
        if what < 0.6:
            handle.pwrite(rng.randbytes(length), offset)
        elif what < 0.8:
            handle.trim(min(4 * length, size - offset), offset)
        else:
            handle.zero(length, offset)
    handle.shutdown()


def qemu_img(*arguments: str | Path, cwd: Path) -> None:
    done = subprocess.run(["qemu-img", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"


@pytest.mark.long
def test_cowkit_diff_of_5_tib_gives_the_wrecked_disk_and_reads_what_is_dirty(tmp_path: Path) -> None:
    keep_differences(tmp_path, 5 * TIB, recipe=False)


@pytest.mark.parametrize(
    "size",
    [
        130_000,
        MIB + 512,
        4 * GIB,
        4 * GIB + 4 * KIB,
        # rebase reads all the 5 TiB twice, holes and all
        pytest.param(5 * TIB, marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_the_recipe_and_cowkit_diff_give_the_same_disk_and_leave_the_base_alone(tmp_path: Path, size: int) -> None:
    keep_differences(tmp_path, size, recipe=True)


def keep_differences(tmp_path: Path, size: int, *, recipe: bool) -> None:
    base = tmp_path / "disk.img"
    make_image(base, size)
    # A hash of the whole would take an hour at 5 TiB: there, of what is allocated.
    before = fingerprint(base)
    with subprocess.Popen([*COWKIT, "serve", "disk.img"], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        uri = server.stdout.readline().strip()
        wreck(uri, size, 2000)
        if recipe:
            path = uri.partition("socket=")[2]
            qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", f"nbd:unix:{path}", "a.qcow2", cwd=tmp_path)
            qemu_img("rebase", "-q", "-f", "qcow2", "-F", "raw", "-b", "disk.img", "a.qcow2", cwd=tmp_path)
        command = [*COWKIT, "diff", "--base", "disk.img", "-o", "b.qcow2", "--json"]
        report = json.loads(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout)
        for diff in ("a.qcow2", "b.qcow2") if recipe else ("b.qcow2",):
            qemu_img("check", "-q", diff, cwd=tmp_path)
            qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", diff, uri, cwd=tmp_path)
        if recipe:
            qemu_img("compare", "-q", "-f", "qcow2", "-F", "qcow2", "a.qcow2", "b.qcow2", cwd=tmp_path)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert fingerprint(base) == before
    assert report["backing_file"] == "disk.img"
    # Each dirty cluster's part of the base is read once, and what was written once.
    assert report["bytes_read"] <= report["dirty_bytes"] + 65_536 * (report["dirty_bytes"] // 4096 + 1)


def fingerprint(path: Path) -> str:
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        offset = 0
        while True:
            try:
                offset = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:
                return digest.hexdigest()
            end = os.lseek(file.fileno(), offset, os.SEEK_HOLE)
            digest.update(f"{offset}:{end}:".encode())
            while offset < end:
                piece = os.pread(file.fileno(), min(MIB, end - offset), offset)
                digest.update(piece)
                offset += len(piece)
