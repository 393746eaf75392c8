"""Fixtures that run the command line."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.helpers import COWKIT, PATIENCE, ROOT, Done, Run, Serve, Server


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own, in a short path."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="cowkit-test-") as made:
        place = Path(made) / "run"
        monkeypatch.setenv("COWKIT_RUNTIME_DIR", str(place))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.delenv("COWKIT_DEBUG", raising=False)
        yield place
        assert not place.exists() or list(place.iterdir()) == [], "nothing is left behind"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    # The same each time: of random bytes, one in 256 is what a test writes over it, and then nothing changes.
    path.write_bytes(random.Random(1).randbytes(1 << 20))
    return path


@pytest.fixture
def cowkit(tmp_path: Path) -> Run:
    """Run the command in the test's directory: its status and what it printed."""

    def run(*arguments: object, **options: str) -> Done:
        return subprocess.run(
            [*COWKIT, *map(str, arguments)],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=PATIENCE,
            cwd=options.pop("cwd", tmp_path),
            stdin=subprocess.DEVNULL,
            env={**os.environ, **options},
            check=False,
        )

    return run


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start `cowkit serve`; what still runs is ended when the test is over."""
    running: list[Server] = []

    def start(*arguments: object, cwd: Path = tmp_path) -> Server:
        command = [*COWKIT, "serve", *map(str, arguments)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, errors="surrogateescape", cwd=cwd)
        server = Server(process)
        running.append(server)
        return server

    yield start
    for server in running:
        if server.process.poll() is None:
            server.end()
        for stream in (server.process.stdout, server.process.stderr):
            if stream:
                stream.close()
