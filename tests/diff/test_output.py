"""A file appears whole or not at all, and never instead of the base."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowkit.diff.output import AtomicOutput
from cowkit.disk import Disk, FileBase
from cowkit.errors import OutputError
from tests.diff.helpers import diff, make_base, noise, run
from tests.limits import files_limited_to


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A changed disk of 4 MiB."""
    path = make_base(tmp_path / "base.img", 4 << 20, {0: noise(4 << 20, 1)})
    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        disk.pwrite(noise(3 << 20, 2), 4096)
        yield disk


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path | str, data: bytes = b"new", **options: list[str]) -> None:
    with AtomicOutput(path, **options) as output:
        output.pwrite(data, 0)


def test_nothing_but_the_file_is_left(tmp_path: Path) -> None:
    write(tmp_path / "out", b"data")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"data"


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), AtomicOutput(tmp_path / "out") as output:
        output.pwrite(b"new", 0)
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"old"


def test_ctrl_c_within_a_diff_leaves_the_old_file_and_nothing_else(disk: Disk, tmp_path: Path) -> None:
    from cowkit.diff import write_diff

    out = tmp_path / "out"
    out.write_bytes(b"old")

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with disk.freeze() as view, pytest.raises(KeyboardInterrupt):
        write_diff(view, out, backing_file="base.img", progress=interrupt)
    assert out.read_bytes() == b"old"
    assert names(tmp_path) == ["base.img", "out"]


KILLED = """
import os, signal, sys
from cowkit.diff.output import AtomicOutput
with AtomicOutput(sys.argv[1]) as output:
    output.pwrite(b"half", 0)
    print("writing", flush=True)
    sys.stdin.read()
"""


