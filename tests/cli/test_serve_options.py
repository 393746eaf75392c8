"""`cowkit serve`: ways in, whose overlay, and when it ends."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cowkit.server.control_client import ControlClient
from cowkit.server.runtime import running
from tests.cli.helpers import COWKIT, PATIENCE, Done, Run, Serve, complaint, content, read, write
from tests.server.certificates import make_certificates, uri_with

pytestmark = pytest.mark.requires(modules=["nbd"])


def run(*command: object, given: str | None = None, pass_fds: tuple[int, ...] = ()) -> Done:
    return subprocess.run(
        list(map(str, command)),
        input=given,
        pass_fds=pass_fds,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


# Started by a client: an activated socket


@pytest.mark.requires("nbdinfo", "nbdcopy")
def test_nbdinfo_and_nbdcopy_start_it_and_hear_nothing_but_nbd(base: Path, tmp_path: Path) -> None:
    info = run(
        "nbdinfo", "--json", "--", "[", *COWKIT, "serve", "--export-name", "", "--description", "for a test", base, "]"
    )
    assert (info.returncode, info.stderr) == (0, "")
    (export,) = json.loads(info.stdout)["exports"]
    assert (export["export-size"], export["description"], export["is_read_only"]) == (1 << 20, "for a test", False)
    copied = run("nbdcopy", "--", "[", *COWKIT, "serve", base, "]", tmp_path / "copy")
    assert (copied.returncode, copied.stdout, copied.stderr) == (0, "", "")
    assert (tmp_path / "copy").read_bytes() == base.read_bytes()
    assert run("nbdcopy", "--", "[", *COWKIT, "serve", base, "]", "null:").returncode == 0


def test_an_activated_socket_is_served_and_listed_and_stays_the_activators(base: Path, tmp_path: Path) -> None:
    import nbd

    client = nbd.NBD()
    client.connect_systemd_socket_activation([*COWKIT, "serve", str(base)])
    client.pwrite(b"boo", 0)
    (info,) = running()
    assert read(info.uri, 3, 0) == b"boo"
    with ControlClient(info.control) as control:
        control.execute("quit")
    assert os.path.exists(info.uri.partition("socket=")[2]), "whoever made the file removes it"


def test_an_activated_socket_and_another_place_do_not_go_together(base: Path) -> None:
    with socket.socket() as listener:
        listener.listen()
        script = f'exec 3<&{listener.fileno()}; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
        for option in ("--tcp=0", "--socket=x", "--vsock=5", "--stdio", "--ready-fd=3"):
            done = run("bash", "-c", script, "bash", *COWKIT, "serve", base, option, pass_fds=(listener.fileno(),))
            said = complaint(done)
            assert "handed over" in said and option.partition("=")[0] in said


# Started by a client: standard input and output


def test_libnbd_starts_it_with_a_socket_for_standard_input(base: Path, cowkit: Run, tmp_path: Path) -> None:
    import nbd

    client = nbd.NBD()
    client.connect_command([*COWKIT, "serve", "--stdio", str(base)])
    client.pwrite(b"x" * 4096, 8192)
    assert client.pread(4096, 8192) == b"x" * 4096
    (info,) = running()
    assert cowkit("diff", "--base", base, "-o", "diff.qcow2").returncode == 0
    assert content(tmp_path / "diff.qcow2", base)[8192:12288] == b"x" * 4096
    with open(os.pidfd_open(info.pid), "rb", buffering=0) as process:
        client.shutdown()
        assert select.select([process], [], [], PATIENCE)[0] == [process], "it ends with its client"
    assert running() == []


def test_at_two_pipes_it_speaks_nbd_alone_and_ends_with_its_client(base: Path) -> None:
    done = run(*COWKIT, "serve", "--stdio", base, given="")
    assert (done.returncode, done.stdout[:16], done.stderr) == (0, "NBDMAGICIHAVEOPT", "")
    assert len(done.stdout) == 18


@pytest.mark.parametrize("streams", [2, 3])
def test_at_a_socket_it_ends_with_its_client(base: Path, streams: int) -> None:
    """Three streams: inetd's way, where standard error would get in between the bytes."""
    ours, theirs = socket.socketpair()
    error = theirs.fileno() if streams == 3 else subprocess.PIPE
    process = subprocess.Popen(
        [*COWKIT, "serve", "--stdio", str(base)], stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=error
    )
    theirs.close()
    with ours, process:
        ours.settimeout(PATIENCE)
        assert ours.recv(18, socket.MSG_WAITALL) == b"NBDMAGICIHAVEOPT\0\3"
        os.utime(base, ns=(1, 1))  # something to complain of
        ours.shutdown(socket.SHUT_WR)
        assert ours.recv(1) == b""
        assert process.wait(PATIENCE) == 2
        if process.stderr:
            assert b"changed while it was in use" in process.stderr.read()


