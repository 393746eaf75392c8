"""Real clients: what libnbd's tools, QEMU's tools and fio say and do agrees with what the disk knows."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cowkit.disk import Disk, FileBase, Kind
from cowkit.server.server import NbdServer
from tests.server.raw_client import serving

BLOCK = 4096
COUNT = 400
SIZE = COUNT * BLOCK + 1536  # qemu wants whole sectors


def run(*command: str | os.PathLike[str], cwd: Path | None = None) -> str:
    words = [os.fspath(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=90, cwd=cwd)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NbdServer]:
    """A disk over a sparse base after random writes, zeroes, trims and checkpoints."""
    rng = random.Random(7)
    path = tmp_path / "sparse.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for _ in range(20):
            file.seek(rng.randrange(COUNT - 4) * BLOCK)
            file.write(rng.randbytes(rng.randrange(1, 4) * BLOCK))
        os.fsync(file.fileno())
    with serving(FileBase(path)) as server:
        disk = server.disk
        for step in range(120):
            offset = rng.randrange(SIZE)
            length = min(rng.choice([1, 500, BLOCK, 8 * BLOCK]), SIZE - offset)
            match rng.randrange(4):
                case 0:
                    disk.trim(length, offset)
                case 1:
                    disk.zero(length, offset)
                case _:
                    disk.pwrite(rng.randbytes(length), offset)
            if step in (40, 80):
                disk.checkpoint(f"at-{step}")
        yield server


Runs = list[tuple[int, int, int]]


def joined(runs: Iterable[tuple[int, int, int]]) -> Runs:
    """Offset, length and state, with neighbours of one state as one."""
    found: Runs = []
    for offset, length, state in runs:
        if found and found[-1][2] == state and found[-1][0] + found[-1][1] == offset:
            found[-1] = (found[-1][0], found[-1][1] + length, state)
        else:
            found.append((offset, length, state))
    return found


def with_gaps(runs: Iterable[tuple[int, int]], state: int) -> Runs:
    """The whole disk: ``state`` in the runs and 0 between them."""
    found: Runs = []
    at = 0
    for offset, length in runs:
        if offset > at:
            found.append((at, offset - at, 0))
        found.append((offset, length, state))
        at = offset + length
    return joined([*found, *([(at, SIZE - at, 0)] if at < SIZE else [])])


def known(disk: Disk, context: str) -> Runs:
    """What the disk itself says of a context."""
    if context == "base:allocation":
        return joined((e.offset, e.length, 0 if e.kind is Kind.DATA else 3) for e in disk.allocation(0, SIZE))
    name = context.removeprefix("qemu:dirty-bitmap:")
    since = None if name == "cow" else name
    return with_gaps([(e.offset, e.length) for e in disk.dirty_extents(since=since)], 1)


def nbdinfo_map(server: NbdServer, context: str) -> Runs:
    found = json.loads(run("nbdinfo", f"--map={context}", "--json", server.uri))
    return joined((each["offset"], each["length"], each["type"]) for each in found)


# libnbd


@pytest.mark.requires("nbdinfo")
@pytest.mark.parametrize(
    "context", ["base:allocation", "qemu:dirty-bitmap:cow", "qemu:dirty-bitmap:at-40", "qemu:dirty-bitmap:at-80"]
)
def test_nbdinfo_maps_what_the_disk_knows(server: NbdServer, context: str) -> None:
    assert nbdinfo_map(server, context) == known(server.disk, context)


@pytest.mark.requires("nbdinfo")
def test_nbdinfo_maps_the_allocation_depth(server: NbdServer) -> None:
    found = nbdinfo_map(server, "qemu:allocation-depth")
    assert sum(length for _, length, _ in found) == SIZE
    disk = server.disk
    newest = known(disk, "qemu:dirty-bitmap:at-80")
    # What was written since the last checkpoint is in the newest layer. (What was trimmed before and since is depth 1, too.)
    for offset, length, state in newest:
        if state:
            assert {depth for at, size, depth in found if at < offset + length and offset < at + size} == {1}
    dirty = {
        at
        for offset, length, state in known(disk, "qemu:dirty-bitmap:cow")
        if state
        for at in range(offset, offset + length, 512)
    }
    holes = {at for e in disk.base.extents(0, SIZE) if e.kind is Kind.HOLE for at in range(e.offset, e.end, 512)}
    for offset, length, depth in found:
        sectors = set(range(offset, offset + length, 512))
        if depth == 0:
            assert sectors <= holes - dirty
        elif depth == 4:
            assert not sectors & (dirty | holes)
        else:
            assert depth in (1, 2, 3) and sectors <= dirty


@pytest.mark.requires("nbdinfo")
def test_nbdinfo_json_tells_everything_that_the_server_offers(server: NbdServer) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", server.uri))["exports"]
    expected: dict[str, Any] = {
        "export-size": SIZE,
        "is_read_only": False,
        "is_rotational": False,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
        "block_size_minimum": 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 64 << 20,
        "contexts": [
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:cow",
            "qemu:dirty-bitmap:at-40",
            "qemu:dirty-bitmap:at-80",
        ],
    }
    assert {key: export[key] for key in expected} == expected


@pytest.mark.requires("nbdinfo")
@pytest.mark.parametrize(
    "capability",
    ["cache", "df", "fast-zero", "flush", "fua", "multi-conn", "trim", "write", "zero", "structured-reply", "connect"],
)
def test_nbdinfo_can(server: NbdServer, capability: str) -> None:
    run("nbdinfo", "--can", capability, server.uri)


@pytest.mark.requires("nbdinfo")
@pytest.mark.parametrize("quality", ["read-only", "rotational", "tls"])
def test_nbdinfo_is_not(server: NbdServer, quality: str) -> None:
    done = subprocess.run(["nbdinfo", "--is", quality, server.uri], check=False, timeout=60)
    assert done.returncode == 2


@pytest.mark.requires("nbdinfo")
def test_nbdinfo_lists_the_export_under_its_name(server: NbdServer) -> None:
    with NbdServer(server.disk, export_name="a name", description="for a test") as named:
        listed = json.loads(run("nbdinfo", "--list", "--json", named.uri))["exports"]
        assert [(each["export-name"], each["description"]) for each in listed] == [("a name", "for a test")]
        assert run("nbdinfo", "--size", named.uri).strip() == str(SIZE)


@pytest.mark.requires("nbdcopy")
def test_nbdcopy_with_four_connections_copies_the_disk_out(server: NbdServer, tmp_path: Path) -> None:
    target = tmp_path / "copy.img"
    run("nbdcopy", "--connections=4", "--requests=16", server.uri, target)
    assert target.read_bytes() == server.disk.pread(SIZE, 0)


@pytest.mark.requires("nbdcopy")
def test_nbdcopy_with_four_connections_copies_an_image_in(server: NbdServer, tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    content = bytearray(os.urandom(SIZE))
    content[50 * BLOCK : 300 * BLOCK] = bytes(250 * BLOCK)
    source.write_bytes(content)
    run("nbdcopy", "--connections=4", "--requests=16", "--flush", source, server.uri)
    assert server.disk.pread(SIZE, 0) == content


@pytest.mark.requires("nbdcopy")
def test_nbdcopy_from_one_disk_to_another(server: NbdServer) -> None:
    with serving(SIZE) as target:
        run("nbdcopy", "--connections=4", server.uri, target.uri)
        assert target.disk.pread(SIZE, 0) == server.disk.pread(SIZE, 0)


@pytest.mark.requires(modules=["nbd"])
def test_the_libnbd_binding_reads_writes_and_asks_as_the_disk_itself(server: NbdServer) -> None:
    import nbd

    handle: Any = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.add_meta_context("qemu:dirty-bitmap:cow")
    handle.set_strict_mode(0)
    handle.connect_uri(server.uri)
    assert handle.get_structured_replies_negotiated()
    assert handle.pread(SIZE, 0) == server.disk.pread(SIZE, 0)
    handle.pwrite(b"from libnbd", 12345, nbd.CMD_FLAG_FUA)
    assert server.disk.pread(11, 12345) == b"from libnbd"
    handle.zero(10_000, 20_000, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
    handle.trim(5000, 100_000)
    handle.cache(5000, 100_000)
    handle.flush()
    assert server.disk.pread(10_000, 20_000) == bytes(10_000)
    seen: list[tuple[int, int]] = []

    def chunk(_data: bytes, offset: int, state: int, _error: object) -> int:
        seen.append((offset, state))
        return 0

    assert handle.pread_structured(3 * BLOCK, 4 * BLOCK, chunk) == server.disk.pread(3 * BLOCK, 4 * BLOCK)
    assert seen and seen[0][0] == 4 * BLOCK
    found: dict[str, Runs] = {}

    def extent(context: str, offset: int, entries: list[int], _: object) -> int:
        runs = found.setdefault(context, [])
        for length, state in zip(entries[::2], entries[1::2], strict=True):
            runs.append((offset, length, state))
            offset += length
        return 0

    handle.block_status(SIZE, 0, extent)
    assert {name: joined(runs) for name, runs in found.items()} == {
        name: known(server.disk, name) for name in ("base:allocation", "qemu:dirty-bitmap:cow")
    }
    with pytest.raises(nbd.Error, match="EINVAL"):
        handle.pread(10, SIZE)
    with pytest.raises(nbd.Error, match="ENOSPC"):
        handle.pwrite(b"x", SIZE)
    assert handle.pread(1, 0) == server.disk.pread(1, 0)
    handle.shutdown()


# QEMU


def qemu_map(options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options))
    return found


@pytest.mark.requires("qemu-img")
@pytest.mark.parametrize("bitmap", ["cow", "at-40", "at-80"])
def test_qemu_img_maps_the_dirty_bitmap(server: NbdServer, bitmap: str) -> None:
    context = f"qemu:dirty-bitmap:{bitmap}"
    found = qemu_map(f"driver=nbd,server.type=unix,server.path={server.socket},x-dirty-bitmap={context}")
    # In this mode qemu says "data": false where the bitmap has a bit.
    assert joined((each["start"], each["length"], int(not each["data"])) for each in found) == known(
        server.disk, context
    )


@pytest.mark.requires("qemu-img")
def test_qemu_img_maps_data_and_zeroes(server: NbdServer) -> None:
    found = qemu_map(f"driver=nbd,server.type=unix,server.path={server.socket}")
    assert joined((each["start"], each["length"], 3 if each["zero"] else 0) for each in found) == known(
        server.disk, "base:allocation"
    )


@pytest.mark.requires("qemu-img")
def test_qemu_img_converts_to_and_from_the_disk(server: NbdServer, tmp_path: Path) -> None:
    content = server.disk.pread(SIZE, 0)
    image = tmp_path / "out.qcow2"
    run("qemu-img", "convert", "-m", "8", "-W", "-f", "raw", "-O", "qcow2", server.uri, image)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", server.uri, image)
    with serving(SIZE) as target:
        run("qemu-img", "convert", "-n", "-m", "8", "-W", "-f", "qcow2", "-O", "raw", image, target.uri)
        assert target.disk.pread(SIZE, 0) == content


@pytest.mark.requires("qemu-io")
def test_qemu_io_writes_zeroes_discards_and_verifies(server: NbdServer) -> None:
    commands = [
        "write -P 0x41 0 64k",
        "write -f -P 0x42 100k 3k",
        "write -z 8k 8k",
        "write -z -u 24k 4k",
        "discard 32k 8k",
        "flush",
        "read -P 0x41 0 8k",
        "read -P 0 8k 8k",
        "read -P 0 24k 4k",
        "read -P 0 32k 8k",
        "read -P 0x42 100k 3k",
    ]
    shown = run("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), server.uri)
    assert "Pattern verification failed" not in shown and "error" not in shown.lower()
    assert server.disk.pread(3072, 100 << 10) == b"\x42" * 3072
    assert server.disk.pread(8192, 32 << 10) == bytes(8192)


# fio


def fio(folder: Path, uri: str, *options: str) -> None:
    """Run fio in ``folder``, where it may leave the files in which it notes how far a verification came."""
    shared = ("--ioengine=nbd", f"--uri={uri}", "--output-format=terse", "--iodepth=16", "--randseed=5")
    run("fio", *shared, *options, cwd=folder)


VERIFIED = ("--verify=crc32c", "--do_verify=1", "--verify_fatal=1")


@pytest.mark.requires("fio")
def test_fio_verifies_what_eight_jobs_write_beside_eight_that_trim(tmp_path: Path) -> None:
    with serving(64 << 20) as server:
        shared = ["--size=4M", "--bsrange=512-64k", "--numjobs=8", "--offset_increment=8M"]
        writing = ["--name=write", *shared, "--rw=randwrite", "--serialize_overlap=1", *VERIFIED]
        fio(tmp_path, server.uri, *writing, "--name=trim", *shared, "--offset=4M", "--rw=randtrim")
        dirty = {kind for _, _, kind in server.disk.dirty_extents()}
        assert dirty == {Kind.DATA, Kind.ZERO}


@pytest.mark.requires("fio")
def test_fio_verifies_what_it_writes_right_behind_a_trim(tmp_path: Path) -> None:
    with serving(16 << 20) as server:
        fio(tmp_path, server.uri, "--name=job", "--rw=randtrimwrite", "--bs=4k", "--size=16M", *VERIFIED)
