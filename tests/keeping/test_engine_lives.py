"""However an engine ends: the old file stays, no half file, no process and no socket is left, and there is one line to read."""

from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cowkit import CowDisk
from cowkit.diff import Qcow2Image
from cowkit.diff.options import EngineName
from cowkit.errors import BaseChangedError, MissingToolError, OutputError, UsageError
from cowkit.hosting.process import end_idle_host
from tests.diff.helpers import make_base, noise, run
from tests.limits import files_limited_to

pytestmark = pytest.mark.requires("qemu-img", "qemu-storage-daemon", "setpriv", modules=["nbd", "qemu.qmp"])

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]

each_engine = pytest.mark.parametrize("engine", ["qemu-img", "qmp"])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[CowDisk]:
    """A changed disk of 4 MiB, and an old file where its difference goes."""
    make_base(tmp_path / "base.img", 4 * MIB, {0: noise(4 * MIB, 1)})
    (tmp_path / "diff.qcow2").write_bytes(b"old")
    with CowDisk(tmp_path / "base.img", tmpdir=tmp_path) as disk:
        disk.pwrite(random.Random(1).randbytes(3 * MIB), 4096)  # which does not get smaller
        yield disk


@pytest.fixture(autouse=True)
def _no_children() -> Iterator[None]:
    before = children(os.getpid())  # the host of disks in a process of their own, for instance
    yield
    assert set(children(os.getpid())) <= set(before)


def children(pid: int) -> list[int]:
    """The processes that it has started, and theirs."""
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError):  # a thread that has just ended
                for child in map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()):
                    found += [child, *children(child)]
    except FileNotFoundError:
        pass  # it has itself
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def nothing_happened(folder: Path) -> None:
    assert names(folder) == ["base.img", "diff.qcow2"]
    assert (folder / "diff.qcow2").read_bytes() == b"old"


@each_engine
@pytest.mark.parametrize("compress", [None, "zlib"])
def test_a_full_disk_is_one_line_with_the_words_of_the_program(
    engine: EngineName, compress: None, disk: CowDisk, tmp_path: Path
) -> None:
    with files_limited_to(1 * MIB), pytest.raises(OutputError) as caught:
        disk.diff(tmp_path / "diff.qcow2", engine=engine, compress=compress, cluster_size="4K")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"cannot write {tmp_path}/diff.qcow2: qemu-")
    assert str(caught.value).endswith(("File too large", "No space left on device"))
    nothing_happened(tmp_path)


class Enough(BaseException):
    """What ctrl-C is like."""