def test_a_signal_ends_it_at_pipes_too(base: Path) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([*COWKIT, "serve", "--stdio", base], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(18) == b"NBDMAGICIHAVEOPT\0\3"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read() == b""


def test_standard_streams_that_are_no_connection_are_said_so(base: Path, tmp_path: Path) -> None:
    stream, datagram = socket.socketpair(), socket.socketpair(type=socket.SOCK_DGRAM)
    listener = socket.socket()
    listener.listen()
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    with open(tmp_path / "file", "w+b") as file:
        cases: list[tuple[Any, Any, str]] = [
            (null, pipe, "standard input is neither a socket nor a pipe"),
            (pipe, null, "standard output is neither a socket nor a pipe"),
            (file, file, "standard input is neither a socket nor a pipe"),
            (stream[0], pipe, "standard output is not that same socket"),
            (stream[0], stream[1], "standard output is not that same socket"),
            (datagram[0], datagram[0], "no stream socket"),
            (listener, listener, "nobody is connected to"),
        ]
        for stdin, stdout, expected in cases:
            command = [*COWKIT, "serve", "--stdio", str(base)]
            with subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=pipe, text=True) as process:
                _, said = process.communicate(timeout=PATIENCE)
            assert process.returncode == 2
            assert expected in said and said.count("\n") == 1
    for sock in (*stream, *datagram, listener):
        sock.close()


# TLS


@pytest.mark.requires("openssl", "nbdinfo")
def test_nbds_with_a_client_certificate_and_a_client_without_one_refused(
    base: Path, serve: Serve, tmp_path: Path
) -> None:
    certificates = make_certificates(tmp_path / "certificates")
    server = serve(base, "--tcp", "localhost:0", "--tls-certs", certificates.server, "--tls-verify-peer")
    assert server.uri.startswith("nbds://")
    assert run("nbdinfo", "--size", uri_with(server.uri, certificates.client)).stdout == f"{1 << 20}\n"
    for who in (certificates.nameless, certificates.revoked, certificates.foreign):
        assert run("nbdinfo", "--size", uri_with(server.uri, who)).returncode == 1
    plain = run("nbdinfo", "--size", server.uri.replace("nbds", "nbd"))
    assert "requires TLS" in plain.stderr
    assert server.end()[0] == 0


@pytest.mark.requires("openssl", "nbdinfo")
def test_a_command_is_run_with_an_nbds_uri_of_a_unix_socket(base: Path, cowkit: Run, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "certificates")
    options = ("--tls-certs", certificates.server, "--tls", "on")
    done = cowkit(
        "run", base, *options, "--", "nbdinfo", "--size", "{uri}&tls-certificates=" + str(certificates.client)
    )
    assert (done.returncode, done.stdout) == (0, f"{1 << 20}\n")


# Whose overlay


