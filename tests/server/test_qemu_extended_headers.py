"""Extended headers with a real client: QEMU 8.2 and later ask for them, and then send 64-bit lengths."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from cowkit import CowDisk
from cowkit.disk import Kind
from cowkit.server.requests import Requests

GIB = 1 << 30
QEMU_IO = os.environ.get("COWKIT_TEST_QEMU_IO") or shutil.which("qemu-io")
"""Another than the distribution's may be named: Debian 12 has 7.2, and 10 among its backports."""


def version() -> tuple[int, ...]:
    if QEMU_IO is None:
        return (0,)
    said = subprocess.run([QEMU_IO, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    assert found is not None
    return int(found[1]), int(found[2])


@pytest.mark.skipif(
    version() < (8, 2), reason="a QEMU before 8.2 has no extended headers; COWKIT_TEST_QEMU_IO names another"
)
def test_qemu_zeroes_8_gib_and_asks_for_the_status_of_32_gib_in_one_request_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int, int]] = []
    carry_out = Requests.carry_out

    def note(self: Requests, payload: memoryview, flags: int, command: int, cookie: int, *rest: object) -> None:
        offset, length = rest[:2]
        assert isinstance(offset, int)
        assert isinstance(length, int)
        assert self._dialect.extended
        seen.append((command, offset, length))
        carry_out(self, payload, flags, command, cookie, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Requests, "carry_out", note)
    with CowDisk(size="32G") as disk:
        disk.pwrite(b"x" * 65536, 8 * GIB)
        commands = [word for each in ("write -z -n 1G 8G", "read -P 0 8G 64k", "map") for word in ("-c", each)]
        assert QEMU_IO is not None
        done = subprocess.run([QEMU_IO, "-f", "raw", *commands, disk.uri], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [*disk.dirty_extents()] == [(GIB, 8 * GIB, Kind.ZERO)]
    assert (6, GIB, 8 * GIB) in seen
    assert (7, 0, 32 * GIB) in seen
