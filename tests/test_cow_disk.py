"""CowDisk, in both modes: all that it can do is the same wherever the disk is."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest

from cowkit import Checkpoint, CowDisk, Extent, Kind
from cowkit.errors import (
    BaseChangedError,
    BaseError,
    BaseOpenError,
    CheckpointError,
    CowkitError,
    DiskClosedError,
    ListenError,
    MissingToolError,
    OutputError,
    OverlayError,
    OverlayFullError,
    UsageError,
)
from cowkit.server.server import NbdServer
from tests.limits import files_limited_to, files_of_process_limited_to

Where = Literal["thread", "process"]
BLOCK = 4096


class Make(Protocol):
    def __call__(self, base: object = None, **options: Any) -> CowDisk: ...


@pytest.fixture(params=["thread", "process"])
def where(request: pytest.FixtureRequest) -> Where:
    found: Where = request.param
    return found


@pytest.fixture
def make(where: Where) -> Iterator[Make]:
    """Disks in one mode, closed at the end."""
    disks: list[CowDisk] = []

    def make(base: Any = None, **options: Any) -> CowDisk:
        disk = CowDisk(base, server=where, **options)
        disks.append(disk)
        return disk

    yield make
    for disk in disks:
        disk.close()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """1 MiB and a bit, all of it ``b``."""
    path = tmp_path / "base.img"
    path.write_bytes(b"b" * (1 << 20) + b"end")
    return path


def host_of(disk: CowDisk) -> int:
    assert disk._hosted is not None
    return disk._hosted._host.pid


def greeted(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(path)
        return client.recv(18).startswith(b"NBDMAGIC")


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end


# The disk


def test_what_is_written_zeroed_and_trimmed_is_read_back_and_the_base_stays(make: Make, base: Path) -> None:
    disk = make(base)
    disk.pwrite(b"boo", BLOCK + 1)
    disk.pwrite(bytearray(b"yes"), 0)
    disk.pwrite(memoryview(b"-no-")[1:3], 3)
    disk.zero(BLOCK, 2 * BLOCK)
    disk.trim(BLOCK, 3 * BLOCK)
    disk.cache(BLOCK, 0)
    disk.flush()
    assert disk.pread(6, 0) == b"yesnob"
    assert disk.pread(5, BLOCK) == b"bboob"
    assert disk.pread(2 * BLOCK + 1, 2 * BLOCK) == bytes(2 * BLOCK) + b"b"
    assert disk.pread(3, 1 << 20) == b"end"
    assert disk.pread(0, 5) == b""
    disk.pwrite(b"", 5)
    assert (disk.size, disk.block_size, disk.name, disk.base) == ((1 << 20) + 3, BLOCK, "base.img", str(base))
    assert set(base.read_bytes()) == set(b"bend")


def test_large_reads_and_writes_go_through_whole(make: Make) -> None:
    disk = make(size="64M")
    data = os.urandom(1 << 20) * 40
    disk.pwrite(data, 12345)
    assert disk.pread(len(data), 12345) == data


def test_options_of_the_disk_are_kept(make: Make, base: Path) -> None:
    disk = make(base, size="2M", block_size="64K", round="up", name="Karl")
    assert (disk.size, disk.block_size, disk.name) == (2 << 20, 65536, "Karl")
    assert make(base, round="down").size == 1 << 20
    assert make(base, offset="512K").size == (512 << 10) + 3
    copying = make(base, cow_on_read=True)
    copying.pread(1, 0)
    assert copying.dirty_bytes == BLOCK
    caching = make(base, cow_on_cache=True)
    caching.cache(1, BLOCK)
    assert list(caching.dirty_extents()) == [Extent(BLOCK, BLOCK, Kind.DATA)]


def test_the_representation_says_what_disk_it_is_and_whether_it_is_closed(make: Make) -> None:
    disk = make(size="1M", name="x")
    assert repr(disk) == "<CowDisk 'x', 1 MiB>"
    disk.close()
    assert repr(disk) == "<CowDisk 'x', 1 MiB, closed>"


def test_checkpoints_are_rolled_back_to_by_themselves_and_by_name(make: Make) -> None:
    disk = make(size="1M")
    disk.pwrite(b"1", 0)
    one = disk.checkpoint("one")
    disk.pwrite(b"2", 0)
    two = disk.checkpoint()
    assert isinstance(one, Checkpoint)
    assert repr(one) == "<Checkpoint 'one'>"
    assert two.name == "checkpoint-2"
    assert [each is point for each, point in zip(disk.checkpoints, (one, two), strict=True)] == [True, True]
    disk.pwrite(b"3", 0)
    disk.rollback("checkpoint-2")
    assert disk.pread(1, 0) == b"2"
    disk.rollback(one)
    assert disk.pread(1, 0) == b"1"
    assert disk.checkpoints == [one]
    disk.reset()
    assert disk.pread(1, 0) == b"\0"
    assert disk.checkpoints == []


def test_a_checkpoint_that_is_gone_or_of_another_disk_is_refused_even_where_a_new_one_has_its_name(make: Make) -> None:
    disk, other = make(size="1M"), make(size="1M")
    first = disk.checkpoint("first")
    gone = disk.checkpoint("point")
    disk.rollback(first)
    new = disk.checkpoint("point")
    theirs = other.checkpoint("point")
    for wrong in (gone, theirs):
        with pytest.raises(CheckpointError, match=r"no checkpoint 'point' \(any more\); it has: 'first', 'point'"):
            disk.rollback(wrong)
        with pytest.raises(CheckpointError, match="no checkpoint 'point'"):
            disk.dirty_extents(since=wrong)
    disk.rollback(new)


def test_a_checkpoint_of_a_disk_in_the_other_mode_is_refused(make: Make, where: Where) -> None:
    disk = make(size="1M")
    disk.checkpoint("point")
    with CowDisk(size="1M", server="thread" if where == "process" else "process") as other:
        theirs = other.checkpoint("point")
        with pytest.raises(CheckpointError, match="no checkpoint 'point'"):
            disk.rollback(theirs)


def test_dirty_extents_are_told_also_within_a_range_and_since_a_checkpoint(make: Make, base: Path) -> None:
    disk = make(base)
    disk.pwrite(b"x" * BLOCK, BLOCK)
    point = disk.checkpoint("p")
    disk.zero(BLOCK, 4 * BLOCK)
    data, zero = Extent(BLOCK, BLOCK, Kind.DATA), Extent(4 * BLOCK, BLOCK, Kind.ZERO)
    assert list(disk.dirty_extents()) == [data, zero]
    assert list(disk.dirty_extents(2 * BLOCK)) == [zero]
    assert list(disk.dirty_extents(0, BLOCK + 1)) == [Extent(BLOCK, 1, Kind.DATA)]
    assert list(disk.dirty_extents(since=point)) == list(disk.dirty_extents(since="p")) == [zero]
    assert next(disk.dirty_extents()).kind is Kind.DATA
    assert disk.dirty_bytes == 2 * BLOCK


# Bases of every kind


@pytest.mark.requires("qemu-img", "qemu-nbd", "setpriv", modules=["nbd"])
def test_an_image_that_qemu_reads_is_a_base(make: Make, base: Path, tmp_path: Path) -> None:
    image = tmp_path / "i.qcow2"
    subprocess.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", base, image], check=True)
    disk = make(image)
    assert disk.pread(5, 0) == b"bbbbb"
    disk.pwrite(b"x", 0)
    assert disk.diff(tmp_path / "d.qcow2").backing_format == "qcow2"


@pytest.mark.requires("gzip")
def test_a_compressed_base_is_decompressed_and_a_difference_wants_another_name(
    make: Make, base: Path, tmp_path: Path
) -> None:
    subprocess.run(["gzip", "-k", base], check=True)
    disk = make(f"{base}.gz")
    assert disk.pread(3, 1 << 20) == b"end"
    with pytest.raises(UsageError, match="gz"):
        disk.diff(tmp_path / "d.qcow2")
    assert disk.diff(tmp_path / "d.qcow2", backing_file="base.img").backing_file == "base.img"


@pytest.mark.requires(modules=["nbd"])
def test_another_disk_is_a_base_by_its_uri(make: Make, base: Path) -> None:
    below = make(base)
    below.pwrite(b"below", 0)
    disk = make(below.uri)
    assert (disk.pread(5, 0), disk.base) == (b"below", below.uri)
    disk.close()


# Surroundings


def test_a_relative_base_is_relative_to_the_working_directory_of_that_moment_and_the_diff_names_it_so(
    make: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    disk = make("base.img")
    assert disk.base == "base.img"
    disk.pwrite(b"x", 0)
    (base.parent / "inner").mkdir()
    monkeypatch.chdir(base.parent / "inner")
    report = disk.diff("d.qcow2")
    assert (report.path, report.backing_file) == ("d.qcow2", "../base.img")
    assert (base.parent / "inner" / "d.qcow2").exists()
    disk.check_diff(Path("e.qcow2"))


@pytest.mark.parametrize("there", [False, True], ids=["nothing", "another file"])
def test_a_base_above_the_folder_that_a_link_leads_to_is_no_file_beside_the_link(
    make: Make, tmp_path: Path, *, there: bool
) -> None:
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/below")
    (tmp_path / "real" / "disk.img").write_bytes(b"real" * 2048)
    if there:
        (tmp_path / "disk.img").write_bytes(b"none" * 2048)
    disk = make(f"{tmp_path}/link/../disk.img")
    disk.pwrite(b"x", 0)
    disk.diff(tmp_path / "diff.qcow2")
    assert disk.pread(4, 4096) == b"real"
    disk.close()


def test_a_relative_base_is_found_where_the_working_directory_has_been_renamed_and_is_missed_where_it_is_not(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    monkeypatch.chdir(old)
    old.rename(new)
    (new / "disk.img").write_bytes(b"here")
    assert make("disk.img").pread(4, 0) == b"here"
    with pytest.raises(BaseOpenError, match=r"cannot open base other.img: No such file"):
        make("other.img")


def test_a_relative_tmpdir_is_that_of_the_beginning(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "overlays").mkdir()
    monkeypatch.chdir(tmp_path)
    disk = make(size="1M", tmpdir="overlays")
    monkeypatch.chdir("/")
    disk.pwrite(b"x", 0)
    assert disk.pread(1, 0) == b"x"


def test_the_environment_is_that_of_the_moment(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(size="1M")  # the host may have started with another one
    for name in ("one", "two"):
        monkeypatch.setenv("COWKIT_RUNTIME_DIR", str(tmp_path / name))
        disk = make(size="1M")
        assert disk.socket.startswith(str(tmp_path / name))
        disk.close()
        assert os.listdir(tmp_path / name) == []
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(OverlayError, match=r"cannot be in .*missing: there is no such directory"):
        make(size="1M")


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_a_difference_has_the_mode_that_the_umask_leaves(make: Make, tmp_path: Path, mask: int) -> None:
    disk = make(size="1M")
    before = os.umask(mask)
    try:
        disk.diff(tmp_path / "d.qcow2")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "d.qcow2").stat().st_mode) == 0o666 & ~mask


# Errors


WRONG_OPENINGS: list[tuple[Any, dict[str, Any], type[CowkitError]]] = [
    (None, {}, UsageError),
    (None, {"size": "1X"}, UsageError),
    (None, {"size": "1M", "block_size": 1000}, UsageError),
    (None, {"size": "1M", "round": "sideways"}, UsageError),
    (None, {"size": "1M", "offset": 5}, UsageError),
    (None, {"size": 1 << 62}, UsageError),
    ("BASE", {"size": 5}, UsageError),
    ("BASE", {"offset": "2G"}, BaseOpenError),
    ("BASE", {"partition": 1}, BaseError),
    ("BASE", {"base_format": "nonsense"}, UsageError),
    ("BASE", {"base_format": "qcow2"}, BaseOpenError),
    ("BASE", {"tmpdir": "/nowhere"}, OverlayError),
    ("missing.img", {}, BaseOpenError),
    ("/", {}, BaseOpenError),
    ("nbd+unix:///?socket=/nowhere", {}, BaseOpenError),
]


@pytest.mark.parametrize(("given", "options", "kind"), WRONG_OPENINGS)
def test_a_disk_that_cannot_be_opened_is_the_same_error_in_both_modes(
    base: Path, given: Any, options: dict[str, Any], kind: type[CowkitError]
) -> None:
    found = []
    for where in ("thread", "process"):
        with pytest.raises((kind, MissingToolError)) as caught:
            CowDisk(str(base) if given == "BASE" else given, server=where, **options)
        found.append(described(caught.value))
    assert found[0] == found[1]


def described(error: BaseException | None) -> object:
    if error is None:
        return None
    return type(error), str(error), getattr(error, "errno", None), vars(error), described(error.__cause__)


WRONG_CALLS: dict[str, Callable[[CowDisk], object]] = {
    "read beyond": lambda disk: disk.pread(1, disk.size),
    "write beyond": lambda disk: disk.pwrite(b"xy", disk.size - 1),
    "negative": lambda disk: disk.pread(-1, 0),
    "zero beyond": lambda disk: disk.zero(1, disk.size),
    "trim beyond": lambda disk: disk.trim(1 << 70, 0),
    "cache beyond": lambda disk: disk.cache(1, disk.size),
    "extents beyond": lambda disk: disk.dirty_extents(disk.size + 1),
    "no such checkpoint": lambda disk: disk.rollback("nothing"),
    "checkpoint's name": lambda disk: disk.checkpoint("\n"),
    "checkpoint twice": lambda disk: [disk.checkpoint("a"), disk.checkpoint("a")],
    "diff nowhere": lambda disk: disk.diff("/nowhere/d.qcow2"),
    "diff over the base": lambda disk: disk.diff(str(disk.base)),
    "diff that cannot be": lambda disk: disk.check_diff("/"),
    "diff on itself": lambda disk: disk.diff("d.qcow2", backing_file="d.qcow2"),
    "socket nowhere": lambda disk: disk.serve(socket="/nowhere/s"),
    "socket too long": lambda disk: disk.serve(socket="/" + "s" * 200),
    "no address": lambda disk: disk.serve(tcp="localhost"),
    "no share": lambda disk: disk.serve(share="nobody"),  # type: ignore[arg-type]
    "no certificates": lambda disk: disk.serve(tls_certs="/nowhere"),
    "tls without any": lambda disk: disk.serve(tls="require"),
    "a long name": lambda disk: disk.serve(export_name="x" * 5000),
    "type of data": lambda disk: disk.pwrite("text", 0),  # type: ignore[arg-type]
    "type of offset": lambda disk: disk.pread(1, "0"),  # type: ignore[arg-type]
    "unknown option": lambda disk: disk.diff("d.qcow2", colour="red"),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("wrong", WRONG_CALLS)
def test_a_call_that_fails_is_the_same_error_in_both_modes(
    base: Path, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for where in ("thread", "process"):
        with CowDisk(base, server=where) as disk:
            with pytest.raises((CowkitError, TypeError)) as caught:
                WRONG_CALLS[wrong](disk)
            vars(caught.value).pop("__notes__", None)  # where in the host, for what is not of cowkit's own
            found.append(described(caught.value))
            disk.pwrite(b"alive", 0)
            assert disk.pread(5, 0) == b"alive"
    assert found[0] == found[1]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="server is 'thread' or 'process', not 'fork'"):
        CowDisk(size="1M", server="fork")  # type: ignore[arg-type]


def test_the_engine_is_there_in_the_thread_mode_alone() -> None:
    with CowDisk(size="1M") as disk:
        assert disk.engine.size == 1 << 20
    with CowDisk(size="1M", server="process") as disk, pytest.raises(UsageError, match="server='process'"):
        _ = disk.engine


def test_a_write_without_room_is_refused_and_the_disk_goes_on_and_tells_why(make: Make, where: Where) -> None:
    disk = make(size="64M")
    disk.pwrite(b"old", 0)
    assert disk.overlay_failure is None
    limit = files_limited_to(1 << 20) if where == "thread" else files_of_process_limited_to(host_of(disk), 1 << 20)
    with limit, pytest.raises(OverlayFullError, match=r"no room for the overlay|cannot hold a disk") as caught:
        disk.pwrite(b"new", 32 << 20)
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value.__cause__, OSError)
    assert disk.pread(3, 0) == b"old"
    assert str(disk.overlay_failure) == str(caught.value)
    disk.close()
    assert isinstance(disk.overlay_failure, OverlayFullError)


def test_a_base_that_changed_is_an_error_of_closing_and_the_disk_is_closed_all_the_same(make: Make, base: Path) -> None:
    disk = make(base)
    base.write_bytes(b"other")
    with pytest.raises(BaseChangedError, match=r"its size went from 1048579 to 5 bytes"):
        disk.close()
    assert disk.closed
    disk.close()


def test_the_error_of_the_block_goes_before_that_of_the_base(where: Where, base: Path) -> None:
    with pytest.raises(RuntimeError, match="mine") as caught, CowDisk(base, server=where):
        base.write_bytes(b"other")
        raise RuntimeError("mine")
    assert "changed while it was in use" in caught.value.__notes__[0]


def test_a_closed_disk_says_so_whatever_it_is_asked(make: Make, tmp_path: Path) -> None:
    disk = make(size="1M", name="Karl")
    point = disk.checkpoint()
    server = disk.serve()
    uri = disk.uri
    assert uri
    disk.close()
    asked: list[Callable[[], object]] = [
        lambda: disk.pread(1, 0),
        lambda: disk.pwrite(b"x", 0),
        disk.flush,
        disk.checkpoint,
        disk.reset,
        lambda: disk.rollback(point),
        lambda: disk.dirty_bytes,
        disk.dirty_extents,
        lambda: disk.diff(tmp_path / "d"),
        lambda: disk.check_diff(tmp_path / "d"),
        disk.serve,
        lambda: disk.uri,
        lambda: disk.socket,
    ]
    for ask in asked:
        with pytest.raises(DiskClosedError, match="is closed"):
            ask()
    assert (disk.size, disk.checkpoints, disk.connections, disk.server_errors) == (1 << 20, [], 0, [])
    assert (disk.overlay_failure, server.connections, server.errors) == (None, 0, [])
    server.stop()
    disk.close()


def test_a_disk_that_is_forgotten_warns_and_is_closed(where: Where, base: Path) -> None:
    disks = [CowDisk(base, server=where)]
    path = disks[0].socket
    with pytest.warns(ResourceWarning, match="was not closed"):
        disks.clear()
    assert not os.path.exists(path)


# Differences


def test_a_difference_is_the_same_in_both_modes(base: Path, tmp_path: Path) -> None:
    found = []
    for where in ("thread", "process"):
        with CowDisk(base, server=where) as disk:
            disk.pwrite(os.urandom(BLOCK), 3 * BLOCK)
            disk.pwrite(b"b", 0)
            disk.trim(200_000, 300_000)
            report = disk.diff(tmp_path / "d.qcow2").to_json()
        del report["seconds"]
        found.append(report)
    assert found[0] == found[1]


def test_an_increment_is_of_the_checkpoints_that_are_given_by_themselves_or_by_name(
    make: Make, base: Path, tmp_path: Path
) -> None:
    disk = make(base)
    first = disk.checkpoint()
    disk.pwrite(b"a", 0)
    second = disk.checkpoint("second")
    disk.pwrite(b"b", BLOCK)
    for since, at in ((first, second), (first.name, "second")):
        report = disk.diff(tmp_path / "d.qcow2", since=since, at=at, backing_file="d1.qcow2")
        assert [extent.offset for extent in report.changed] == [0]
    assert [extent.offset for extent in disk.diff(tmp_path / "d.qcow2", at=second).changed] == [0]
    with pytest.raises(CheckpointError, match="no checkpoint"):
        disk.diff(tmp_path / "d.qcow2", since=make(base).checkpoint("stranger"), backing_file="d1.qcow2")


def test_progress_is_told_in_the_thread_that_asked(make: Make, base: Path, tmp_path: Path) -> None:
    disk = make(base)
    disk.pwrite(b"x" * (1 << 20), 0)
    told: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        threads.add(threading.current_thread())

    disk.diff(tmp_path / "d.qcow2", progress=progress)
    assert told == sorted(told)
    assert told[-1] == (1 << 20, 1 << 20)
    assert threads == {threading.current_thread()}


def test_progress_that_raises_gives_the_difference_up_and_leaves_the_old_file(
    make: Make, base: Path, tmp_path: Path
) -> None:
    disk = make(base)
    disk.pwrite(b"x", 0)
    target = tmp_path / "d.qcow2"
    target.write_bytes(b"old")

    def progress(done: int, total: int) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        disk.diff(target, progress=progress)
    assert target.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["base.img", "d.qcow2"]
    disk.diff(target)


# Servers


def test_the_uri_and_the_socket_are_those_of_one_server_that_ends_with_the_disk(make: Make) -> None:
    disk = make(size="1M")
    path = disk.socket
    assert path in disk.uri
    assert disk.socket == path
    assert greeted(path)
    disk.close()
    assert not os.path.exists(os.path.dirname(path))


@pytest.mark.requires("qemu-io")
def test_clients_and_calls_see_the_same_disk(make: Make, base: Path) -> None:
    import subprocess

    disk = make(base)
    subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write -P 0xcd 0 4k", disk.uri], check=True, stdout=subprocess.DEVNULL
    )
    assert disk.pread(2, 0) == b"\xcd\xcd"
    assert disk.dirty_bytes == BLOCK


def test_a_server_of_ones_own_listens_where_it_is_told_and_ends_by_its_stop(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = make(size="1M")
    monkeypatch.chdir(tmp_path)
    with disk.serve(socket=Path("s"), tcp="127.0.0.1:0", export_name="e") as server:
        assert server.socket == str(tmp_path / "s")
        assert server.uris[0] == server.uri
        port = int(server.uris[1].rpartition(":")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            assert client.recv(8) == b"NBDMAGIC"
            until(lambda: server.connections == 1 and disk.connections == 1)
        assert greeted(str(tmp_path / "s"))
        until(lambda: not server.connections)
        assert (server.written_bytes, list(server.errors)) == (0, [])
    assert not (tmp_path / "s").exists()
    server.stop()
    disk.serve(socket="s").stop()


def test_clients_wait_for_a_server_that_is_started_later(make: Make) -> None:
    server = make(size="1M").serve(start=False)
    assert server.socket is not None
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(server.socket)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(8)
        server.start()
        client.settimeout(20)
        assert client.recv(8) == b"NBDMAGIC"


def test_a_server_listens_on_the_sockets_it_is_given_and_closes_them(make: Make, tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    tcp = socket.create_server(("127.0.0.1", 0))
    with make(size="1M").serve(listeners=[listener, tcp]) as server:
        assert [uri.partition(":")[0] for uri in server.uris] == ["nbd+unix", "nbd"]
        assert server.socket is None
        assert greeted(str(tmp_path / "s"))
        assert listener.fileno() >= 0
    assert (listener.fileno(), tcp.fileno()) == (-1, -1)
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(str(tmp_path / "s"))


def test_a_server_with_sockets_that_have_no_address_has_no_uri(make: Make) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(b"\0cowkit-test-%d" % os.getpid())
    listener.listen()
    server = make(size="1M").serve(listeners=[listener])
    with pytest.raises(ListenError, match="listens on nothing that an NBD URI can tell"):
        _ = server.uri


@pytest.mark.requires(modules=["nbd"])
def test_the_server_tells_when_its_last_client_has_left(make: Make) -> None:
    import nbd

    idle = threading.Event()
    with make(size="1M").serve(on_idle=idle.set) as server:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        assert not idle.is_set()
        client.shutdown()
        assert idle.wait(20)


@pytest.mark.requires(modules=["nbd"])
def test_a_connected_client_can_be_handed_over_and_its_end_is_told(make: Make) -> None:
    import nbd

    disk = make(size="1M")
    disk.pwrite(b"here", 0)
    ours, theirs = socket.socketpair()
    ended = threading.Event()
    with disk.serve() as server:
        server.adopt(theirs, on_end=ended.set)
        client = nbd.NBD()
        client.connect_socket(ours.detach())
        assert bytes(client.pread(4, 0)) == b"here"
        assert not ended.is_set()
        client.shutdown()
        assert ended.wait(20)


@pytest.mark.requires(modules=["nbd"])
def test_options_of_servers_reach_them(make: Make) -> None:
    import nbd

    disk = make(size="1M")
    with disk.serve(read_only=True, description="for people", export_name="e") as server:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        assert client.is_read_only()
        client.shutdown()
    with disk.serve(share="connection") as server:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        client.pwrite(b"mine", 0)
        assert disk.pread(4, 0) == bytes(4)
        client.shutdown()
        until(lambda: server.written_bytes == BLOCK)


def test_what_goes_wrong_in_a_server_is_kept_with_its_cause_also_after_the_end(make: Make) -> None:
    disk = make(size="1M")
    silent = socket.socket(socket.AF_UNIX)  # nobody called listen()
    silent.bind(b"\0cowkit-silent-%d" % os.getpid())
    server = disk.serve(listeners=[silent])
    until(lambda: len(disk.server_errors) == 1)
    assert [type(error) for error in disk.server_errors] == [OSError]
    assert [getattr(error, "errno", 0) for error in server.errors] == [errno.EINVAL]
    disk.close()
    assert [getattr(error, "errno", 0) for error in [*disk.server_errors, *server.errors]] == [errno.EINVAL] * 2


def test_the_server_in_this_process_is_an_nbd_server() -> None:
    with CowDisk(size="1M") as disk:
        assert isinstance(disk.serve(), NbdServer)


# Threads and processes


def test_threads_use_one_disk_at_the_same_time(make: Make) -> None:
    disk = make(size="16M")
    wrong = []

    def work(number: int) -> None:
        for turn in range(60):
            data = bytes([number, turn]) * 600
            disk.pwrite(data, number << 20)
            if disk.pread(len(data), number << 20) != data:
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_disk_is_closed_once_by_several_threads_and_the_others_are_refused(make: Make) -> None:
    disk = make(size="16M")
    refused = []

    def work() -> None:
        try:
            while True:
                disk.pwrite(b"x" * 5000, 0)
        except DiskClosedError as error:
            refused.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    closers = [threading.Thread(target=disk.close) for _ in range(3)]
    for thread in threads + closers:
        thread.start()
    for thread in threads + closers:
        thread.join()
    assert len(refused) == 3


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_forked_child_is_refused_and_does_its_parents_disk_no_harm_and_can_have_one_of_its_own(
    make: Make, where: Where, base: Path
) -> None:
    disk = make(base)
    disk.pwrite(b"parent", 0)
    path = disk.socket
    child = os.fork()
    if child == 0:
        status = 1
        try:
            try:
                disk.pread(1, 0)
            except DiskClosedError as error:
                status = 0 if f"belongs to process {os.getppid()}" in str(error) else 2
            with CowDisk(base, server=where) as own:
                own.pwrite(b"child", 0)
                status += own.pread(6, 0) != b"childb"
            disk.close()
            status += 0 if disk.closed else 4
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert disk.pread(6, 0) == b"parent"
    assert greeted(path)


def test_a_path_with_a_nul_is_refused_in_words(make: Make, base: Path, tmp_path: Path) -> None:
    disk = make(base)
    for look in (disk.diff, disk.check_diff):
        with pytest.raises(OutputError, match="no file's name has a NUL"):
            look("d\0.qcow2")


def test_an_output_error_does_not_close_the_disk(make: Make) -> None:
    disk = make(size="1M")
    with pytest.raises(OutputError):
        disk.diff("/nowhere/else")
    assert not disk.closed
    disk.flush()
