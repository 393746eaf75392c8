"""What must always hold of a disk: its base, its space, its last bytes, and what is left of it."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cowkit.disk import Disk, FileBase, Kind, ZeroBase
from cowkit.errors import (
    BaseChangedError,
    BaseOpenError,
    CheckpointError,
    DiskClosedError,
    OutOfBoundsError,
    OverlayError,
    OverlayFullError,
    UsageError,
)
from tests.limits import files_limited_to

BLOCK = 4096


@pytest.fixture
def base_path(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(os.urandom(16 * BLOCK))
    return path


# The base


def test_the_base_is_open_read_only_and_its_bytes_stay(base_path: Path) -> None:
    before = base_path.read_bytes()
    with Disk(FileBase(base_path)) as disk:
        for fd in os.listdir("/proc/self/fd"):
            if os.path.realpath(f"/proc/self/fd/{fd}") == str(base_path.resolve()):
                flags = int(re.search(r"flags:\s*(\d+)", Path(f"/proc/self/fdinfo/{fd}").read_text())[1], 8)  # type: ignore[index]
                assert flags & os.O_ACCMODE == os.O_RDONLY
        disk.pwrite(b"x" * 3 * BLOCK, 77)
        disk.zero(5 * BLOCK, 4 * BLOCK)
    assert base_path.read_bytes() == before


def test_a_base_without_write_permission_is_served(base_path: Path) -> None:
    base_path.chmod(0o400)
    with Disk(FileBase(base_path)) as disk:
        disk.pwrite(b"x", 0)
        assert disk.pread(1, 0) == b"x"


@pytest.mark.parametrize("change", ["written", "longer", "shorter"])
def test_a_base_that_changed_is_told_at_closing(base_path: Path, change: str) -> None:
    disk = Disk(FileBase(base_path))
    if change == "written":
        with base_path.open("r+b") as file:
            file.write(b"x")
        os.utime(base_path, ns=(0, 0))
    else:
        os.truncate(base_path, base_path.stat().st_size + (1 if change == "longer" else -1))
    with pytest.raises(BaseChangedError, match="changed while it was in use"):
        disk.close()
    assert disk.closed


def test_reading_a_base_that_was_cut_short_is_an_error_and_no_crash(base_path: Path) -> None:
    disk = Disk(FileBase(base_path))
    disk.pwrite(b"kept", 0)
    os.truncate(base_path, 0)
    with pytest.raises(BaseChangedError, match="cut short"):
        disk.pread(BLOCK, 5 * BLOCK)
    assert disk.pread(4, 0) == b"kept"
    with pytest.raises(BaseChangedError):
        disk.close()


def test_a_path_that_leads_to_another_file_now_is_told(base_path: Path) -> None:
    base = FileBase(base_path)
    base.verify_path()
    other = base_path.with_name("other.img")
    other.write_bytes(base_path.read_bytes())
    other.rename(base_path)
    with pytest.raises(BaseChangedError, match="replaced"):
        base.verify_path()
    base_path.unlink()
    with pytest.raises(BaseChangedError, match="not there any more"):
        base.verify_path()
    base.release()


def test_what_a_sparse_base_has_lost_is_not_taken_for_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "sparse.img"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        file.write(b"x" * 65536)
    disk = Disk(FileBase(path))
    assert disk.base.sparse
    os.truncate(path, 4096)
    with pytest.raises(BaseChangedError, match="cut short"):
        list(disk.overlay.segments(0, 65536))
    with pytest.raises(BaseChangedError, match="cut short"):
        disk.allocation(0, 1 << 20)
    with pytest.raises(BaseChangedError):
        disk.close()


@pytest.mark.parametrize(
    "kind", ["missing", "directory", "pipe", "socket", "device", "nul", "unreadable", "proc", "empty"]
)
def test_what_cannot_be_a_base_is_refused_with_its_reason(tmp_path: Path, kind: str) -> None:
    import socket

    path = tmp_path / "base"
    wanted = "cannot open base"
    if kind == "directory":
        path.mkdir()
        wanted = "is a directory"
    elif kind == "pipe":
        os.mkfifo(path)
        wanted = "is a pipe"
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            short = tmp_path if len(str(path)) < 100 else Path("/tmp")
            path = short / f"s{os.getpid()}"
            sock.bind(str(path))
        wanted = "is a socket"
    elif kind == "device":
        path = Path("/dev/null")
        wanted = "is a character device"
    elif kind == "proc":
        path = Path("/proc/self/mem")
        wanted = "is no file on a disk but something that the kernel tells"
    elif kind == "empty":
        wanted = "the path of the base is empty"
    elif kind == "nul":
        path = tmp_path / "a\0b"
    elif kind == "unreadable":
        path.write_bytes(b"x")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root reads whatever it likes")
    with pytest.raises(BaseOpenError, match=wanted):
        FileBase("" if kind == "empty" else path)
    if kind == "socket":
        path.unlink()


# Space


@pytest.mark.parametrize("piece", [0, 3 * BLOCK], ids=["at once", "in two runs"])
def test_a_write_without_room_keeps_none_of_what_there_was(base_path: Path, piece: int) -> None:
    with Disk(FileBase(base_path)) as disk:
        disk.pwrite(b"early", piece)
        layer = disk.overlay.layers[disk.overlay.top]
        before = layer.space()
        with files_limited_to(6 * BLOCK), pytest.raises(OverlayFullError):
            disk.pwrite(b"x" * 8 * BLOCK, 0)
        os.fsync(layer.fd)
        assert layer.space() == before


def test_a_write_without_room_keeps_the_old_bytes_and_the_disk_goes_on(base_path: Path) -> None:
    original = base_path.read_bytes()
    with Disk(FileBase(base_path)) as disk:
        disk.pwrite(b"early", 0)
        with files_limited_to(4 * BLOCK):
            with pytest.raises(OverlayFullError, match="cannot hold"):
                disk.pwrite(b"x" * 8 * BLOCK, 0)
            with pytest.raises(OverlayFullError):
                disk.pwrite(b"x", 9 * BLOCK + 5)
            with pytest.raises(OverlayFullError):
                disk.zero(2 * BLOCK, 9 * BLOCK + 5)
            assert disk.pread(16 * BLOCK, 0) == b"early" + original[5:]
            disk.pwrite(b"late", 2 * BLOCK)
            disk.trim(BLOCK, 10 * BLOCK)
        assert disk.pread(4, 2 * BLOCK) == b"late"
        assert disk.pread(BLOCK, 10 * BLOCK) == bytes(BLOCK)
        disk.pwrite(b"x" * 8 * BLOCK, 0)


@pytest.mark.parametrize("options", [{}, {"cow_on_read": True}])
def test_a_read_never_fails_for_want_of_overlay_space(base_path: Path, options: dict[str, bool]) -> None:
    with files_limited_to(0), Disk(FileBase(base_path), **options) as disk:  # type: ignore[arg-type]
        assert disk.pread(16 * BLOCK, 0) == base_path.read_bytes()


def test_without_a_directory_for_the_overlay_reads_go_on_and_writes_say_what_to_do(base_path: Path) -> None:
    with Disk(FileBase(base_path), tmpdir="/nonexistent/folder", cow_on_read=True) as disk:
        with pytest.raises(OverlayError, match="TMPDIR"):
            disk.pwrite(b"x", 0)
        assert disk.pread(BLOCK, 0) == base_path.read_bytes()[:BLOCK]


@pytest.mark.parametrize("forget", ["zero", "trim"])
def test_zeroing_and_trimming_give_overlay_space_back(tmp_path: Path, forget: str) -> None:
    with Disk(ZeroBase(64 << 20), tmpdir=tmp_path) as disk:
        disk.pwrite(b"x" * (32 << 20), 0)
        layer = disk.overlay.layers[disk.overlay.top]
        assert layer.space() >= 32 << 20
        getattr(disk, forget)(32 << 20, 0)
        assert layer.space() <= 1 << 20
        assert [*disk.dirty_extents()] == [(0, 32 << 20, Kind.ZERO)]


def test_rolling_back_again_and_again_takes_no_more_space_than_once(tmp_path: Path) -> None:
    with Disk(ZeroBase(64 << 20), tmpdir=tmp_path) as disk:
        point = disk.checkpoint()
        for _ in range(20):
            disk.pwrite(b"x" * (8 << 20), 0)
            assert disk.overlay.layers[disk.overlay.top].space() <= 9 << 20
            disk.rollback(point)
            assert disk.pread(64 << 20, 0) == bytes(64 << 20)
            assert not disk.overlay.layers and not disk.dirty_bytes


def test_what_a_rollback_left_for_later_makes_room_when_there_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    script = f"""
import subprocess
from cowkit.disk import Disk, ZeroBase
from cowkit.errors import OverlayFullError
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", {str(folder)!r}], check=True)
with Disk(ZeroBase(4 << 20), tmpdir={str(folder)!r}) as disk:
    disk.pwrite(b"a" * 4096, 0)
    point = disk.checkpoint()
    disk.pwrite(b"b" * (600 << 10), 1 << 20)
    early = disk.checkpoint()
    disk.pwrite(b"c" * (300 << 10), 2 << 20)
    disk.rollback(point)
    disk.pwrite(b"d" * (900 << 10), 3 << 20)
    assert disk.pread(900 << 10, 3 << 20) == b"d" * (900 << 10)
    try:
        disk.pwrite(b"e" * (900 << 10), 1 << 20)
    except OverlayFullError:
        assert disk.pread(900 << 10, 1 << 20) == bytes(900 << 10)
    else:
        raise AssertionError("there was no room for this")
