"""`cowkit serve`."""

from __future__ import annotations

import os
import pty
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cowkit.server.control_client import ControlClient
from cowkit.server.runtime import running
from tests.cli.helpers import COWKIT, PATIENCE, Run, Serve, Server, complaint, read, write

pytestmark = pytest.mark.requires(modules=["nbd"])


def test_its_first_line_is_the_uri_and_clients_can_connect_then(base: Path, serve: Serve) -> None:
    server = serve(base)
    write(server.uri, b"boo", 4097)
    assert read(server.uri, 3, 4097) == b"boo"
    assert read(server.uri, 4096, 0) == base.read_bytes()[:4096]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_summary_and_nothing_left(base: Path, serve: Serve, number: int, runtime: Path) -> None:
    before = base.read_bytes()
    server = serve(base)
    write(server.uri, b"x" * 8192, 4096)
    assert server.end(number) == (0, "", f"cowkit: 8 KiB written on top of {base}, thrown away\n")
    assert base.read_bytes() == before
    assert list(runtime.iterdir()) == []


def test_nothing_written_is_said_so(serve: Serve) -> None:
    assert serve("--size", "1M").end() == (0, "", "cowkit: nothing was written to the blank disk\n")


def test_it_ends_while_clients_are_connected(base: Path, serve: Serve) -> None:
    import nbd

    server = serve(base)
    client = nbd.NBD()
    client.connect_uri(server.uri)
    with ControlClient(running()[0].control):
        assert server.end()[0] == 0


def test_a_hangup_of_the_terminal_does_not_end_it(base: Path, serve: Serve) -> None:
    server = serve(base)
    server.process.send_signal(signal.SIGHUP)
    assert read(server.uri, 1, 0) == base.read_bytes()[:1]


def test_the_control_command_quit_ends_it_and_is_answered(base: Path, serve: Serve) -> None:
    server = serve(base)
    seen = []
    with ControlClient(running()[0].control) as client:
        assert client.execute("quit", on_event=lambda *event: seen.append(event)) == {}
    assert server.wait()[0] == 0


def test_clients_of_the_control_socket_are_told_of_the_end(base: Path, serve: Serve) -> None:
    server = serve(base)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(running()[0].control)
        sock.sendall(b'{"execute": "qmp_capabilities"}')
        file = sock.makefile("rb")
        assert [b"QMP" in file.readline(), b"return" in file.readline()] == [True, True]
        server.end()
        assert b'"SHUTDOWN", "data": {"guest": false, "reason": "host-signal"}' in file.read()
        file.close()


def test_a_blank_disk_and_a_larger_one(base: Path, serve: Serve) -> None:
    assert read(serve("--size", "8M").uri, 4096, (8 << 20) - 4096) == bytes(4096)
    assert read(serve(base, "--size", "2M").uri, 4096, (2 << 20) - 4096) == bytes(4096)


def test_the_disks_options_reach_the_disk(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "odd").write_bytes(b"x" * 130_000)
    options = (
        "--block-size",
        "64K",
        "--cow-on-read",
        "--cow-on-cache",
        "--name",
        "me",
        "--export-name",
        "my disk",
        "--tmpdir",
        tmp_path,
    )
    for how, size in (("exact", 130_000), ("down", 65536), ("up", 131_072)):
        server = serve("odd", "--round", how, *options)
        (info,) = running()
        assert (info.size, info.name, info.base, info.uri) == (size, "me", str(tmp_path / "odd"), server.uri)
        assert server.uri.startswith("nbd+unix:///my%20disk?socket=")
        read(server.uri, 1, 0)
        with ControlClient(info.control) as client:
            disk = client.execute("cowkit-query-disk")
        assert (disk["block-size"], disk["dirty-bytes"]) == (65536, 65536)
        server.end()


def test_a_socket_and_tcp_may_be_asked_for_together(tmp_path: Path, runtime: Path, serve: Serve) -> None:
    path = runtime.parent / "my.sock"
    server = serve("--size", "1M", "--socket", path, "--tcp", "127.0.0.1:0")
    assert server.uri == f"nbd+unix:///?socket={path}"
    tcp = running()[0].uris[1]
    assert tcp.startswith("nbd://127.0.0.1:")
    write(server.uri, b"both", 0)
    assert read(tcp, 4, 0) == b"both"
    assert "thrown away" in server.end()[2]
    assert not path.exists()


def test_tcp_alone_makes_no_unix_socket_for_nbd(serve: Serve) -> None:
    server = serve("--size", "1M", "--tcp", "127.0.0.1:0")
    assert server.uri.startswith("nbd://127.0.0.1:")
    assert len(running()[0].uris) == 1
    assert not (Path(running()[0].control).parent / "nbd.sock").exists()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(runtime: Path, serve: Serve, cowkit: Run) -> None:
    path = runtime.parent / "my.sock"
    first = serve("--size", "1M", "--socket", path)
    assert "somebody is listening there already" in complaint(cowkit("serve", "--size", "1M", "--socket", path))
    first.end(signal.SIGKILL)
    assert path.exists()
    second = serve("--size", "1M", "--socket", path)
    assert read(second.uri, 1, 0) == b"\0"


