"""`cowkit run`."""

from __future__ import annotations

import lzma
import os
import pty
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cowkit.diff import Qcow2Image
from cowkit.disk import FileBase
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
    assert (done.returncode, done.stderr) == (0, f"cowkit: nothing was written on top of {base}\n")


def test_with_tcp_there_is_a_unix_socket_too(cowkit: Run) -> None:
    done = cowkit(
        "run", "--size", "1M", "--tcp", "127.0.0.1:0", "--", "sh", "-c", 'test -S "$unixsocket" && echo {uri}'
    )
    assert done.stdout.startswith("nbd://127.0.0.1:")


@needs_nbd
@pytest.mark.parametrize("status", [0, 1, 77])
def test_it_ends_with_the_commands_status_and_a_summary(base: Path, cowkit: Run, status: int) -> None:
    before = base.read_bytes()
    done = cowkit("run", base, "--", sys.executable, "-c", WRITE, "{uri}", status)
    assert (done.returncode, done.stdout, done.stderr) == (
        status,
        "",
        f"cowkit: 4 KiB written on top of {base}, thrown away\n",
    )
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
        (base.parent / "gone").mkdir()
        done = cowkit("run", base, "--diff", "gone/out", "--", "sh", "-c", f"rmdir gone; {command}")
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
    under = subprocess.run(
        [*COWKIT, "run", "--size", "1M", "--", sys.executable, "-c", code], capture_output=True, check=True
    )
    assert under.stdout == bare.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_should_end_cowkit_is_passed_on_to_the_command(number: int) -> None:
    command = [*COWKIT, "run", "--size", "1M", "--", "sh", "-c", "echo ready; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE) == 128 + number  # before its input ends: so would cat
        assert process.stderr
        assert process.stderr.read() == b"cowkit: nothing was written to the blank disk\n"


def test_it_can_be_found_and_controlled_but_not_quit(cowkit: Run) -> None:
    ask = (
        "from cowkit.server.control_client import ControlClient\nfrom cowkit.server.runtime import running\n"
        "names = [c['name'] for c in ControlClient(running()[0].control).execute('query-commands')]\n"
        "print('cowkit-diff' in names, 'quit' in names)"
    )
    assert cowkit("run", "--size", "1M", "--", sys.executable, "-W", "ignore", "-c", ask).stdout == "True False\n"


@pytest.mark.parametrize(
    ("output", "reason"), [("missing/out", "no directory"), ("disk.img", "the same file"), (".", "a directory")]
)
def test_where_the_difference_goes_is_looked_at_before_the_command_runs(
    base: Path, tmp_path: Path, cowkit: Run, output: str, reason: str
) -> None:
    assert base == tmp_path / "disk.img"
    done = cowkit("run", base, "--diff", output, "--", "touch", "ran")
    assert reason in complaint(done)
    assert not (tmp_path / "ran").exists()


def test_what_ends_cowkit_while_it_writes_the_difference_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "diff.qcow2").write_bytes(b"old")
    code = "import sys, nbd\nh = nbd.NBD()\nh.connect_uri(sys.argv[1])\nfor i in range(20): h.pwrite(b'x' * (10 << 20), i * (10 << 20))"
    command: list[str | Path] = [
        *COWKIT,
        "run",
        "--size",
        "1G",
        "--socket",
        output / "s.sock",
        "--diff",
        output / "diff.qcow2",
    ]
    with subprocess.Popen([*command, "--", sys.executable, "-c", code, "{uri}"], stderr=subprocess.DEVNULL) as process:
        while not list(output.glob(".cowkit-*")):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert [path.name for path in output.iterdir()] == ["diff.qcow2"]
    assert (output / "diff.qcow2").read_bytes() == b"old"


def test_why_requests_were_refused_is_in_the_summary(tmp_path: Path, cowkit: Run) -> None:
    missing = cowkit("run", "--size", "1M", "--tmpdir", tmp_path / "missing", "--", "true")
    assert "no such directory" in complaint(missing)
    code = "import sys, nbd\nh = nbd.NBD()\nh.connect_uri(sys.argv[1])\ntry: h.pwrite(b'x' * (1 << 20), 0)\nexcept nbd.Error: pass"
    script = f"ulimit -f 100; exec {' '.join(COWKIT)} run --size 1M -- {sys.executable} -c {shlex.quote(code)} {{uri}}"
    full = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert "requests were refused: the overlay in" in full.stderr


def test_a_base_that_cannot_be_a_backing_file_needs_another_named(tmp_path: Path, cowkit: Run) -> None:
    raw = tmp_path / "plain.img"
    raw.write_bytes(bytes(range(256)) * 4096)
    (tmp_path / "disk.img.xz").write_bytes(lzma.compress(raw.read_bytes()))
    command = ("--", "qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", "{uri}")
    refused = cowkit("run", "disk.img.xz", "--diff", "d.qcow2", *command)
    assert "--backing" in complaint(refused)
    assert cowkit("run", "disk.img.xz", "--diff", "d.qcow2", "--backing", "plain.img", *command).returncode == 0
    with Qcow2Image(tmp_path / "d.qcow2", FileBase(raw).pread, 1 << 20) as image:
        assert (image.backing_file, image.backing_format) == ("plain.img", "raw")
        assert image.pread(1 << 20, 0) == b"\7" * 65536 + raw.read_bytes()[65536:]


def test_partition_offset_and_format_reach_the_base(tmp_path: Path, cowkit: Run) -> None:
    (tmp_path / "whole.img").write_bytes(b"a" * 4096 + b"b" * 4096)
    code = "import sys, nbd\nh = nbd.NBD()\nh.connect_uri(sys.argv[1])\nprint(h.get_size(), h.pread(1, 0))"
    told = cowkit("run", "whole.img", "--offset", "4K", "--format", "raw", "--", sys.executable, "-c", code, "{uri}")
    assert told.stdout == "4096 bytearray(b'b')\n"
    assert "partition" in complaint(cowkit("run", "whole.img", "--partition", "1", "--", "true"))


@pytest.mark.requires("qemu-img")
def test_the_difference_is_of_the_kind_that_is_asked_for(base: Path, tmp_path: Path, cowkit: Run) -> None:
    done = cowkit("run", base, "--diff", "d.vmdk", "-O", "vmdk", "--", "true")
    assert done.returncode == 0, done.stderr
    assert (
        b"VMDK" in (tmp_path / "d.vmdk").read_bytes()[:1024].upper()
        or b"KDMV" in (tmp_path / "d.vmdk").read_bytes()[:4]
    )
    done = cowkit("run", base, "--diff", "d.qcow2", "--no-backing", "--compress", "zlib", "--", "true")
    assert done.returncode == 0, done.stderr
    with Qcow2Image(tmp_path / "d.qcow2") as image:
        assert image.backing_file is None
        assert image.pread(base.stat().st_size, 0) == base.read_bytes()


def test_what_kind_of_difference_makes_no_sense_is_said_before_the_command_runs(base: Path, cowkit: Run) -> None:
    assert "--raw says what kind of image --diff writes" in complaint(
        cowkit("run", base, "--raw", "--", "touch", "ran")
    )
    said = complaint(cowkit("run", base, "--diff", "x", "--raw", "--subclusters", "--", "touch", "ran"))
    assert "a raw file has no subclusters" in said
    assert "cannot be written to standard output" in complaint(cowkit("run", base, "--diff", "-", "--", "touch", "ran"))
    assert not (base.parent / "ran").exists()
