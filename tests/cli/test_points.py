"""`cowkit checkpoint`, `rollback`, `reset` and `ls`: what is served, seen and controlled from outside."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest

from cowkit.cli.ls import _duration
from tests.cli.helpers import COWKIT, Run, Serve, complaint, read, write

pytestmark = pytest.mark.requires(modules=["nbd"])


def test_a_disk_goes_back_to_a_checkpoint_and_to_its_base(base: Path, serve: Serve, cowkit: Run) -> None:
    server = serve(base)
    write(server.uri, b"one", 0)
    assert cowkit("checkpoint", "installed").stdout == "installed\n"
    write(server.uri, b"two", 0)
    done = cowkit("rollback", "--base", base, "installed")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert read(server.uri, 3, 0) == b"one"
    done = cowkit("reset", "--from", "disk.img")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert read(server.uri, 3, 0) == base.read_bytes()[:3]


def test_checkpoints_are_named_and_listed(base: Path, serve: Serve, cowkit: Run) -> None:
    serve(base)
    names = [cowkit("checkpoint", *name).stdout.strip() for name in ((), ("mine",), ())]
    assert cowkit("checkpoint", "--list").stdout.split() == names
    assert names[1] == "mine"
    assert "mine" in complaint(cowkit("checkpoint", "mine"))
    assert "never" in complaint(cowkit("rollback", "never"))
    assert "no checkpoint can be called 'cow'" in complaint(cowkit("checkpoint", "cow"))


def test_nothing_to_control_is_said(cowkit: Run) -> None:
    for command in (("checkpoint",), ("rollback", "x"), ("reset",)):
        assert complaint(cowkit(*command)) == ("nothing is being served: start a server with `cowkit serve BASE`")


def test_what_is_served_is_listed(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    assert cowkit("ls").stdout.split() == ["NAME", "PID", "SIZE", "DIRTY", "CLIENTS", "FOR", "BASE", "URI"]
    assert json.loads(cowkit("ls", "--json").stdout) == []
    servers = [serve(base), serve("--size", "1G", "--name", "[b]spare[/b]")]
    write(servers[0].uri, b"x", 0)
    _, first, second = (line.split() for line in cowkit("ls").stdout.splitlines())
    assert first[:6] == ["disk.img", str(servers[0].pid), "1", "MiB", "4", "KiB"]
    assert first[-2:] == [str(base), servers[0].uri]
    assert second[0] == "[b]spare[/b]"
    assert second[-2:] == ["-", servers[1].uri]
    one, two = json.loads(cowkit("ls", "--json").stdout)
    assert (one["pid"], one["dirty_bytes"], one["checkpoints"], one["base"]) == (servers[0].pid, 4096, [], str(base))
    assert (two["size"], two["base"], two["identity"]) == (1 << 30, None, None)


def test_a_server_that_does_not_answer_is_listed_all_the_same(
    base: Path, serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cowkit.cli.main import main

    monkeypatch.setattr("cowkit.cli.ls._PATIENCE_SECONDS", 0.05)
    server = serve(base)
    server.freeze()
    try:
        assert main(["ls"]) == 0
        assert " ?  " in capsys.readouterr().out
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_a_terminal_gets_a_table(base: Path, serve: Serve, cowkit: Run) -> None:
    ours, theirs = pty.openpty()
    try:
        for expected in ("nothing is being served", "disk.img"):
            done = subprocess.run([*COWKIT, "ls"], stdout=theirs, stderr=subprocess.PIPE, check=True)
            assert expected in os.read(ours, 10000).decode()
            assert done.stderr == b""
            serve(base)
    finally:
        os.close(ours)
        os.close(theirs)


def test_durations_are_short() -> None:
    assert [_duration(seconds) for seconds in (-1, 0, 59.9, 60, 3599, 3600, 86399, 86400, 1e6)] == [
        "0s", "0s", "59s", "1m", "59m", "1h", "23h", "1d", "11d",
    ]  # fmt: skip
