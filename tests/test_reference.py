"""The ways of use that nbdkit-cow-filter(1) documents: each sentence of that manual page that a user relies on has a test."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cowkit import CowDisk

COWKIT = [sys.executable, "-m", "cowkit.cli.main"]
BLOCK = 4096

pytestmark = pytest.mark.requires(modules=["nbd"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(1 << 20))
    return path


@contextmanager
def served(*arguments: str, **options: Any) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A `cowkit serve` of its own, ended in the end."""
    with subprocess.Popen([*COWKIT, "serve", *arguments], stdout=subprocess.PIPE, text=True, **options) as process:
        assert process.stdout is not None
        uri = process.stdout.readline().strip()
        try:
            yield uri, process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def connect(uri: str) -> Any:
    import nbd

    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


def test_serve_the_file_disk_img_allowing_writes_but_do_not_save_any_changes_into_the_file(image: Path) -> None:
    before = hashlib.sha256(image.read_bytes()).digest()
    with served(str(image)) as (uri, _):
        handle = connect(uri)
        handle.pwrite(b"w" * 10_000, 5)
        assert handle.pread(10_000, 5) == b"w" * 10_000
        handle.shutdown()
    assert hashlib.sha256(image.read_bytes()).digest() == before


def test_anything_written_is_thrown_away_as_soon_as_the_server_exits(image: Path) -> None:
    original = image.read_bytes()
    with served(str(image)) as (uri, _):
        handle = connect(uri)
        handle.pwrite(b"w" * BLOCK, 0)
        handle.shutdown()
    with served(str(image)) as (uri, _):
        handle = connect(uri)
        assert handle.pread(len(original), 0) == original
        handle.shutdown()


def test_all_connections_see_the_same_view_of_the_disk(image: Path) -> None:
    with served(str(image)) as (uri, _):
        first, second = connect(uri), connect(uri)
        assert first.can_multi_conn()
        first.pwrite(b"one" * 100, 12345)
        assert second.pread(300, 12345) == b"one" * 100
        second.trim(BLOCK, 0)
        second.flush()
        assert first.pread(BLOCK, 0) == bytes(BLOCK)
        first.shutdown()
        third = connect(uri)
        assert third.pread(300, 12345) == b"one" * 100
        second.shutdown()
        third.shutdown()


def test_the_base_is_opened_read_only(image: Path) -> None:
    with served(str(image)) as (uri, process):
        handle = connect(uri)
        handle.pwrite(b"w", 0)
        handle.shutdown()
        flags = [
            int(line.split()[1], 8)
            for fd in Path(f"/proc/{process.pid}/fd").iterdir()
            if os.path.realpath(fd) == str(image)
            for line in Path(f"/proc/{process.pid}/fdinfo/{fd.name}").read_text().splitlines()
            if line.startswith("flags:")
        ]
        assert flags and all(flag & os.O_ACCMODE == os.O_RDONLY for flag in flags)
        assert not handle.is_read_only()


@pytest.mark.parametrize(("how", "size"), [("exact", 130_000), ("down", 126_976), ("up", 131_072)])
def test_rounding_the_image_size_down_or_up_is_an_option_and_its_last_bytes_count_otherwise(
    tmp_path: Path, how: str, size: int
) -> None:
    path = tmp_path / "odd.img"
    content = os.urandom(130_000)
    path.write_bytes(content)
    with served(str(path), "--round", how) as (uri, _):
        handle = connect(uri)
        assert handle.get_size() == size
        assert handle.pread(size, 0) == content[:size].ljust(size, b"\0")
        handle.shutdown()


def overlay_folders(pid: int) -> set[str]:
    # Standard output and error may be nameless files, too: pytest's.
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a module that was being imported
            links += [os.readlink(fd)] if int(fd.name) > 2 else []
    return {os.path.dirname(link.removesuffix(" (deleted)")) for link in links if link.endswith(" (deleted)")}


def test_the_changes_are_stored_in_a_temporary_file_located_in_var_tmp_by_default(image: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    with served(str(image), env=environment) as (uri, process):
        handle = connect(uri)
        handle.pwrite(b"w", 0)
        assert overlay_folders(process.pid) == {"/var/tmp"}
        handle.shutdown()


def test_you_can_override_this_location_by_setting_the_tmpdir_environment_variable(image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "overlays"
    folder.mkdir()
    with served(str(image), env={**os.environ, "TMPDIR": str(folder)}) as (uri, process):
        handle = connect(uri)
        handle.pwrite(b"w", 0)
        assert overlay_folders(process.pid) == {str(folder)}
        assert list(folder.iterdir()) == []
        handle.shutdown()


@pytest.mark.parametrize("asked", [False, True])
def test_a_client_cache_request_copies_unmodified_data_to_the_overlay_if_asked_to_and_not_otherwise(
    image: Path, asked: bool
) -> None:
    original = image.read_bytes()
    with CowDisk(image, cow_on_cache=asked) as disk:
        handle = connect(disk.uri)
        handle.pwrite(b"mine", 0)
        assert handle.can_cache()
        handle.cache(16 * BLOCK, 0)
        assert handle.pread(16 * BLOCK, 0) == b"mine" + original[4 : 16 * BLOCK]
        handle.shutdown()
        assert disk.dirty_bytes == (16 * BLOCK if asked else BLOCK)


@pytest.mark.requires("qemu-img")
def test_run_these_qemu_img_commands_to_construct_a_qcow2_file_containing_the_differences(
    image: Path, tmp_path: Path
) -> None:
    diff = tmp_path / "diff.qcow2"
    with served(str(image)) as (uri, _):
        handle = connect(uri)
        handle.pwrite(b"w" * 70_000, 200_000)
        handle.trim(BLOCK, 0)
        handle.shutdown()
        path = uri.partition("socket=")[2]
        for command in (
            ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", f"nbd:unix:{path}", str(diff)],
            ["rebase", "-q", "-f", "qcow2", "-F", "raw", "-b", str(image), str(diff)],
            ["compare", "-q", "-f", "qcow2", "-F", "raw", str(diff), uri],
        ):
            subprocess.run(["qemu-img", *command], check=True)
