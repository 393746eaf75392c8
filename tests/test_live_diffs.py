"""Differences of a live disk under load: each is the disk at one moment."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from cowkit import CowDisk
from tests.diff.helpers import make_base, noise

MIB = 1 << 20
SIZE = 16 * MIB
PATIENCE = 60


@pytest.mark.requires("fio")
@pytest.mark.parametrize("options", [{}, pytest.param({"subclusters": True}, marks=pytest.mark.slow)])
def test_ten_differences_under_load_equal_frozen_copies(options: dict[str, Any], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", SIZE, {0: noise(4 * MIB, 1), 10 * MIB: noise(4 * MIB, 2)})
    with CowDisk(base) as disk:
        job = [
            *("fio", "--name=load", "--ioengine=nbd", f"--uri={disk.uri}", "--rw=randrw", "--rwmixwrite=70"),
            *("--bsrange=4k-256k", "--iodepth=8", f"--size={SIZE}", "--time_based", "--runtime=60", "--randseed=7"),
        ]
        with subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path) as load:
            deadline = time.monotonic() + PATIENCE
            while not disk.dirty_bytes and load.poll() is None and time.monotonic() < deadline:
                pass
            copies = []
            for number in range(10):
                point = disk.checkpoint(f"p{number}")
                with disk.engine.freeze(point) as frozen:
                    disk.diff(tmp_path / f"d{number}.qcow2", at=point, **options)
                    copies.append(frozen.pread(SIZE, 0))
            assert load.poll() is None, load.stderr and load.stderr.read()
            load.terminate()
            load.communicate(timeout=PATIENCE)
        assert len(set(copies)) > 1
        since = [
            disk.diff(tmp_path / f"i{n}.qcow2", since=f"p{n - 1}", at=f"p{n}", backing_file=_name(n)) for n in (1, 2)
        ]
        assert all(report.backing_format == "qcow2" for report in since)
    for number, copy in enumerate(copies):
        with CowDisk(base, overlay=tmp_path / f"d{number}.qcow2") as disk:
            assert disk.pread(SIZE, 0) == copy, f"difference {number}"
    with CowDisk(base, overlay=tmp_path / "i2.qcow2") as disk:
        assert disk.pread(SIZE, 0) == copies[2]


def _name(number: int) -> str:
    """What the increment of that number stands on."""
    return "d0.qcow2" if number == 1 else "i1.qcow2"
