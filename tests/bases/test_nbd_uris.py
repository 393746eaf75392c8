"""Bases behind NBD URIs: nbdkit with this and that filter, over Unix sockets and TCP."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import pytest

from cowkit.bases import nbd_client, open_base
from cowkit.disk import Disk, Extent, Kind
from cowkit.errors import BaseChangedError, BaseError, BaseOpenError, MissingToolError, UsageError
from tests.bases.helpers import MIB, check_extents, check_reads, nbdkit, write_compressed

pytestmark = [pytest.mark.requires("nbdkit", modules=["nbd"]), pytest.mark.usefixtures("no_leaks")]

SMALL = ("--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-preferred=8192", "blocksize-maximum=65536")


@pytest.mark.parametrize(
    "filters",
    [
        (),
        ("--filter=cow",),
        ("--filter=noextents",),
        ("--filter=multi-conn", "multi-conn-mode=disable"),
        ("--filter=noparallel",),
        (*SMALL, "blocksize-error-policy=error"),
    ],
    ids=["file", "cow", "noextents", "one connection", "noparallel", "block sizes"],
)
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_random_reads_of_several_threads_are_the_exports(
    raw: Path, content: bytes, tmp_path: Path, filters: tuple[str, ...], tcp: bool
) -> None:
    if "blocksize-minimum=4096" in filters:
        content = content[: 3 * MIB]  # else nbdkit would have an end that no request can reach
        raw.write_bytes(content)
    names = [each for each in filters if each.startswith("--")]
    settings = [each for each in filters if not each.startswith("--")]
    with nbdkit(*names, "file", raw, *settings, unix=None if tcp else tmp_path / "sock") as (uri, _):
        base = open_base(uri)
        assert (base.given, base.path, base.view) == (uri, None, None)
        assert (base.backing_format, base.backing_refusal) == ("raw", None)
        check_reads(base, content)
        base.verify()
        base.verify_path()
        base.release()


@pytest.mark.requires("xz")
def test_what_nbdkits_own_filters_read_lies_behind_a_base_too(content: bytes, tmp_path: Path) -> None:
    packed = write_compressed(tmp_path / "disk.img.xz", content, "xz")
    with nbdkit("--filter=xz", "file", packed) as (uri, _):
        base = open_base(uri)
        check_reads(base, content, rounds=5)
        base.release()


def test_holes_are_those_of_the_servers_block_status(raw: Path, content: bytes) -> None:
    with nbdkit("file", raw) as (uri, _):
        base, local = open_base(uri), open_base(raw)
        assert base.sparse
        assert list(base.extents(0, base.size)) == list(local.extents(0, base.size))
        assert check_extents(base, content, 0, len(content)) > 0
        base.release()
        local.release()


def test_a_hole_of_terabytes_is_told_in_few_requests() -> None:
    with nbdkit("memory", "1T") as (uri, _):
        base = open_base(uri)
        assert list(base.extents(5, (1 << 40) - 7)) == [Extent(5, (1 << 40) - 7, Kind.HOLE)]
        base.release()


def test_block_status_that_was_forgotten_is_asked_for_again(
    raw: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_client, "_MOST_EXTENTS", 2)
    monkeypatch.setattr(nbd_client, "_STATUS_SPAN", 10_000)
    with nbdkit("file", raw) as (uri, _):
        base = open_base(uri)
        for offset in (2_000_000, 0, 1_000_000, 1_999_999, 5):
            check_extents(base, content, offset, 900_000)
        base.release()


def test_a_server_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        refusing = f"nbd://127.0.0.1:{taken.getsockname()[1]}"
        for uri in (refusing, f"nbd+unix:///?socket={tmp_path}/none", "nbd+what://host"):
            with pytest.raises(BaseOpenError) as caught:
                open_base(uri)
            assert "\n" not in str(caught.value) and uri in str(caught.value)
            assert caught.value.__cause__ is not None


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_client, "CONNECT_SECONDS", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(
            BaseOpenError,
            match=r"cannot open base nbd://127.*: the server does not answer within 0\.1 seconds: see whether",
        ),
    ):
        open_base(f"nbd://127.0.0.1:{silent.getsockname()[1]}")


def test_a_server_that_hangs_up_or_is_none_is_told(tmp_path: Path) -> None:
    for answer in (b"", b"HTTP/1.0 400 Bad Request\r\n\r\n" * 20):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve(listener: socket.socket = listener, answer: bytes = answer) -> None:
                peer, _ = listener.accept()
                with peer:
                    peer.sendall(answer)

            server = threading.Thread(target=serve)
            server.start()
            with pytest.raises(BaseOpenError) as caught:
                open_base(f"nbd://127.0.0.1:{listener.getsockname()[1]}")
            server.join()
            assert "\n" not in str(caught.value)


def test_a_server_that_dies_between_reads_is_an_error_of_one_line(raw: Path, content: bytes) -> None:
    with nbdkit("file", raw) as (uri, process):
        base = open_base(uri)
        assert base.pread(100, 0) == content[:100]
        process.kill()
        process.wait()
        for _ in range(2):
            with pytest.raises(BaseError, match=r"at byte 4096: the NBD server behind it has gone"):
                base.pread(100, 4096)
        with pytest.raises(BaseError, match="has gone"):
            list(base.extents(0, base.size))
        with pytest.raises(BaseChangedError, match="is not there any more"):
            base.verify_path()
        base.release()


def test_a_server_that_dies_under_reads_fails_them_all(raw: Path) -> None:
    with nbdkit("--filter=delay", "file", raw, "rdelay=30") as (uri, process):
        base = open_base(uri)
        failed: list[BaseException] = []

        def read() -> None:
            try:
                base.pread(4096, 0)
            except BaseError as error:
                failed.append(error)

        readers = [threading.Thread(target=read) for _ in range(8)]
        for each in readers:
            each.start()
        process.kill()
        for each in readers:
            each.join()
        assert len(failed) == 8
        base.release()


def test_an_error_of_the_server_is_that_reads_alone(raw: Path, content: bytes, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    trigger.touch()
    with nbdkit("--filter=error", "file", raw, "error-pread=EIO", "error-pread-rate=100%", f"error-file={trigger}") as (
        uri,
        _,
    ):
        base = open_base(uri)
        with pytest.raises(BaseError, match=r"cannot read base .* at byte 512: .*Input/output error"):
            base.pread(100, 512)
        trigger.unlink()
        assert base.pread(100, 512) == content[512:612]
        base.release()


def test_an_export_that_is_another_one_now_is_noticed(raw: Path, tmp_path: Path) -> None:
    with nbdkit("file", f"dir={tmp_path}") as (uri, _):
        base = open_base(f"{uri}/disk.img")
        base.verify_path()
        raw.write_bytes(bytes(4096))
        with pytest.raises(BaseChangedError, match="its size went from 3146240 to 4096 bytes"):
            base.verify_path()
        base.release()


@pytest.mark.parametrize("scheme", ["nbds://", "nbd+vsock://", "nbds+unix://"])
def test_uris_that_qemu_cannot_open_are_no_backing_files(
    raw: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbd

    from cowkit.bases.nbd_base import NbdBase

    with nbdkit("file", raw) as (uri, _):
        plain = nbd.NBD.aio_connect_uri
        monkeypatch.setattr(nbd.NBD, "aio_connect_uri", lambda handle, _uri: plain(handle, uri))
        base = NbdBase(f"{scheme}2:10809")
        assert base.backing_refusal is not None and "nbdcopy" in base.backing_refusal
        base.release()


def test_a_uri_has_no_format(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is an NBD URI, which is always raw, not qcow2"):
        open_base("nbd://localhost", format="qcow2")


@pytest.mark.parametrize("other", [None, socket])  # not installed, or the unrelated package of that name
def test_without_libnbd_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, other: object) -> None:
    monkeypatch.setitem(sys.modules, "nbd", other)
    with pytest.raises(MissingToolError, match="apt install python3-libnbd, or dnf install python3-libnbd"):
        open_base("nbd://localhost")


def test_the_engine_reads_and_writes_on_top_of_it(raw: Path, content: bytes, tmp_path: Path) -> None:
    with nbdkit("file", raw) as (uri, _), Disk(open_base(uri), tmpdir=tmp_path) as disk:
        disk.pwrite(b"boo", 1_000_001)
        assert disk.pread(4096, 1_000_000) == content[1_000_000:1_000_001] + b"boo" + content[1_000_004:1_004_096]