def test_what_a_killed_server_left_goes_with_the_next(base: Path, runtime: Path, serve: Serve) -> None:
    serve(base).end(signal.SIGKILL)
    assert len(list(runtime.iterdir())) == 1
    assert running() == []
    serve(base)
    assert len(list(runtime.iterdir())) == 1


def test_its_sockets_are_the_users_alone(base: Path, runtime: Path, serve: Serve) -> None:
    serve(base)
    (private,) = runtime.iterdir()
    assert [stat.S_IMODE(place.stat().st_mode) for place in (runtime, private)] == [0o700, 0o700]
    assert {entry.name for entry in private.iterdir()} == {"nbd.sock", "control.sock", "server.json"}


def test_a_base_that_changed_is_said_at_the_end(base: Path, serve: Serve, runtime: Path) -> None:
    server = serve(base)
    with base.open("r+b") as file:
        file.write(b"changed")
    os.utime(base, ns=(1, 1))
    status, out, err = server.end()
    assert (status, out) == (2, "")
    assert "changed while it was in use" in err
    assert err.count("\n") == 1
    assert list(runtime.iterdir()) == []


def test_a_terminal_shows_how_the_disk_is_doing(base: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COWKIT, "serve", base], stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    try:
        server = Server(process)
        write(server.uri, b"x", 0)
        shown = b""
        while b"disk.img: 0 clients, 4 KiB written" not in shown:
            shown += os.read(ours, 1000)
        process.send_signal(signal.SIGINT)
        while b"thrown away" not in shown:
            shown += os.read(ours, 1000)
        assert server.wait()[:2] == (0, "")
    finally:
        os.close(ours)


def test_it_starts_without_what_takes_long_to_import() -> None:
    code = (
        "import sys; from cowkit.cli.arguments import parse; parse(['serve', '--size', '1M']); import cowkit.cli.serving; "
        "import cowkit.server.server; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"cowkit.cow_disk", "socket", "argparse"} <= loaded
    assert not loaded & {
        "rich",
        "rich_argparse",
        "shtab",
        "asyncio",
        "qemu.qmp",
        "subprocess",
        "ctypes",
        "pytest",
        "cowkit.diff",
    }


# What makes no sense: one clear line each


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give a BASE to serve, or --size SIZE for a blank disk"),
        (["none.img"], "cannot open base none.img: No such file or directory"),
        (["."], "base . is a directory"),
        (["pipe"], "base pipe is a pipe"),
        (["sock"], "base sock is a socket"),
        (["/dev/null"], "base /dev/null is a character device"),
        (["--size", "much"], "size 'much' is no size"),
        (["--size", "-1"], "size '-1' is no size"),
        (["--size", "1M", "--block-size", "1000"], "block size"),
        (["disk.img", "--size", "1K"], "it can only be larger"),
        (["--size", "1M", "--round", "off"], "argument --round: invalid choice: 'off'"),
        (["--size", "1M", "--socket", "x" * 108], "over the 107"),
        (["--size", "1M", "--socket", "disk.img"], "a file that is no socket is there"),
        (["--size", "1M", "--socket", "none/my.sock"], "No such file or directory"),
        (["--size", "1M", "--tcp", "nonsense"], "'nonsense' is no HOST:PORT"),
        (["--size", "1M", "--export-name", "x" * 5000], "5000"),
        (["--size", "1M", "--sise", "2M"], "unrecognized arguments: --sise (see `cowkit serve --help`)"),
        (["disk.img", "--siz", "2M"], "unrecognized arguments: --siz"),
        (["disk.img", "other.img"], "unrecognized arguments: other.img"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(
    arguments: list[str], expected: str, base: Path, tmp_path: Path, cowkit: Run, runtime: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.open(tmp_path, os.O_RDONLY)
        sock.bind(f"/proc/self/fd/{here}/sock")
        os.close(here)
    assert expected in complaint(cowkit("serve", *arguments))


@pytest.mark.requires("setpriv")
def test_an_unreadable_base_is_one_clear_line(base: Path) -> None:
    base.chmod(0)
    # Root may read everything, unless it gives up the capabilities to
    powerless = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    command = [*powerless, *COWKIT, "serve", str(base)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert complaint(done) == f"cannot open base {base}: Permission denied"


def test_an_unsafe_runtime_directory_is_one_clear_line(base: Path, tmp_path: Path, cowkit: Run) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    for command in (("serve", base), ("ls",)):
        assert "is not safe: others may enter it" in complaint(
            cowkit(*command, COWKIT_RUNTIME_DIR=str(tmp_path / "open"))
        )