@each_engine
def test_an_interrupt_ends_the_program(engine: EngineName, disk: CowDisk, tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        disk.diff(tmp_path / "diff.qcow2", engine=engine, progress=progress)
    nothing_happened(tmp_path)


@each_engine
def test_progress_is_told_from_the_beginning_to_the_end(engine: EngineName, disk: CowDisk, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    disk.diff(tmp_path / "diff.qcow2", engine=engine, progress=lambda done, total: told.append((done, total)))
    assert len({total for _, total in told}) == 1
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0
    assert len(told) > 3


@each_engine
def test_a_program_that_is_killed_is_one_line(engine: EngineName, disk: CowDisk, tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        for child in children(os.getpid()):
            os.kill(child, signal.SIGKILL)

    with pytest.raises(OutputError) as caught:
        disk.diff(tmp_path / "diff.qcow2", engine=engine, progress=kill)
    assert str(caught.value).endswith(": it was ended by signal 9")
    nothing_happened(tmp_path)


_ALONE = """
import os, signal, sys
from cowkit import CowDisk
def progress(done, total):
    print("at work", flush=True)
    signal.pause()
with CowDisk("base.img", server=sys.argv[2]) as disk:
    disk.pwrite(os.urandom(3 << 20), 4096)
    try:
        disk.diff("diff.qcow2", engine=sys.argv[1], progress=progress)
    except KeyboardInterrupt:
        print("interrupted")
"""


@each_engine
@pytest.mark.parametrize("server", ["thread", "process"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_program_does_not_outlive_a_process_that_ends(
    engine: str, server: str, number: signal.Signals, tmp_path: Path
) -> None:
    make_base(tmp_path / "base.img", 2048 * MIB, {0: noise(4 * MIB, 1)})  # qemu-img reads it for about a second
    (tmp_path / "diff.qcow2").write_bytes(b"old")
    with subprocess.Popen(
        [sys.executable, "-c", _ALONE, engine, server],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"at work\n"
        watched = [os.pidfd_open(child) for child in children(process.pid)]
        process.send_signal(number)
        rest = process.stdout.read()
        process.wait(60)
    assert watched
    if number is signal.SIGINT:
        assert rest == b"interrupted\n"
        assert names(tmp_path) == ["base.img", "diff.qcow2"]
    poll = select.poll()
    for fd in watched:
        poll.register(fd, select.POLLIN)
    while watched:  # each of them ends
        for fd, _ in poll.poll(60_000):
            poll.unregister(fd)
            watched.remove(fd)
            os.close(fd)
    assert (tmp_path / "diff.qcow2").read_bytes() == b"old"
    with CowDisk(tmp_path / "base.img") as disk:  # who comes next clears up
        disk.diff(tmp_path / "diff.qcow2", engine="native")
        disk.uri  # noqa: B018 - and so does the next server, of directories for sockets
    nothing = names(tmp_path)
    assert nothing == ["base.img", "diff.qcow2"]


@each_engine
def test_a_missing_program_is_said_with_its_package(
    engine: EngineName, disk: CowDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = tmp_path / "bin"
    only.mkdir()
    (only / "setpriv").symlink_to("/usr/bin/setpriv")
    monkeypatch.setenv("PATH", str(only))
    package = {"qemu-img": "qemu-utils", "qmp": "qemu-system-common"}[engine]
    with pytest.raises(
        MissingToolError, match=rf"qemu-.* is not installed, .*{engine} needs it: apt install {package}"
    ):
        disk.diff(tmp_path / "diff.qcow2", engine=engine)


def test_a_missing_package_of_python_is_said(disk: CowDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cowkit.diff.engines.qmp_session", raising=False)
    monkeypatch.delitem(sys.modules, "cowkit.diff.engines.storage_daemon", raising=False)
    monkeypatch.delitem(sys.modules, "cowkit.diff.engines.image", raising=False)
    monkeypatch.setitem(sys.modules, "qemu.qmp", None)
    with pytest.raises(MissingToolError, match=r" -m pip install qemu\.qmp`$"):
        disk.diff(tmp_path / "diff.qcow2", engine="qmp")
    nothing_happened(tmp_path)


@each_engine
def test_a_base_that_changed_is_noticed(engine: EngineName, tmp_path: Path) -> None:
    make_base(tmp_path / "base.img", MIB, {0: noise(MIB, 1)})
    (tmp_path / "diff.qcow2").write_bytes(b"old")

    def spoil(done: int, total: int) -> None:
        os.utime(tmp_path / "base.img", (1, 1))

    with pytest.raises(BaseChangedError), CowDisk(tmp_path / "base.img", tmpdir=tmp_path) as disk:
        disk.pwrite(b"boo", 0)
        disk.diff(tmp_path / "diff.qcow2", engine=engine, progress=spoil)
    nothing_happened(tmp_path)


@each_engine
def test_mode_and_links_of_the_old_file_are_kept(engine: EngineName, disk: CowDisk, tmp_path: Path) -> None:
    (tmp_path / "diff.qcow2").chmod(0o640)
    (tmp_path / "link").symlink_to("diff.qcow2")
    disk.diff(tmp_path / "link", engine=engine)
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "diff.qcow2").stat().st_mode) == 0o640
    run("qemu-img", "check", "-q", tmp_path / "diff.qcow2")


@each_engine
def test_the_base_is_never_replaced(engine: EngineName, disk: CowDisk, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="which is still needed"):
        disk.diff(tmp_path / "base.img", engine=engine)


@each_engine
@pytest.mark.parametrize("name", [b"\xff\xfe.qcow2", b"json:{}.qcow2", b"nbd:x, y='z'.qcow2", b"feed me\n.qcow2"])
def test_names_of_any_kind_will_do(engine: EngineName, name: bytes, disk: CowDisk, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    disk.diff(path, engine=engine)
    with Qcow2Image(path, disk.engine.base.pread, disk.size) as image:
        image.check()
        assert image.pread(image.size, 0) == disk.pread(disk.size, 0)


@each_engine
def test_a_host_writes_them_too(engine: EngineName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_base(tmp_path / "base.img", MIB, {0: noise(MIB, 1)})
    monkeypatch.chdir(tmp_path)
    with CowDisk("base.img", server="process") as disk:
        disk.pwrite(b"boo", 5000)
        report = disk.diff("diff.qcow2", engine=engine)
        assert (report.engine, report.backing_file) == (engine, "base.img")
        disk.diff("raw.img", raw=True)
        run("qemu-img", "compare", "-q", "diff.qcow2", "raw.img")
        if engine == "qmp":
            with pytest.raises(OutputError, match="Refcount width"):
                disk.diff("diff.qcow2", image_options={"refcount-bits": 3})
            with pytest.raises(UsageError, match="nix"):
                disk.diff("diff.qcow2", secret_file=Path("nix"))
    end_idle_host()


def test_a_coroutine_can_take_a_difference_by_qmp(disk: CowDisk, tmp_path: Path) -> None:
    async def take() -> None:
        disk.diff(tmp_path / "diff.qcow2", engine="qmp")

    asyncio.run(take())
    run("qemu-img", "check", "-q", tmp_path / "diff.qcow2")
