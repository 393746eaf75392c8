"""`cowkit diff --engine`, on the command line and over the control socket."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from cowkit.cli.progress import PROGRESS_EVENT
from cowkit.errors import ControlError
from cowkit.server.control_client import ControlClient
from cowkit.server.runtime import running
from tests.cli.helpers import COWKIT, Run, Serve, complaint, content, write

pytestmark = pytest.mark.requires("qemu-img", "qemu-storage-daemon", "setpriv", modules=["nbd", "qemu.qmp"])

each_engine = pytest.mark.parametrize("engine", ["native", "qemu-img", "qmp"])


@each_engine
def test_each_engine_can_be_asked_for(engine: str, base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    server = serve(base)
    write(server.uri, b"boo", 4097)
    expected = bytearray(base.read_bytes())
    expected[4097:4100] = b"boo"
    done = cowkit("diff", "--base", "disk.img", "-o", "diff.qcow2", "--engine", engine, "--subclusters", "--json")
    report = json.loads(done.stdout)
    assert (report["engine"], report["format"], report["backing_file"]) == (engine, "qcow2", "disk.img")
    assert report["changed"] == [{"offset": 4096, "length": 4096, "kind": "data"}]
    assert content(tmp_path / "diff.qcow2", base) == expected


def test_formats_options_and_secrets_reach_qemu(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    server = serve(base)
    write(server.uri, b"boo", 4097)
    (tmp_path / "key").write_text("sesame")
    asked = ("diff", "--base", base)
    assert cowkit(*asked, "-o", "now.img", "-O", "raw").returncode == 0
    done = cowkit(*asked, "-o", "now.vmdk", "-O", "vmdk", "--image-option", "subformat=streamOptimized", "--json")
    assert json.loads(done.stdout)["engine"] == "qmp"
    done = cowkit(*asked, "-o", "secret.qcow2", "--secret-file", "key", "--image-option", "encrypt.iter-time=10")
    assert (done.returncode, done.stderr) == (0, "")
    for image in (
        ("now.vmdk",),
        (
            "--object",
            "secret,id=s,file=key",
            "--image-opts",
            "driver=qcow2,file.filename=secret.qcow2,encrypt.key-secret=s",
        ),
    ):
        other = "now.img" if len(image) == 1 else "driver=raw,file.filename=now.img"
        subprocess.run(["qemu-img", "compare", "-q", *image, other], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--image-option", "version"), "--image-option takes KEY=VALUE, not 'version'"),
        (("--image-option", "=v2"), "--image-option takes KEY=VALUE, not '=v2'"),
        (("--image-option", "a=1", "--image-option", "a=2"), "--image-option a is given twice"),
        (
            ("--engine", "qemu-img", "-O", "vdi"),
            "the engine qemu-img cannot write the format 'vdi': the engine qmp can",
        ),
        (
            ("-O", "vdi", "--backing", "x"),
            "an image with all of the disk has no backing file: leave out its name and format",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: tuple[str, ...], why: str, base: Path, serve: Serve, cowkit: Run
) -> None:
    serve(base)
    assert complaint(cowkit("diff", "--base", base, "-o", "diff.qcow2", *options)) == why


def test_the_secret_file_is_never_replaced(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    serve(base)
    (tmp_path / "key").write_text("sesame")
    for command in (("diff", "-o", "key"), ("run", base, "--diff", "key")):
        behind = ("--", "touch", "was-run") if command[0] == "run" else ()
        said = complaint(cowkit(*command, "--secret-file", "key", *behind))
        assert "it is the same file as" in said and said.endswith("which is still needed")
    assert "it is the same file as" in complaint(
        cowkit("diff", "-o", "d.qcow2", "--secret-file", "key", "--stat", "--svg", "key")
    )
    assert (tmp_path / "key").read_text() == "sesame"
    assert not (tmp_path / "was-run").exists()


@pytest.mark.usefixtures("base")
def test_a_relative_secret_file_on_the_wire_is_refused(base: Path, serve: Serve) -> None:
    serve(base)
    (info,) = running()
    with ControlClient(info.control) as client, pytest.raises(ControlError, match="secret-file 'key' is relative"):
        client.execute("cowkit-diff", {"path": "/x", "secret-file": "key"})


@pytest.mark.parametrize("engine", ["qemu-img", "qmp"])
def test_progress_is_told_on_the_wire(engine: str, tmp_path: Path, serve: Serve) -> None:
    base = tmp_path / "large.img"
    with base.open("wb") as file:
        file.truncate(512 << 20)
    server = serve(base)
    write(server.uri, os.urandom(16 << 20), 0)
    (info,) = running()
    told = []
    with ControlClient(info.control) as client:
        client.execute(
            "cowkit-diff",
            {"path": str(tmp_path / "diff.qcow2"), "engine": engine},
            on_event=lambda name, data: told.append((name, data["done"], data["total"])),
        )
    assert told
    assert {name for name, _, _ in told} == {PROGRESS_EVENT}
    assert told == sorted(told)


@pytest.mark.parametrize("engine", ["qemu-img", "qmp"])
def test_a_client_that_goes_away_ends_the_program(engine: str, tmp_path: Path, serve: Serve) -> None:
    base = tmp_path / "large.img"
    with base.open("wb") as file:
        file.truncate(4 << 30)
    server = serve(base)
    for offset in range(0, 96 << 20, 32 << 20):
        write(server.uri, os.urandom(32 << 20), offset)
    (tmp_path / "diff.qcow2").write_bytes(b"old")
    command = [*COWKIT, "diff", "--base", str(base), "-o", "diff.qcow2", "--engine", engine]
    with subprocess.Popen(command, cwd=tmp_path) as client:
        child = 0
        while not child and client.poll() is None:
            child = next(iter(children(server.pid)), 0)
        assert child
        watched = os.pidfd_open(child)
        client.kill()
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    assert poll.poll(60_000)
    os.close(watched)
    server.end()
    assert (tmp_path / "diff.qcow2").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diff.qcow2", "large.img"]


def children(pid: int) -> list[int]:
    """The processes that it has started."""
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except FileNotFoundError:
            pass  # a thread that has just ended
    return found


def test_the_native_engine_imports_nothing_of_the_others(base: Path) -> None:
    script = (
        "import sys\nfrom cowkit import CowDisk\n"
        f"with CowDisk({str(base)!r}) as disk:\n    disk.diff({str(base)!r} + '.qcow2')\n"
        "print([name for name in sys.modules if name.startswith(('cowkit.diff.engines', 'asyncio', 'subprocess', 'qemu'))])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