def start_writer(path: Path) -> subprocess.Popen[bytes]:
    """Another process in the middle of writing to ``path``."""
    writer = subprocess.Popen([sys.executable, "-c", KILLED, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    return writer


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with start_writer(tmp_path / "out") as writer:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert (tmp_path / "out").read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    write(tmp_path / "other")
    assert len(names(tmp_path)) == 3  # a different target: not its business
    write(tmp_path / "out")
    assert names(tmp_path) == ["other", "out"]
    assert (tmp_path / "out").read_bytes() == b"new"


def test_a_living_writer_to_the_same_target_is_not_disturbed(tmp_path: Path) -> None:
    with start_writer(tmp_path / "out") as writer:
        write(tmp_path / "out")
        assert len(names(tmp_path)) == 2
        assert (tmp_path / "out").read_bytes() == b"new"
        writer.communicate(b"")
        assert writer.returncode == 0
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"half"


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    for mode in (0o640, 0o666, 0o755):
        (tmp_path / "out").chmod(mode)
        write(tmp_path / "out")
        assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


def test_a_new_file_has_what_the_umask_leaves(tmp_path: Path) -> None:
    code = f"import os; os.umask(0o027)\nfrom cowkit.diff.output import AtomicOutput\nwith AtomicOutput({str(tmp_path / 'out')!r}): pass"
    run(sys.executable, "-c", code)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_a_link_stays_and_the_file_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/out")
    write(tmp_path / "link", b"first")
    write(tmp_path / "link", b"second")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["out"]
    assert (tmp_path / "real/out").read_bytes() == b"second"


def test_names_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    write(tmp_path / ("x" * 255))
    assert names(tmp_path) == ["x" * 255]


# What is refused


def test_the_base_is_never_replaced_under_any_name(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base.img"
    before = base.stat()
    (tmp_path / "hard").hardlink_to(base)
    (tmp_path / "soft").symlink_to("base.img")
    (tmp_path / "folder").symlink_to(".")
    monkeypatch.chdir(tmp_path)
    for name in (str(base), "base.img", "./base.img", "hard", "soft", "folder/base.img"):
        with pytest.raises(OutputError, match="same file"):
            diff(disk, Path(name))
    assert (base.stat().st_ino, base.stat().st_size) == (before.st_ino, before.st_size)
    assert names(tmp_path) == ["base.img", "folder", "hard", "soft"]
    (tmp_path / "hard").unlink()


def test_a_base_that_was_unlinked_is_not_replaced_either(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="same file"):
        write(tmp_path / "gone", spare=[str(tmp_path / "gone")])


@pytest.mark.requires("qemu-img")
def test_what_a_qcow2_base_stands_on_is_not_replaced(tmp_path: Path) -> None:
    make_base(tmp_path / "bottom.img", 1 << 20, {0: b"x"})
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "bottom.img", "-F", "raw", tmp_path / "middle.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")
    with Disk(FileBase(tmp_path / "top.qcow2"), tmpdir=tmp_path) as disk:
        for name in ("bottom.img", "middle.qcow2", "top.qcow2"):
            with pytest.raises(OutputError, match="same file"):
                diff(disk, tmp_path / name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("folder", "a directory"),
        ("folder/", "a directory|name of a file"),
        ("missing/out", "no directory .*missing"),
        ("file/out", "Not a directory"),
        ("file/", "name of a file"),
        ("", "name of a file"),
        ("pipe", "a pipe"),
        ("/dev/full", "a character device"),
        ("/sys/cowkit", "Permission denied|Read-only|not permitted"),
        ("x" * 256, "name too long"),
        ("loop", "symbolic links"),
        ("/dev/stdout", "open descriptor"),
        ("/dev/fd/1", "open descriptor"),
        ("/proc/self/fd/1", "open descriptor"),
        ("nul\0", "null"),
    ],
)
def test_what_cannot_be_written_is_refused_with_the_reason(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    before = names(tmp_path)
    with pytest.raises(OutputError, match=message) as caught:
        write(path)
    assert path.rstrip("\0") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


def test_a_link_to_standard_output_is_no_file_to_write(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("/dev/stdout")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(OutputError, match="open descriptor"):
        write(tmp_path / "two")


AS_SOMEBODY = """
import sys
from cowkit.diff.output import AtomicOutput
from cowkit.errors import OutputError
try:
    with AtomicOutput(sys.argv[1]): pass
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_write_protection_is_respected() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)  # for the other user
        closed, out = Path(folder, "closed"), Path(folder, "out")
        closed.mkdir(0o755)
        out.write_bytes(b"old")
        out.chmod(0o444)
        for path, message in ((closed / "out", "Permission denied"), (out, "write-protected")):
            done = subprocess.run(
                ["python3", "-c", AS_SOMEBODY, path], user=65534, capture_output=True, text=True, check=True,
                env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"},
            )  # fmt: skip
            assert message in done.stdout
        assert names(Path(folder)) == ["closed", "out"]


# No room


def test_a_full_file_system_leaves_the_old_file_and_nothing_else() -> None:
    script = f"""
set -e
mount -t tmpfs -o size=1M none /mnt
echo old >/mnt/out
PYTHONPATH={Path(__file__).parents[2]} {sys.executable} -c '
from cowkit.diff.output import AtomicOutput
from cowkit.errors import OutputError
try:
    with AtomicOutput("/mnt/out") as output:
        for n in range(64):
            output.pwrite(bytes(65536), n * 65536)
except OutputError as error:
    print(error)
'
ls -A /mnt; cat /mnt/out
"""
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.stdout == "cannot write /mnt/out: No space left on device\nout\nold\n"


def test_a_limit_on_file_sizes_leaves_the_old_file_and_nothing_else(disk: Disk, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"old")
    with files_limited_to(1_500_001), pytest.raises(OutputError, match=r"out: File too large") as caught:
        diff(disk, out)
    assert isinstance(caught.value.__cause__, OSError)
    assert out.read_bytes() == b"old"
    assert names(tmp_path) == ["base.img", "out"]


@pytest.mark.parametrize("size", [4096, 8 << 20])
def test_a_file_that_is_replaced_is_let_go_of_whatever_its_size(tmp_path: Path, size: int) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"x" * size)
    before = set(os.listdir("/proc/self/fd"))
    with AtomicOutput(out) as output:
        output.pwrite(b"new", 0)
    for thread in threading.enumerate():
        if thread.name == "cowkit-diff-replaced":
            thread.join()
    assert out.read_bytes() == b"new"
    assert set(os.listdir("/proc/self/fd")) == before


def test_ctrl_c_while_the_writers_thread_starts_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    monkeypatch.setattr("cowkit.diff.bulk_writer._WORTH_A_THREAD", -1.0)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt), AtomicOutput(tmp_path / "out") as output:
        output.pwrite_meanwhile(memoryview(bytes(2 << 20)), 0)
    assert names(tmp_path) == []
    assert set(os.listdir("/proc/self/fd")) == before


def test_ctrl_c_while_a_replaced_file_is_let_go_of_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: threading.Thread) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    out.write_bytes(b"x" * (8 << 20))
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt), AtomicOutput(out) as output:
        output.pwrite(b"new", 0)
    assert out.read_bytes() == b"new"
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_forked_child_that_fails_leaves_its_parents_file_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with AtomicOutput(out) as output:
        child = os.fork()
        if not child:
            try:
                output.__exit__(RuntimeError, RuntimeError(), None)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        output.pwrite(b"new", 0)
    assert out.read_bytes() == b"new"