"""
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no file system of its own can be mounted here (unshare -rm)")
    subprocess.run(["unshare", "-rm", sys.executable, "-c", script], check=True)


def test_a_disk_of_4_tib_opens_in_a_few_mib() -> None:
    script = """
import resource
from cowkit.disk import Disk, ZeroBase
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
disk = Disk(ZeroBase(4 << 40))
disk.pwrite(b"x", (4 << 40) - 1)
disk.trim(4 << 40, 0)
assert disk.pread(1, (4 << 40) - 1) == b"\\0"
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
disk.close()
"""
    grown = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert grown < 8 << 10  # KiB


# The last bytes


@pytest.mark.parametrize("size", [0, 1, 511, 4096, 100_000, 130_000])
def test_a_size_that_is_no_multiple_of_the_block_is_served_whole(tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd.img"
    content = os.urandom(size)
    path.write_bytes(content)
    with Disk(FileBase(path)) as disk:
        assert disk.size == size
        assert disk.pread(size, 0) == content
        if size:
            disk.pwrite(b"!", size - 1)
            assert disk.pread(size, 0) == content[:-1] + b"!"
            assert disk.dirty_bytes == (size - 1) % BLOCK + 1


def test_trimming_a_ragged_disk_whole_zeroes_its_ragged_end() -> None:
    with Disk(ZeroBase(100_000)) as disk:
        disk.pwrite(b"\x21" * 100_000, 0)
        disk.trim(100_000, 0)
        assert disk.pread(100_000, 0) == bytes(100_000)


@pytest.mark.parametrize("size", [4 << 30, (4 << 30) + 4096])
def test_a_disk_around_4_gib_keeps_what_is_written_on_both_sides_of_the_border(size: int) -> None:
    with Disk(ZeroBase(size)) as disk:
        for offset in (0, (4 << 30) - 4096, size - 100):
            disk.pwrite(b"border" + offset.to_bytes(8), offset)
        for offset in (0, (4 << 30) - 4096, size - 100):
            assert disk.pread(14, offset) == b"border" + offset.to_bytes(8)
        assert disk.dirty_bytes == BLOCK * (2 if size == 4 << 30 else 3)


def test_requests_beyond_the_end_are_refused_and_write_nothing() -> None:
    with Disk(ZeroBase(10_000)) as disk:
        for offset in (-1, 9_990, 10_001, 2**64):
            for method in (disk.pread, disk.zero, disk.trim, disk.cache):
                with pytest.raises(OutOfBoundsError, match="not within the disk"):
                    method(20, offset)
            with pytest.raises(OutOfBoundsError):
                disk.pwrite(b"x" * 20, offset)
        assert disk.dirty_bytes == 0


# Checkpoints


def test_rolling_back_drops_later_checkpoints_and_keeps_the_point_itself() -> None:
    with Disk(ZeroBase(BLOCK)) as disk:
        first, second = disk.checkpoint("first"), disk.checkpoint("second")
        disk.pwrite(b"x", 0)
        disk.rollback(first)
        disk.rollback("first")
        with pytest.raises(CheckpointError, match="no checkpoint 'second'"):
            disk.rollback(second)
        disk.reset()
        with pytest.raises(CheckpointError, match="it has: none"):
            disk.rollback(first)


def test_two_checkpoints_cannot_share_a_name_and_a_name_is_a_text() -> None:
    with Disk(ZeroBase(BLOCK)) as disk:
        disk.checkpoint("checkpoint-1")
        assert disk.checkpoint().name == "checkpoint-2"
        with pytest.raises(CheckpointError, match="already"):
            disk.checkpoint("checkpoint-1")
        for name in ("", "a\0b", "two\nlines", "\udcff", "x" * 1024):
            with pytest.raises(UsageError, match="no printable text"):
                disk.checkpoint(name)


def test_no_checkpoint_has_the_name_of_the_dirty_bitmap_of_everything() -> None:
    with Disk(ZeroBase(BLOCK)) as disk:
        with pytest.raises(UsageError, match="qemu:dirty-bitmap:cow is what was written since the beginning"):
            disk.checkpoint("cow")
        assert disk.checkpoints == []


def test_a_disk_out_of_layers_says_so_and_goes_on() -> None:
    with Disk(ZeroBase(BLOCK)) as disk:
        with pytest.raises(CheckpointError, match="layers"):
            for n in range(300):
                disk.pwrite(bytes([n % 256]), 0)
                disk.checkpoint()
        taken = len(disk.checkpoints)
        assert taken > 250 and disk.pread(1, 0) == bytes([taken])
        disk.rollback("checkpoint-7")
        disk.pwrite(b"x", 1)
        assert disk.pread(2, 0) == b"\6x"


def test_a_thousand_checkpoints_without_writes_between_them_take_no_layers() -> None:
    with Disk(ZeroBase(BLOCK)) as disk:
        for _ in range(1000):
            disk.checkpoint()
        disk.pwrite(b"x", 0)
        assert len(disk.overlay.layers) == 1


def test_a_thousand_views_taken_between_writes_leave_one_layer() -> None:
    with Disk(ZeroBase(64 * BLOCK)) as disk:
        for n in range(1000):
            disk.pwrite(n.to_bytes(2), n % 64 * BLOCK)
            with disk.freeze() as view:
                disk.pwrite(b"later", 63 * BLOCK)
                assert view.pread(2, n % 64 * BLOCK) == n.to_bytes(2)
        assert len(disk.overlay.layers) == 1


# What is left


def test_nothing_is_left_of_a_process_that_was_killed(tmp_path: Path) -> None:
    script = f"""
