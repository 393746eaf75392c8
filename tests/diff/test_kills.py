"""SIGKILL at any moment of `cowkit diff` and `cowkit apply`: the target is the old file, the new one, or finished by the next run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cowkit import CowDisk
from cowkit.bases.unfinished import journal_of
from cowkit.diff.applying.in_place import apply_in_place
from cowkit.errors import BaseOpenError
from tests.diff.helpers import make_base, noise

MIB = 1 << 20
SIZE = 8 * MIB
ROUNDS = [4, pytest.param(50, marks=pytest.mark.slow)]

# Forks, so that a run costs no start of Python: the child is killed when it has made a certain number of system calls that
# matter, or after a moment that is drawn.
_WORK = """
import os, signal, sys, time
sys.path[:0] = [sys.argv[1]]
import cowkit.diff.applying.copy, cowkit.diff.applying.in_place
from cowkit import CowDisk
from cowkit.diff.applying.copy import apply_to
from cowkit.diff.applying.in_place import apply_in_place
import cowkit.diff.native, cowkit.keeping.live

what, base, diff, new = sys.argv[2:6]
disk = CowDisk(base, overlay=diff) if what == "diff" else None
for line in sys.stdin:
    calls, seconds = int(line.split()[0]), float(line.split()[1])
    child = os.fork()
    if not child:
        for name in ("pwrite", "fsync", "rename", "unlink", "ftruncate", "copy_file_range", "open", "write"):
            def counted(*arguments, real=getattr(os, name), **options):
                global calls
                calls -= 1
                if calls == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)
            setattr(os, name, counted)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        if what == "diff":
            with CowDisk(base, overlay=diff) as mine:
                mine.diff(new)
        elif what == "to":
            apply_to(diff, new)
        else:
            apply_in_place(diff)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
if disk:
    disk.close()
"""


class Worker:
    """A process that does the work in children of its own, which are killed."""

    def __init__(self, what: str, base: Path, diff: Path, new: Path) -> None:
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-c", _WORK, *map(str, (root, what, base, diff, new))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, calls: int, seconds: float) -> bool:
        """Whether it came to its end; otherwise it was killed."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{calls} {seconds}\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        assert status in (0, signal.SIGKILL)
        return status == 0

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base.img", SIZE, {0: noise(SIZE // 2, 1)})


@pytest.fixture
def after(base: Path, tmp_path: Path) -> bytes:
    """What the disk reads as whose difference is diff.qcow2."""
    with CowDisk(base) as disk:
        for at in range(0, SIZE, MIB):
            disk.pwrite(noise(300_000, at // MIB + 2), at + 5000)
        disk.zero(MIB, MIB)
        disk.diff(tmp_path / "diff.qcow2")
        return disk.pread(SIZE, 0)


def moments(rounds: int, most_calls: int) -> list[tuple[int, float]]:
    chance = random.Random(rounds)
    half = [(chance.randrange(1, most_calls), 30.0) for _ in range(rounds)]
    return half + [(1 << 30, chance.uniform(0.0005, 0.05)) for _ in range(rounds)]


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("what", ["diff", "to"])
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(
    what: str, rounds: int, base: Path, after: bytes, tmp_path: Path
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    new = place / ("new.qcow2" if what == "diff" else "new.img")
    before = base.read_bytes()
    worker = Worker(what, base, tmp_path / "diff.qcow2", new)
    killed = 0
    for calls, seconds in moments(rounds, 30):
        new.write_bytes(b"old")
        ended = worker.run(calls, seconds)
        killed += not ended
        if new.read_bytes() == b"old":
            assert not ended
        elif what == "to":
            assert new.read_bytes() == after
        else:
            with CowDisk(base, overlay=new) as disk:
                assert disk.pread(SIZE, 0) == after
        assert base.read_bytes() == before
    assert killed
    new.write_bytes(b"old")
    assert worker.run(1 << 30, 60)
    worker.close()
    assert os.listdir(place) == [new.name]  # and what the killed ones left is gone


@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_base_that_is_half_written_is_finished_by_the_next_run(
    rounds: int, base: Path, after: bytes, tmp_path: Path
) -> None:
    before = base.read_bytes()
    sound = Path(shutil.copy(base, tmp_path / "sound.img"))
    diff = tmp_path / "diff.qcow2"
    worker = Worker("in-place", base, diff, tmp_path / "unused")
    seen = set()
    for calls, seconds in moments(rounds, 40):
        shutil.copyfile(sound, base)
        ended = worker.run(calls, seconds)
        if os.path.exists(journal_of(str(base))):
            assert not ended
            seen.add("half")
            with pytest.raises(BaseOpenError, match="half written"):
                CowDisk(base)
            assert apply_in_place(diff).finished
        elif base.read_bytes() == before:
            assert not ended
            seen.add("old")
            assert not apply_in_place(diff).finished
        assert base.read_bytes() == after
        assert not os.path.exists(journal_of(str(base)) + ".new")
    worker.close()
    assert seen == {"old", "half"}