def test_export_names_have_disks_of_their_own_and_control_says_that_there_is_no_one_disk(
    base: Path, serve: Serve, cowkit: Run
) -> None:
    server = serve(base, "--share", "export", "--max-exports", "2", "--tcp", "0")
    one, other = (f"{server.uri}/{name}" for name in ("one", "other"))
    write(one, b"one's", 0)
    write(other, b"other's", 0)
    assert (read(one, 5, 0), read(other, 7, 0)) == (b"one's", b"other's")
    with pytest.raises(Exception, match="server policy prevents"):
        read(f"{server.uri}/third", 1, 0)
    for command in (("diff", "-o", "diff.qcow2"), ("checkpoint",), ("reset",), ("rollback", "point")):
        said = complaint(cowkit(*command))
        assert "each export name has a disk of its own here (--share export)" in said
    with ControlClient(running()[0].control) as client:
        disk = client.execute("cowkit-query-disk")
    assert (disk["share"], disk["dirty-bytes"]) == ("export", 8192)
    assert server.end() == (0, "", f"cowkit: 8 KiB written on top of {base}, thrown away\n")


def test_connections_have_disks_of_their_own(base: Path, serve: Serve) -> None:
    server = serve(base, "--share", "connection")
    write(server.uri, b"gone", 0)
    assert read(server.uri, 4096, 0) == base.read_bytes()[:4096]
    assert server.end() == (0, "", f"cowkit: 4 KiB written on top of {base}, thrown away\n")


def test_a_unix_socket_and_tcp_share_the_exports(base: Path, serve: Serve, runtime: Path) -> None:
    server = serve(
        base, "--share", "export", "--tcp", "0", "--socket", runtime.parent / "my.sock", "--export-name", "x"
    )
    write(server.uri, b"both", 0)
    assert read(running()[0].uris[1], 4, 0) == b"both"


def test_read_only_refuses_writes(base: Path, serve: Serve) -> None:
    import nbd

    client = nbd.NBD()
    client.connect_uri(serve(base, "--read-only").uri)
    assert client.is_read_only()
    client.set_strict_mode(0)
    with pytest.raises(nbd.Error, match="Operation not permitted"):
        client.pwrite(b"x", 0)
    client.shutdown()


# When it begins and ends


@pytest.mark.requires("nbdcopy", "nbdinfo")
def test_once_ends_it_with_the_last_client(base: Path, serve: Serve, tmp_path: Path) -> None:
    server = serve(base, "--once")
    assert run("nbdcopy", "-C", "4", server.uri, tmp_path / "copy").returncode == 0
    assert (tmp_path / "copy").read_bytes() == base.read_bytes()
    assert server.wait() == (0, "", f"cowkit: nothing was written on top of {base}\n")


def test_once_does_not_end_it_while_another_is_connected(base: Path, serve: Serve) -> None:
    import nbd

    server = serve(base, "--once")
    client = nbd.NBD()
    client.connect_uri(server.uri)
    write(server.uri, b"x", 0)
    assert client.pread(1, 0) == b"x"
    assert server.process.poll() is None
    client.shutdown()
    assert server.wait()[0] == 0


def test_it_ends_with_its_parent_if_asked_to(base: Path, runtime: Path) -> None:
    command = [*COWKIT, "serve", str(base), "--exit-with-parent"]
    parent = f"import os, subprocess, sys; subprocess.Popen({command!r}); sys.stdin.read(); os._exit(0)"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", parent], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin and process.stdout and process.stderr
        uri = process.stdout.readline().strip()
        write(uri, b"x", 0)
        process.stdin.close()
        assert process.stdout.read() == "", "which ends when the server does"
        assert process.stderr.read() == f"cowkit: 4 KiB written on top of {base}, thrown away\n"
    assert list(runtime.iterdir()) == []


