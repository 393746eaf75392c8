"""A forked child has copies of its parent's disk and servers, and can do them no harm."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from cowkit import CowDisk


def greeted(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        return client.recv(18).startswith(b"NBDMAGIC")


def drop(disk: CowDisk) -> None:
    disk.__del__()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("end", [CowDisk.close, drop])
def test_a_child_that_closes_the_disk_leaves_its_parents_servers_alone(
    tmp_path: Path, end: Callable[[CowDisk], None]
) -> None:
    with CowDisk(size="1M") as disk:
        own, named = disk.socket, str(tmp_path / "s")
        if len(named) > 100:
            named = f"/tmp/cowkit-test-{os.getpid()}"
        disk.serve(socket=named)
        assert greeted(own)
        assert greeted(named)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            status = 1
            try:
                end(disk)
                status = 0 if disk.closed else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert greeted(own)
        assert greeted(named)
        assert disk.server_errors == []
    assert not os.path.exists(named)
