"""`cowkit diff`."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cowkit.cli import progress as progress_module
from cowkit.cli.control_commands import DiskCommands
from cowkit.cli.main import main
from cowkit.cow_disk import CowDisk
from cowkit.diff import Qcow2Image
from cowkit.errors import ControlError
from cowkit.server import runtime
from cowkit.server.control import CommandContext
from cowkit.server.control_client import ControlClient
from cowkit.server.runtime import ServerInfo, running
from tests.cli.helpers import COWKIT, PATIENCE, Run, Serve, complaint, content, read, write

pytestmark = pytest.mark.requires(modules=["nbd"])


def with_boo(base: Path) -> bytes:
    data = bytearray(base.read_bytes())
    data[4097:4100] = b"boo"
    return bytes(data)


def test_it_finds_the_server_of_the_base_and_keeps_what_changed(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run
) -> None:
    server = serve(base)
    write(server.uri, b"boo", 4097)
    done = cowkit("diff", "--base", base, "-o", "diff.qcow2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/diff.qcow2: 4 KiB changed in 1 extent on top of {base}\n")
    assert content(tmp_path / "diff.qcow2", base) == with_boo(base)
    assert read(server.uri, 3, 4097) == b"boo", "the disk goes on"


@pytest.mark.requires("qemu-img")
def test_increments_make_a_chain_that_qemu_reads(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    server = serve(base)
    write(server.uri, b"one", 0)
    cowkit("checkpoint", "monday")
    write(server.uri, b"two", 500_000)
    assert cowkit("diff", "--base", base, "--at", "monday", "-o", "d1.qcow2").returncode == 0
    done = cowkit("diff", "--base", base, "--since", "monday", "--backing", "d1.qcow2", "-o", "d2.qcow2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 KiB changed in 1 extent on top of d1.qcow2" in done.stdout
    (tmp_path / "now.img").write_bytes(read(server.uri, base.stat().st_size, 0))
    subprocess.run(["qemu-img", "compare", "-q", "now.img", "d2.qcow2"], cwd=tmp_path, check=True)
    assert "keep it first, and name that file" in complaint(cowkit("diff", "--since", "monday", "-o", "d3.qcow2"))
    assert "no checkpoint 'never'" in complaint(cowkit("diff", "--at", "never", "-o", "d3.qcow2"))


@pytest.mark.requires("qemu-img")
def test_qemu_reads_it_on_top_of_the_base(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    server = serve("disk.img")
    write(server.uri, b"boo", 4097)
    (tmp_path / "sub").mkdir()
    assert cowkit("diff", "--base", "disk.img", "-o", "sub/diff.qcow2").returncode == 0
    (tmp_path / "expected").write_bytes(with_boo(base))
    subprocess.run(["qemu-img", "check", "-q", tmp_path / "sub" / "diff.qcow2"], check=True)
    compare = ["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "expected", "sub/diff.qcow2"]
    subprocess.run(compare, cwd=tmp_path, check=True)


@pytest.mark.parametrize("spelling", ["disk.img", "./disk.img", "sub/../disk.img", "link.img", "hard.img"])
def test_the_base_is_found_under_any_of_its_names(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run, spelling: str
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.img").symlink_to(base)
    os.link(base, tmp_path / "hard.img")
    serve(base)
    assert cowkit("diff", "--base", spelling, "-o", "diff.qcow2").returncode == 0


@pytest.mark.parametrize(
    ("options", "cwd", "recorded"),
    [
        (("--base", "disk.img"), ".", "disk.img"),
        (("--base", "../disk.img"), "sub", "../disk.img"),
        (("--base", "link.img"), ".", "link.img"),
        (("--base", "{base}"), "sub", "{base}"),
        ((), "sub", "{base}"),
        (("--base", "disk.img", "--backing", "golden.img"), ".", "golden.img"),
    ],
)
def test_the_base_is_recorded_as_the_user_names_it(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run, options: tuple[str, ...], cwd: str, recorded: str
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.img").symlink_to(base)
    serve(base, cwd=Path("/"))
    given = (option.format(base=base) for option in options)
    done = cowkit("diff", *given, "-o", "diff.qcow2", "--json", cwd=str(tmp_path / cwd))
    report = json.loads(done.stdout)
    assert report["backing_file"] == recorded.format(base=base)
    assert report["path"] == os.path.join(tmp_path / cwd, "diff.qcow2").replace("/./", "/")


def test_names_that_promise_something_else_are_told(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    serve(base)
    (tmp_path / "sub").mkdir()
    (tmp_path / "copy.img").write_bytes(base.read_bytes())
    for name in ("d.vmdk", "d.img"):
        format = {"d.vmdk": "vmdk", "d.img": "raw"}[name]
        said = f"cowkit: {name} is a qcow2 image, whatever its name says (-O {format} writes another)\n"
        done = cowkit("diff", "-o", name)
        assert (done.returncode, done.stderr) == (0, said)
        assert said in cowkit("run", base, "--diff", name, "--", "true").stderr
        assert cowkit("diff", "-o", name, "-O", "qcow2").stderr == ""
    done = cowkit("diff", "-o", "sub/d.qcow2", "--backing", "copy.img")
    there = f"from OUT's directory: {tmp_path}/sub/copy.img"
    said = f"cowkit: sub/d.qcow2 cannot be read as long as its backing file copy.img is not there, {there}\n"
    assert (done.returncode, done.stderr) == (0, said)
    assert said in cowkit("run", base, "--diff", "sub/d.qcow2", "--backing", "copy.img", "--", "true").stderr
    assert cowkit("diff", "-o", "sub/d.qcow2", "--backing", "../copy.img").stderr == ""


def test_the_report_is_json_if_asked_for(base: Path, serve: Serve, cowkit: Run) -> None:
    write(serve(base).uri, bytes(4096), 8192)
    report = json.loads(cowkit("diff", "--base", base, "-o", "diff.qcow2", "--json").stdout)
    assert (report["schema"], report["changed_bytes"], report["virtual_size"]) == (1, 4096, 1 << 20)
    assert report["changed"][0]["offset"] == 8192


def test_names_that_are_no_utf8_come_through(tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    base = tmp_path / os.fsdecode(b"caf\xe9.img")
    base.write_bytes(bytes(4096))
    write(serve(base).uri, b"x", 0)
    output = os.fsdecode(b"\xff.qcow2")
    done = cowkit("diff", "--base", base.name, "-o", output)
    assert (done.returncode, done.stderr) == (0, "")
    assert output in done.stdout
    assert content(tmp_path / output, base)[:1] == b"x"
    assert base.name in cowkit("ls").stdout


def test_clients_go_on_writing_while_it_is_taken(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    """Two halves of a block are always written together: no difference has one without the other."""
    import nbd

    server = serve(base)
    stop = threading.Event()

    def scribble() -> None:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        number = 0
        while not stop.is_set():
            number = number % 255 + 1
            client.pwrite(bytes([number]) * 4096, 65536)
        client.shutdown()

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        for _ in range(5):
            assert cowkit("diff", "--base", base, "-o", "diff.qcow2").returncode == 0
            block = content(tmp_path / "diff.qcow2", base)[65536 : 65536 + 4096]
            assert block in (bytes([block[0]]) * 4096, base.read_bytes()[65536 : 65536 + 4096])
    finally:
        stop.set()
        thread.join()


# Choosing


def test_a_server_is_chosen_by_name_pid_uri_or_control_socket(base: Path, serve: Serve, cowkit: Run) -> None:
    servers = [serve(base, "--name", name) for name in ("one", "two")]
    write(servers[1].uri, b"boo", 4097)
    info = running()[1]
    for source in ("two", servers[1].pid, info.uri, info.control):
        for more in ((), ("--base", base)):
            report = json.loads(cowkit("diff", *more, "--from", source, "-o", "diff.qcow2", "--json").stdout)
            assert report["changed_bytes"] == 4096


def test_a_control_socket_of_another_runtime_directory_will_do(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run
) -> None:
    serve(base)
    elsewhere = str(tmp_path / "elsewhere")
    options = ("--from", running()[0].control, "-o", "diff.qcow2")
    assert cowkit("diff", *options, COWKIT_RUNTIME_DIR=elsewhere).returncode == 0
    assert cowkit("diff", "--base", base, *options, COWKIT_RUNTIME_DIR=elsewhere).returncode == 0


def test_the_only_server_need_not_be_named(serve: Serve, cowkit: Run) -> None:
    server = serve("--size", "1M")
    write(server.uri, b"x", 0)
    assert json.loads(cowkit("diff", "-o", "diff.qcow2", "--json").stdout)["backing_file"] is None


def test_no_server_at_all_is_said_with_how_to_start_one(base: Path, cowkit: Run) -> None:
    said = complaint(cowkit("diff", "--base", "disk.img", "-o", "diff.qcow2"))
    assert said == "no server matches base disk.img: nothing is being served; start one with `cowkit serve disk.img`"


def test_no_server_of_that_base_lists_what_is_running(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    (tmp_path / "other.img").write_bytes(b"other")
    server = serve("other.img")
    said = complaint(cowkit("diff", "--base", base, "-o", "diff.qcow2"))
    listed = f"other.img (pid {server.pid}, base {tmp_path}/other.img, {server.uri})"
    assert said == f"no server matches base {base}; these are running: {listed}; choose one with --from"


def test_two_servers_of_one_base_are_listed(base: Path, serve: Serve, cowkit: Run) -> None:
    servers = [serve(base), serve(base)]
    for arguments in (("--base", base), ("--from", "disk.img"), ()):
        said = complaint(cowkit("diff", *arguments, "-o", "diff.qcow2"))
        assert said.startswith("2 servers match " if arguments else "2 disks are being served")
        assert all(f"pid {server.pid}, " in said for server in servers)
        assert "--from" in said


def test_what_is_advised_tells_one_server_from_another(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    serve(base)
    other = tmp_path / "other.img"
    other.write_bytes(b"other")
    serve(other)
    assert complaint(cowkit("diff", "--stat")).endswith("; choose one with --base or --from")
    serve(base)
    assert complaint(cowkit("diff", "--stat")).endswith("; choose one by process id with --from")


@pytest.mark.parametrize("share", ["connection", "export"])
def test_a_server_of_many_disks_is_not_meant_beside_one_of_a_single_disk(
    share: str, base: Path, serve: Serve, cowkit: Run
) -> None:
    many = serve(base, "--share", share)
    assert "for the one disk of `--share all`" in complaint(cowkit("checkpoint", "mine"))
    serve(base)
    for arguments in ((), ("--base", base)):
        assert cowkit("diff", "--stat", *arguments).returncode == 0
    assert cowkit("checkpoint", "mine").stdout == "mine\n"
    assert f"(--share {share})" in complaint(cowkit("checkpoint", "--from", many.pid))


def test_the_socket_for_nbd_clients_names_its_server_too(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run, runtime: Path
) -> None:
    serve(base)
    elsewhere = tmp_path / "ä sock"
    server = serve(base, "--socket", elsewhere, "--export-name", "mine")
    (inner,) = runtime.glob("*/nbd.sock")
    for path, other in ((inner, ""), (inner, str(tmp_path / "other")), (elsewhere, "")):
        options = {"COWKIT_RUNTIME_DIR": other} if other else {}
        name = f"at {path.name}{other and ' from afar'}"
        assert cowkit("checkpoint", "--from", path, name, **options).stdout == f"{name}\n"
    assert cowkit("checkpoint", "--from", server.pid, "--list").stdout == f"at {elsewhere.name}\n"


def test_an_nbd_socket_without_a_control_socket_is_said_at_once(base: Path, tmp_path: Path, cowkit: Run) -> None:
    path = tmp_path / "sock"
    with CowDisk(base) as disk, disk.serve(socket=path):
        told = complaint(cowkit("diff", "--base", base, "--from", path, "--stat"))
        assert f"what answers at {path} speaks NBD: it is no control socket" in told
        assert cowkit("diff", "--base", base, "--from", told.split()[-1].rstrip(")"), "--stat").returncode == 0


def test_an_unknown_server_is_said(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    serve(base)
    (tmp_path / "other.img").write_bytes(b"other")
    for arguments in (
        ("--from", "nobody"),
        ("--from", base),
        ("--from", "1"),
        ("--from", "disk.img", "--base", "other.img"),
    ):
        assert "these are running: disk.img (pid " in complaint(cowkit("diff", *arguments, "-o", "diff.qcow2"))


def test_a_socket_that_is_no_control_socket_is_said(runtime: Path, cowkit: Run) -> None:
    runtime.mkdir(mode=0o700)
    path = runtime.parent / "sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(path))
        assert f"cannot reach a server at {path}" in complaint(cowkit("diff", "--from", path, "-o", "diff.qcow2"))


# What cannot be done, and what is lost then: nothing


def test_an_output_that_cannot_be_is_one_clear_line(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    before = base.read_bytes()
    write(serve(base).uri, b"boo", 4097)
    (tmp_path / "link.img").symlink_to(base)
    os.link(base, tmp_path / "hard.img")
    (tmp_path / "directory").mkdir()
    for output in (
        "disk.img",
        "link.img",
        "hard.img",
        "directory",
        "none/diff.qcow2",
        "/dev/full",
        "x" * 300,
        "disk.img/x",
        "/dev/stdout",
        "/proc/self/fd/2",
        "",
    ):
        complaint(cowkit("diff", "--base", base, "-o", output))
    assert base.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"disk.img", "link.img", "hard.img", "directory"}


def test_a_full_disk_is_one_clear_line_and_the_old_output_survives(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run
) -> None:
    server = serve(base)
    write(server.uri, os.urandom(1 << 20), 0)
    (tmp_path / "diff.qcow2").write_text("old")
    # As full as a disk can be for a user who is not root: files of this server cannot grow
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert "diff.qcow2" in complaint(cowkit("diff", "--base", base, "-o", "diff.qcow2"))
    assert (tmp_path / "diff.qcow2").read_text() == "old"
    assert {entry.name for entry in tmp_path.iterdir()} == {"disk.img", "diff.qcow2"}
    assert read(server.uri, 1, 0)


def test_a_base_that_changed_while_served_is_one_clear_line(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run
) -> None:
    serve(base)
    os.utime(base, ns=(1, 1))
    assert "changed while it was in use" in complaint(cowkit("diff", "--base", base, "-o", "diff.qcow2"))


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_base_that_is_another_file_now_is_one_clear_line(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run, how: str
) -> None:
    serve(base)
    if how == "replaced":
        shutil.copy2(base, tmp_path / "copy")
        (tmp_path / "copy").rename(base)
    else:
        base.unlink()
    said = complaint(cowkit("diff", "--base", base, "-o", "diff.qcow2"))
    assert ("was replaced by another file" if how == "replaced" else "is not there any more") in said
    assert not (tmp_path / "diff.qcow2").exists()


def info(disk: CowDisk) -> ServerInfo:
    return ServerInfo(1, disk.name, None, None, disk.size, ("nbd://x",), 0, "/control.sock")


def test_an_interrupted_difference_leaves_the_old_output(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "diff.qcow2"
    output.write_text("old")
    with CowDisk(base) as disk:
        disk.pwrite(os.urandom(1 << 20), 0)
        command = DiskCommands(disk, info(disk), quit=None).table()["cowkit-diff"]
        context = CommandContext(lambda name, data: None)
        context.cancel("the client has gone")
        with pytest.raises(ControlError, match="given up: the client has gone"):
            command.run(context, {"path": str(output)})
        assert output.read_text() == "old"
        assert {entry.name for entry in tmp_path.iterdir()} == {"disk.img", "diff.qcow2"}
        command.run(CommandContext(lambda name, data: None), {"path": str(output)})
    assert content(output, base) != base.read_bytes()


def test_ctrl_c_ends_a_waiting_client_quietly(base: Path, serve: Serve) -> None:
    server = serve(base)
    server.freeze()
    try:
        command = [*COWKIT, "diff", "--base", str(base), "-o", str(base.parent / "diff.qcow2")]
        # It is waiting for the server when it has connected to it
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            inodes: set[str] = set()
            while not inodes and process.poll() is None:
                inodes = sockets_of(process.pid)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=PATIENCE) == (b"", b"")
            assert process.returncode == 130
    finally:
        os.kill(server.pid, signal.SIGCONT)


def sockets_of(pid: int) -> set[str]:
    links = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            links.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except OSError:
            pass
    return {link for link in links if link.startswith("socket:")}


def test_a_server_that_does_not_answer_is_said(base: Path, serve: Serve) -> None:
    server = serve(base)
    server.freeze()
    try:
        with pytest.raises(ControlError, match="does not answer"):
            ControlClient(running()[0].control, timeout=0.05)
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_a_relative_path_on_the_wire_is_refused(base: Path, serve: Serve) -> None:
    serve(base)
    with ControlClient(running()[0].control) as client:
        for asked in ({"path": "x"}, {"path": "/x", "base": "x", "base-path": "x"}, {"path": "/x", "base": "x"}):
            with pytest.raises(ControlError, match=r"relative, and the server|makes no sense without base-path"):
                client.execute("cowkit-diff", asked)


def test_a_name_in_proc_means_what_it_means_to_who_asks(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    write(serve(base).uri, b"boo", 4097)
    (tmp_path / "sub").mkdir()
    cowkit("diff", "--base", base, "-o", "/proc/self/cwd/own.qcow2", cwd=tmp_path / "sub")
    assert [entry.name for entry in (tmp_path / "sub").iterdir()] == ["own.qcow2"]


def test_an_image_under_a_name_of_another_format_is_told_of(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run
) -> None:
    write(serve(base).uri, b"boo", 4097)
    done = cowkit("diff", "--base", base, "-o", "now.qcow2", "--raw")
    assert done.stderr == "cowkit: now.qcow2 is a raw image, whatever its name says\n"


def test_an_output_or_an_answer_must_be_asked_for(cowkit: Run) -> None:
    assert "give -o OUT to write the difference, or --stat" in complaint(cowkit("diff"))


# The bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress_module.Bar() as bar:
        bar.event(progress_module.PROGRESS_EVENT, {"done": 1, "total": 2})
        assert terminal.getvalue() == "", "not yet"
        monkeypatch.setattr(progress_module, "_PATIENCE_SECONDS", 0)
        bar.event("OTHER", {})
        bar.event(progress_module.PROGRESS_EVENT, {"done": 1 << 20, "total": 2 << 20})
    assert "1.0/2.0 MiB" in terminal.getvalue()


def test_progress_is_told_on_the_wire(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cowkit.cli.control_commands._PROGRESS_SECONDS", 0)
    seen: list[tuple[str, object]] = []
    with CowDisk(base) as disk:
        disk.pwrite(os.urandom(1 << 20), 0)
        command = DiskCommands(disk, info(disk), quit=None).table()["cowkit-diff"]
        command.run(
            CommandContext(lambda name, data: seen.append((name, data))), {"path": str(tmp_path / "diff.qcow2")}
        )
    assert seen
    assert seen[-1] == ("COWKIT_DIFF_PROGRESS", {"done": 1 << 20, "total": 1 << 20})


def test_it_starts_without_what_takes_long_to_import() -> None:
    code = "import sys; from cowkit.cli.arguments import parse; parse(['diff', '-o', 'x']); print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "cowkit.server.control_client" in loaded
    assert not loaded & {
        "rich",
        "asyncio",
        "qemu.qmp",
        "subprocess",
        "pathlib",
        "cowkit.diff",
        "cowkit.disk",
        "cowkit.cow_disk",
    }


# What kind of image


def test_each_kind_of_image_can_be_asked_for(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    server = serve(base)
    write(server.uri, b"boo", 4097)
    expected = bytearray(base.read_bytes())
    expected[4097:4100] = b"boo"
    for options in (
        ("--cluster-size", "4K"),
        ("--subclusters",),
        ("--compress", "zlib", "--bitmap", "dirty"),
        ("--no-backing", "--compress", "zstd"),
        ("--backing-format", "raw"),
    ):
        done = cowkit("diff", "--base", base, "-o", "diff.qcow2", "--json", *options)
        assert json.loads(done.stdout)["changed_extents"] == 1
        assert content(tmp_path / "diff.qcow2", base)[: len(expected)] == expected
    with Qcow2Image(tmp_path / "diff.qcow2") as image:
        assert image.backing_format == "raw"
    assert cowkit("diff", "--base", base, "-o", "now.img", "--raw").returncode == 0
    assert (tmp_path / "now.img").read_bytes() == expected


def test_scattered_changes_are_written_with_subclusters_unless_told_otherwise(
    tmp_path: Path, serve: Serve, cowkit: Run
) -> None:
    import nbd

    scattered = tmp_path / "scattered.img"
    with scattered.open("wb") as file:
        file.truncate(64 << 20)
    client = nbd.NBD()
    client.connect_uri(serve(scattered).uri)
    for at in range(0, 64 << 20, 128 << 10):
        client.pwrite(b"boo", at)
    client.shutdown()
    for option, expected in (((), True), (("--no-subclusters",), False), (("--subclusters",), True)):
        done = cowkit("diff", "--base", scattered, "-o", "diff.qcow2", "--json", *option)
        assert json.loads(done.stdout)["subclusters"] is expected
        with Qcow2Image(tmp_path / "diff.qcow2") as image:
            assert image.subclusters is expected


def test_exit_code_says_whether_anything_changed(base: Path, serve: Serve, cowkit: Run) -> None:
    server = serve(base)
    asked = ("diff", "--base", base, "-o", "diff.qcow2", "--exit-code")
    assert cowkit(*asked).returncode == 0
    write(server.uri, base.read_bytes()[:512], 0)
    assert cowkit(*asked).returncode == 0
    write(server.uri, b"boo", 4097)
    assert cowkit(*asked).returncode == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--cluster-size", "5000"), "cluster size 5000 is no power of two from 4096 to 2097152 bytes (2 MiB)"),
        (("--subclusters", "--compress", "zlib"), "a compressed cluster has no subclusters: choose one of the two"),
        (("--raw", "--bitmap", "x"), "a raw file has no bitmap: leave that out, or raw"),
        (
            ("--raw", "--backing", "x"),
            "an image with all of the disk has no backing file: leave out its name and format",
        ),
    ],
)
def test_kinds_of_image_that_make_no_sense_are_refused(
    options: tuple[str, ...], why: str, base: Path, serve: Serve, cowkit: Run
) -> None:
    serve(base)
    assert complaint(cowkit("diff", "--base", base, "-o", "diff.qcow2", *options)) == why


def test_a_compressed_base_has_its_disk_kept_without_a_backing_file(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run
) -> None:
    (tmp_path / "disk.img.gz").write_bytes(gzip.compress(base.read_bytes()))
    server = serve("disk.img.gz")
    write(server.uri, b"boo", 4097)
    assert cowkit("diff", "--base", "disk.img.gz", "-o", "now.img", "--raw").returncode == 0
    assert (tmp_path / "now.img").read_bytes()[4097:4100] == b"boo"
    assert (tmp_path / "now.img").stat().st_size == base.stat().st_size


@pytest.mark.parametrize("arguments", [["--stat"], ["-o", "d.qcow2"], ["-o", "d.qcow2", "--from", "nobody"]])
def test_what_is_running_is_looked_up_once(
    base: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = []
    candidates = runtime._candidates

    def counted() -> list[str]:
        looks.append(arguments)
        return candidates()

    monkeypatch.setattr(runtime, "_candidates", counted)
    assert main(["diff", "--base", str(base), *arguments]) == 2
    assert "no server matches" in capsys.readouterr().err
    assert len(looks) == 1