def test_the_pid_file_is_there_as_long_as_it_serves(base: Path, serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("12345678\n")
    server = serve(base, "--pid-file", path)
    assert path.read_text() == f"{server.pid}\n"
    assert server.end()[0] == 0
    assert not path.exists()
    server = serve(base, "--pid-file", path)
    path.write_text("12345678\n")
    server.end()
    assert path.read_text() == "12345678\n", "another's by then"


def test_the_ready_descriptor_gets_the_uri_when_clients_can_connect_and_is_closed(base: Path) -> None:
    ours, theirs = os.pipe()
    command = [*COWKIT, "serve", str(base), "--ready-fd", str(theirs)]
    with subprocess.Popen(
        command, pass_fds=[theirs], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(theirs)
        with open(ours, encoding="utf-8") as file:
            said = file.read()
        assert said.endswith("\n")
        write(said.strip(), b"x", 0)
        process.terminate()
        out, _ = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out) == (0, said)


def test_a_ready_descriptor_that_nobody_reads_makes_no_difference(base: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    command = [*COWKIT, "serve", str(base), "--ready-fd", str(theirs)]
    with subprocess.Popen(
        command, pass_fds=[theirs], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(theirs)
        assert process.stdout
        write(process.stdout.readline().strip(), b"x", 0)
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_several_signals_end_it_as_one_does(base: Path, serve: Serve) -> None:
    server = serve(base)
    server.freeze()
    for number in (signal.SIGTERM, signal.SIGINT):
        server.process.send_signal(number)
    assert server.end(signal.SIGCONT) == (0, "", f"cowkit: nothing was written on top of {base}\n")


# What makes no sense: one clear line each


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--stdio", "--tcp", "0"], "--stdio serves the client at standard input and output alone: leave out --tcp"),
        (["--stdio", "--socket", "x"], "leave out --socket"),
        (["--stdio"], "standard input is neither a socket nor a pipe"),
        (["--vsock", "x"], "argument --vsock: invalid int value: 'x'"),
        (["--vsock", "-1"], "-1 is no vsock port"),
        (["--share", "some"], "argument --share: invalid choice: 'some'"),
        (["--max-exports", "3"], "a limit of 3 exports goes with a disk for each export name"),
        (["--share", "export", "--max-exports", "0"], "a server of 0 exports serves nothing"),
        (["--share", "export", "--max-exports", "x"], "argument --max-exports: invalid int value: 'x'"),
        (["--tls", "on"], "TLS needs the server's credentials"),
        (["--tls", "off"], "argument --tls: invalid choice: 'off'"),
        (["--tls-verify-peer"], "verifying clients needs the server's credentials"),
        (["--tls-certs", "none"], "cannot read none/server-cert.pem, which TLS needs: No such file or directory"),
        (["--tls-certs", "none", "--tls-psk", "none"], "give one of the two"),
        (["--tls-psk", "none"], "pre-shared keys"),
        (["--description", "x" * 5000], "5000"),
        (["--ready-fd", "1"], "--ready-fd 1: the standard streams are no descriptors for that"),
        (["--ready-fd", "-1"], "--ready-fd -1:"),
        (["--ready-fd", "99"], "--ready-fd 99: no such descriptor was handed down"),
        (["--ready-fd", "9999999999999"], "--ready-fd 9999999999999: no such descriptor was handed down"),
        (["--ready-fd", "x"], "argument --ready-fd: invalid int value: 'x'"),
        (["--pid-file", "none/pid"], "cannot write the pid file none/pid: No such file or directory"),
        (["--pid-file", "."], "cannot write the pid file .: "),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(arguments: list[str], expected: str, base: Path, cowkit: Run) -> None:
    assert expected in complaint(cowkit("serve", base, *arguments))
    assert [path.name for path in base.parent.iterdir()] == ["disk.img"], "nothing is left behind"


def test_a_ready_descriptor_that_is_for_reading_is_said_so(base: Path) -> None:
    with base.open("rb") as file:
        done = run(*COWKIT, "serve", base, "--ready-fd", file.fileno(), pass_fds=(file.fileno(),))
        assert complaint(done) == f"--ready-fd {file.fileno()}: that descriptor is not open for writing"


def test_a_difference_of_several_disks_is_no_use(base: Path, cowkit: Run) -> None:
    done = cowkit("run", base, "--share", "connection", "--diff", "x.qcow2", "--", "true")
    assert complaint(done) == "--diff keeps what changed on one disk, and with --share connection there are several"


def test_a_pid_file_replaces_nothing_but_the_pid_file_of_a_process_that_is_no_more(
    base: Path, tmp_path: Path, cowkit: Run, serve: Serve
) -> None:
    before = base.read_bytes()
    for precious in (base, tmp_path / "notes"):
        if not precious.exists():
            precious.write_text("12 eggs")
        said = complaint(cowkit("serve", base, "--pid-file", precious))
        assert "no pid file" in said
    assert base.read_bytes() == before
    assert (tmp_path / "notes").read_text() == "12 eggs"
    server = serve(base, "--pid-file", "pid")
    assert f"process {server.pid}, which is running" in complaint(cowkit("serve", base, "--pid-file", "pid"))
    server.process.kill()
    server.process.communicate()
    again = serve(base, "--pid-file", "pid")
    assert (tmp_path / "pid").read_text() == f"{again.pid}\n"
    again.end()


@pytest.mark.requires("qemu-img", "qemu-nbd")
def test_a_base_that_never_answers_does_not_keep_the_server_from_ending(tmp_path: Path, serve: Serve) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "d.qcow2", "64M"], check=True)
    server = serve("d.qcow2")
    children = Path(f"/proc/{server.pid}/task").glob("*/children")
    (helper,) = [int(pid) for each in children for pid in each.read_text().split()]
    os.kill(helper, signal.SIGSTOP)
    reader = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, nbd\nh = nbd.NBD()\nh.connect_uri(sys.argv[1])\nprint('in', flush=True)\nh.pread(65536, 8 << 20)",
            server.uri,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert reader.stdout
    assert reader.stdout.readline() == b"in\n"
    status, _, _ = server.end()
    assert status == 0
    reader.communicate(timeout=PATIENCE)
    assert not Path(f"/proc/{helper}").exists()


def test_a_server_in_brackets_ends_with_the_program_that_began_it(base: Path) -> None:
    code = (
        "import os, socket, subprocess, sys\n"
        "listener = socket.socket(socket.AF_UNIX); listener.bind('activated.sock'); listener.listen()\n"
        "def hand_over():\n"
        "    os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n"
        "    os.dup2(listener.fileno(), 3); os.set_inheritable(3, True); os.execv(sys.argv[1], sys.argv[1:])\n"
        "pid = os.fork()\n"
        "if not pid: hand_over()\n"
        "listener.close(); client = socket.socket(socket.AF_UNIX); client.connect('activated.sock'); assert client.recv(18)\n"
        "print(pid, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *COWKIT, "serve", base],
        cwd=base.parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    pid = int(done.stdout)
    fd = os.pidfd_open(pid) if Path(f"/proc/{pid}").exists() else None
    if fd is not None:
        assert select.select([fd], [], [], PATIENCE)[0]
        os.close(fd)


@pytest.mark.parametrize(("uri", "replaced"), [("{uri}", True), ("${uri}", True), ("x{socket}y", True)])
def test_braces_of_a_shell_are_the_shells(cowkit: Run, uri: str, replaced: bool) -> None:
    done = cowkit("run", "--size", "1M", "--", "sh", "-c", f'printf %s "{uri}"')
    assert ("nbd+unix:///?socket=" in done.stdout or "nbd.sock" in done.stdout) is replaced
    assert "$" not in done.stdout


def test_a_difference_is_no_backing_file_of_its_own(base: Path, cowkit: Run) -> None:
    said = complaint(cowkit("run", base, "--diff", "o.qcow2", "--backing", "o.qcow2", "--", "true"))
    assert "its own backing file" in said
