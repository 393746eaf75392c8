"""An exception from outside at any moment, as ctrl-C and a test's time limit are, leaves disks, host and process usable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cowkit import CowDisk
from cowkit.errors import UsageError
from tests.hosting.helpers import ROOT

INTERRUPTED = """
import os, random, signal, sys, time
from cowkit import CowDisk
from cowkit.hosting.process import host

class Interrupt(Exception):
    pass

def interrupt(*_):
    raise Interrupt

def held(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))

signal.signal(signal.SIGALRM, interrupt)
rng = random.Random(int(sys.argv[1]))
out = sys.argv[2]
disk = CowDisk(size="64M", server="process")
disk.pwrite(b"x" * (1 << 20), 0)
pid = host().pid
before = held(os.getpid()), held(pid)

def another():
    other = None
    try:
        other = CowDisk(size="1M", server="process")
        other.pwrite(b"y", 0)
    finally:
        if other is not None:
            other.close()

work = [
    lambda: disk.pwrite(b"x" * 9000, rng.randrange(60 << 20)),
    lambda: disk.pwrite(b"y" * (2 << 20), rng.randrange(60 << 20)),
    lambda: disk.pread(9000, rng.randrange(60 << 20)),
    lambda: disk.pread(2 << 20, rng.randrange(60 << 20)),
    lambda: disk.rollback(disk.checkpoint()),
    lambda: disk.diff(os.path.join(out, "d.qcow2"), progress=lambda done, total: None),
    lambda: disk.serve().stop(),
    another,
]
for turn in range(150):
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.choice([1, 3, 10, 30, 100]) * 1e-4, 0.01)
        while True:
            rng.choice(work)()
    except Interrupt:
        pass
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupt:
        pass
    disk.pwrite(b"alive", 100)
    disk.checkpoint()
    assert disk.pread(5, 100) == b"alive"
    disk.reset()
assert host().pid == pid
disk.diff(os.path.join(out, "d.qcow2"))
assert os.listdir(out) == ["d.qcow2"], os.listdir(out)
disk.close()
end = time.monotonic() + 20
while time.monotonic() < end and held(os.getpid()) > before[0] + 4:
    pass
print(before, (held(os.getpid()), held(pid)))
"""


@pytest.mark.parametrize("seed", range(3))
def test_an_interrupt_at_any_moment_leaves_the_disk_and_the_host_usable(seed: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERRUPTED, str(seed), str(tmp_path)],
        timeout=100,
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


class Unsendable:
    def __reduce__(self) -> str:
        raise TypeError("not this one")


def test_an_argument_that_cannot_be_sent_or_understood_is_refused_and_the_disk_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("known_here_alone")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec("class Text(str): pass", vars(module))
    with CowDisk(size="1M", server="process") as disk:
        with pytest.raises(UsageError, match="cannot be sent to the host of the disk: not this one"):
            disk.diff(tmp_path / "d", backing_file=Unsendable())  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="cannot be understood by the host of the disk"):
            disk.diff(tmp_path / "d", backing_file=module.Text("x"))
        disk.diff(tmp_path / "d")