import sys
from cowkit.disk import Disk, ZeroBase
disk = Disk(ZeroBase(1 << 20), tmpdir={str(tmp_path)!r})
disk.pwrite(b"x" * (1 << 20), 0)
print("ready", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        assert list(tmp_path.iterdir()) == []
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_closing_closes_every_descriptor_and_what_is_closed_says_so(base_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    disk = Disk(FileBase(base_path))
    disk.pwrite(b"x", 0)
    into: list[memoryview] = [view for _, _, view in disk.overlay.segments(0, 2 * BLOCK) if view is not None]
    assert into
    point = disk.checkpoint()
    disk.pwrite(b"y", 0)
    del into
    disk.close()
    disk.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == threads
    for call in (lambda: disk.pread(1, 0), lambda: disk.pwrite(b"x", 0), lambda: disk.rollback(point), disk.freeze):
        with pytest.raises(DiskClosedError):
            call()


def test_a_view_outlives_its_disk(base_path: Path) -> None:
    content = base_path.read_bytes()
    disk = Disk(FileBase(base_path))
    disk.pwrite(b"x", 0)
    view = disk.freeze()
    disk.close()
    assert view.pread(16 * BLOCK, 0) == b"x" + content[1:]
    view.close()
    with pytest.raises(DiskClosedError):
        view.pread(1, 0)


def test_the_overlay_is_a_nameless_file_of_its_owner_alone(tmp_path: Path) -> None:
    with Disk(ZeroBase(BLOCK), tmpdir=tmp_path) as disk:
        disk.pwrite(b"x", 0)
        status = os.fstat(disk.overlay.layers[disk.overlay.top].fd)
        assert status.st_nlink == 0
        assert stat.S_IMODE(status.st_mode) == 0o600


def test_the_overlay_is_in_tmpdir_or_var_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Disk(ZeroBase(BLOCK)) as disk:
        assert disk.overlay.directory == str(tmp_path)
    monkeypatch.delenv("TMPDIR")
    with Disk(ZeroBase(BLOCK)) as disk:
        assert disk.overlay.directory == "/var/tmp"


def test_a_size_that_needs_larger_blocks_says_how_large() -> None:
    with pytest.raises(UsageError, match="set the block size to 65536 or more"):
        Disk(ZeroBase(1 << 50))
    with Disk(ZeroBase(1 << 50), block_size=65536) as disk:
        disk.pwrite(b"far", 1 << 43)
        assert disk.pread(3, 1 << 43) == b"far"
    with pytest.raises(UsageError, match="256 PiB"):
        Disk(ZeroBase(1 << 60), block_size=4096)


def test_a_checkpoint_of_another_disk_is_refused_in_words_that_fit_where_both_have_one_of_that_name(
    tmp_path: Path,
) -> None:
    with Disk(ZeroBase(1 << 20), tmpdir=tmp_path) as one, Disk(ZeroBase(1 << 20), tmpdir=tmp_path) as other:
        point = one.checkpoint("a")
        with pytest.raises(CheckpointError, match=r"no checkpoint 'a' .any more.; it has: none"):
            other.rollback(point)
        other.checkpoint("a")
        with pytest.raises(CheckpointError, match=r"it has: 'a'; that 'a' is another one than was given"):
            other.rollback(point)
        other.rollback("a")
