"""`cowkit run`."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.helpers import COWKIT, PATIENCE, Run, complaint, content

WRITE = (
    "import nbd, sys; client = nbd.NBD(); client.connect_uri(sys.argv[1]); client.pwrite(b'hello', 4096); client.shutdown(); "
    "sys.exit(int(sys.argv[2]))"
)

needs_nbd = pytest.mark.requires(modules=["nbd"])


def test_the_command_gets_the_disk_by_arguments_and_environment(base: Path, cowkit: Run) -> None:
    show = "import os, sys; print(*sys.argv[1:], os.environ['uri'], os.environ['NBD_URI'], os.environ['unixsocket'])"
    done = cowkit("run", base, "--", sys.executable, "-c", show, "{uri}", "socket={socket}")
    uri, sock, *rest, last = done.stdout.split()
    assert uri == f"nbd+unix:///?socket={last}"
    assert sock == f"socket={last}"
    assert rest == [uri, uri]
    assert (done.returncode, done.stderr) == (0, f"cowkit: nothing was written to {base}\n")


def test_with_tcp_there_is_a_unix_socket_too(cowkit: Run) -> None:
    done = cowkit("run", "--size", "1M", "--tcp", "127.0.0.1:0", "--", "sh", "-c", 'test -S "$unixsocket" && echo {uri}')
    assert done.stdout.startswith("nbd://127.0.0.1:")


@needs_nbd
@pytest.mark.parametrize("status", [0, 1, 77])
def test_it_ends_with_the_commands_status_and_a_summary(base: Path, cowkit: Run, status: int) -> None:
    before = base.read_bytes()
    done = cowkit("run", base, "--", sys.executable, "-c", WRITE, "{uri}", status)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", f"cowkit: 4 KiB written to {base}, thrown away\n")
    assert base.read_bytes() == before


@needs_nbd
@pytest.mark.parametrize("status", [0, 3])
def test_the_difference_is_kept_even_if_the_command_fails(base: Path, tmp_path: Path, cowkit: Run, status: int) -> None:
    done = cowkit("run", "disk.img", "--diff", "out.qcow2", "--", sys.executable, "-c", WRITE, "{uri}", status)
    assert done.returncode == status
    assert "cowkit: out.qcow2: 4 KiB changed in 1 extent on top of disk.img\n" in done.stderr
    before = base.read_bytes()
    assert content(tmp_path / "out.qcow2", base) == before[:4096] + b"hello" + before[4101:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_signal_that_ends_the_command_counts_as_a_shell_counts_it(cowkit: Run, number: int) -> None:
    assert cowkit("run", "--size", "1M", "--", "sh", "-c", f"kill -{number} $$").returncode == 128 + number


def test_a_failure_of_the_difference_is_status_2_unless_the_command_failed(base: Path, cowkit: Run) -> None:
    for command, status in (("true", 2), ("false", 1)):
        done = cowkit("run", base, "--diff", ".", "--", command)
        assert done.returncode == status
        assert done.stderr.startswith("cowkit: ")
        assert done.stderr.count("\n") == 1


def test_a_base_that_is_gone_is_status_2_and_no_difference_is_kept(base: Path, tmp_path: Path, cowkit: Run) -> None:
    assert "is not there any more" in complaint(cowkit("run", base, "--diff", "out.qcow2", "--", "rm", base))
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_changed_is_status_2_unless_the_command_failed(base: Path, cowkit: Run) -> None:
    for end, status in ((0, 2), (9, 9)):
        done = cowkit("run", base, "--", "sh", "-c", f"printf x >> {base}; exit {end}")
        assert done.returncode == status
        assert "changed while it was in use" in done.stderr


def test_what_stands_behind_the_dashes_is_the_commands_own(cowkit: Run) -> None:
    done = cowkit("run", "--size", "1M", "--", "echo", "--diff", "x", "--", "--help", "{uris}", "{}")
    assert done.stdout == "--diff x -- --help {uris} {}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["disk.img"], "give a command to run, behind `--`"),
        (["disk.img", "--"], "give a command to run, behind `--`"),
        (["disk.img", "true"], "give a command to run, behind `--`"),
        (["--", "true"], "give a BASE to serve, or --size SIZE"),
        (["none.img", "--", "true"], "cannot open base none.img"),
        (["disk.img", "--", "no-such-command"], "cannot run no-such-command: No such file or directory"),
        (["disk.img", "--", "./disk.img"], "cannot run ./disk.img: Permission denied"),
        (["disk.img", "--", "cat", "{file}"], "there is no {file}"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(arguments: list[str], expected: str, base: Path, cowkit: Run) -> None:
    assert expected in complaint(cowkit("run", *arguments))


def test_ctrl_c_is_the_commands_own_affair() -> None:
    """In a terminal, which sends SIGINT to cowkit and to the command alike."""
    child = (
        "import signal, sys\nsignal.signal(signal.SIGINT, lambda *_: (print('tidying up', flush=True), sys.exit(5)))\n"
        "print('ready', flush=True)\nsignal.pause()"
    )
    process, terminal = pty.fork()
    if not process:
        os.execv(COWKIT[0], [*COWKIT, "run", "--size", "1M", "--", sys.executable, "-c", child])
    shown = b""
    while b"ready" not in shown:
        shown += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    while b"nothing was written" not in shown:
        shown += os.read(terminal, 1000)
    assert b"tidying up" in shown
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 5
    os.close(terminal)


def test_the_command_can_be_interrupted_as_without_cowkit() -> None:
    code = "import signal; print(signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    bare = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    under = subprocess.run([*COWKIT, "run", "--size", "1M", "--", sys.executable, "-c", code], capture_output=True, check=True)
    assert under.stdout == bare.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_should_end_cowkit_is_passed_on_to_the_command(number: int) -> None:
    command = [*COWKIT, "run", "--size", "1M", "--", "sh", "-c", "echo ready; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert err == b"cowkit: nothing was written to the blank disk\n"


def test_it_can_be_found_and_controlled_but_not_quit(cowkit: Run) -> None:
    ask = (
        "from cowkit.server.control import ControlClient\nfrom cowkit.server.runtime import running\n"
        "names = [c['name'] for c in ControlClient(running()[0].control).execute('query-commands')]\n"
        "print('cowkit-diff' in names, 'quit' in names)"
    )
    assert cowkit("run", "--size", "1M", "--", sys.executable, "-W", "ignore", "-c", ask).stdout == "True False\n"
