"""The host process: one for each process that wants one, gone when that is, and leaving nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowkit import CowDisk
from cowkit.errors import ServerError
from cowkit.hosting.process import end_idle_host, host
from tests.hosting.helpers import ROOT, alive, host_of, program, runtime, until

SERVES = """
import os, sys
from cowkit import CowDisk
disk = CowDisk(size="1M", server="process")
disk.pwrite(b"data", 0)
print(disk._hosted._host.pid, disk.socket, flush=True)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with runtime() as found:
        yield found


def descriptors(pid: int) -> list[str]:
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            found.append(os.readlink(f"/proc/{pid}/fd/{name}").partition(":")[0])
    return sorted(found)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_no_process_is_started_before_a_disk_needs_it_and_all_disks_share_one() -> None:
    source = """
import os, sys
from cowkit import CowDisk
CowDisk(size="1M").close()
assert "cowkit.hosting.process" not in sys.modules
assert not open(f"/proc/self/task/{os.getpid()}/children").read()
disks = [CowDisk(size="1M", server="process") for _ in range(5)]
assert len({disk._hosted._host.pid for disk in disks}) == 1
assert len(open(f"/proc/self/task/{os.getpid()}/children").read().split()) == 1
for disk in disks:
    disk.close()
"""
    subprocess.run([sys.executable, "-c", source], check=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_cheap_disk_in_this_process_imports_neither_sockets_nor_processes_nor_the_host() -> None:
    source = """
import sys
from cowkit import CowDisk
with CowDisk(size="1G") as disk:
    pass
wrong = {"socket", "subprocess", "pickle", "tempfile", "ctypes", "select", "cowkit.server", "cowkit.hosting.process"}
assert not wrong & set(sys.modules), wrong & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", source], check=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_what_the_host_imports_is_what_it_needs() -> None:
    end_idle_host()
    with CowDisk(size="1M", server="process") as disk:
        assert disk.uri
        maps = Path(f"/proc/{host_of(disk).pid}/maps").read_text()
    assert "_ctypes" not in maps
    assert "_ssl" not in maps
    assert "libnbd" not in maps


def test_clients_are_served_while_this_process_does_not_run_at_all(folder: Path) -> None:
    with program(SERVES + "sys.stdin.read()", folder) as process:
        assert process.stdout is not None
        _, path = process.stdout.readline().split()
        process.send_signal(signal.SIGSTOP)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(path)
            assert client.recv(18).startswith(b"NBDMAGIC")
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    "end",
    [
        "sys.exit()",
        "disk.close()",
        "raise KeyError",
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os.killpg(0, signal.SIGKILL)",
    ],
)
def test_the_host_ends_with_the_process_and_nothing_is_left(folder: Path, end: str) -> None:
    with program(SERVES + f"import signal\nsys.stdin.read(1)\n{end}", folder) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        pid, path = process.stdout.readline().split()
        assert alive(int(pid))
        assert os.path.exists(path)
        process.stdin.write("x")
        process.stdin.close()
        process.wait(20)
        until(lambda: not alive(int(pid)))
    assert os.listdir(folder) == []


def test_a_process_that_ends_by_itself_waits_for_the_end_of_its_host(folder: Path) -> None:
    # What is registered first is called last.
    source = f"import atexit, os\natexit.register(lambda: print(os.path.exists(f'/proc/{{pid}}')))\n{SERVES}"
    with program(source + "pid = disk._hosted._host.pid\ndisk.close()", folder) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process.stdout.read().strip() == "False"


def test_a_child_that_outlives_the_process_does_not_keep_the_host(folder: Path) -> None:
    # The child is made behind Python's back, so that it keeps its copies of the sockets.
    source = SERVES + "import ctypes\nctypes.CDLL(None).fork()\nos.read(0, 1)"
    with program(source, folder) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline().split()[0])
        until(lambda: len(children(process.pid)) == 2)
        process.kill()
        until(lambda: not alive(pid))
        assert os.listdir(folder) == []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_ctrl_c_at_the_terminal_does_not_end_the_host(folder: Path) -> None:
    source = (
        SERVES
        + "try:\n    print('waits', flush=True)\n    sys.stdin.read()\nexcept KeyboardInterrupt:\n    print(disk.pread(4, 0), flush=True)"
    )
    with program(source, folder) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline().split()[0])
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        assert process.stdout.readline().strip() == "b'data'"


def test_a_host_that_was_killed_is_told_of_by_each_of_its_disks_and_the_next_disk_has_a_new_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COWKIT_RUNTIME_DIR", str(folder))
    one, two = (CowDisk(size="1M", server="process") for _ in range(2))
    server = one.serve()
    assert one.uri
    before = host_of(one)
    os.kill(before.pid, signal.SIGKILL)
    with pytest.raises(ServerError, match=rf"host process {before.pid} .* ended by signal 9 \(Killed\)"):
        one.pread(1, 0)
    with pytest.raises(ServerError, match="ended by signal 9"):
        one.uri  # noqa: B018 - that was there before
    with pytest.raises(ServerError, match="ended by signal 9"):
        server.stop()
    with pytest.raises(ServerError, match="what was written is lost; new disks get a new host"):
        two.close()
    with pytest.raises(ServerError, match="ended by signal 9"):
        one.close()
    one.close()
    two.close()
    assert os.listdir(folder) == []
    with CowDisk(size="1M", server="process") as disk:
        assert host_of(disk) is not before
        assert disk.pread(1, 0) == b"\0"


def test_a_host_that_was_killed_unnoticed_is_replaced() -> None:
    with CowDisk(size="1M", server="process") as disk:
        before = host_of(disk)
    os.kill(before.pid, signal.SIGKILL)
    until(before.gone)
    with CowDisk(size="1M", server="process") as disk:
        assert host_of(disk) is not before


def test_a_call_under_way_ends_when_the_host_is_killed() -> None:
    disk = CowDisk(size="64M", server="process")
    errors = []

    def work() -> None:
        try:
            while True:
                disk.pwrite(b"x" * (1 << 20), 0)
        except ServerError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    os.kill(host_of(disk).pid, signal.SIGKILL)
    for thread in threads:
        thread.join(20)
    assert len(errors) == 4
    with pytest.raises(ServerError):
        disk.close()


def test_a_host_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    end_idle_host()
    monkeypatch.setattr("cowkit.hosting.process._BOOTSTRAP", "raise KeyError('no luck')")
    with pytest.raises(ServerError, match=r"ended with status 1, saying \"KeyError: 'no luck'\""):
        CowDisk(size="1M", server="process")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ServerError, match=r"cannot start a host process with '/nowhere/python': No such file"):
        CowDisk(size="1M", server="process")
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(ServerError, match="does not know its own program"):
        CowDisk(size="1M", server="process")
    monkeypatch.undo()
    CowDisk(size="1M", server="process").close()


def test_a_host_without_disks_can_be_ended_and_one_with_disks_is_left_alone() -> None:
    with CowDisk(size="1M", server="process") as disk:
        pid = host_of(disk).pid
        end_idle_host()
        assert disk.pread(1, 0) == b"\0"
    end_idle_host()
    assert not alive(pid)
    end_idle_host()


def test_a_thousand_disks_leave_neither_descriptors_nor_threads_nor_processes(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(bytes(65536))

    def use(turn: int) -> None:
        with CowDisk(base, server="process") as disk:
            disk.pwrite(b"x", 0)
            if turn % 10 == 0:
                disk.checkpoint()
                assert disk.uri
                disk.serve(on_idle=lambda: None)
            if turn % 100 == 0:
                disk.diff(tmp_path / "d.qcow2")

    use(0)
    pid = host().pid
    before = descriptors(os.getpid()), descriptors(pid), threading.active_count(), children(os.getpid())
    for turn in range(1000):
        use(turn)
    after = descriptors(os.getpid()), descriptors(pid), threading.active_count(), children(os.getpid())
    assert after == before


def test_a_host_without_descriptors_left_says_so_and_goes_on() -> None:
    import resource

    with CowDisk(size="1M", server="process") as disk:
        disk.serve().stop()  # or importing what serves would need a descriptor first
        pid = host_of(disk).pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), hard))
        with pytest.raises(ServerError, match="Too many open files"):
            disk.serve()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        disk.serve()
