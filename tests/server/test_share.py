"""Whose overlay it is: everybody's, an export name's, or a connection's."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowkit import CowDisk
from cowkit.disk import Disk, FileBase, ZeroBase
from cowkit.errors import UsageError
from cowkit.hosting.server import DiskServer
from cowkit.server.server import NbdServer
from tests.server.negotiating import ACK, EXPORT_NAME, GO, INFO, LIST, POLICY, UNKNOWN, infos, option
from tests.server.raw_client import DISC, EPERM, TRIM, WRITE, WRITE_ZEROES, RawClient, open_files, where

SIZE = 1 << 20
READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES = (1 << bit for bit in (1, 2, 3, 5, 6))
CAN_MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO = (1 << bit for bit in (8, 10, 11))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def disk(base: Path) -> Iterator[Disk]:
    with Disk(FileBase(base)) as disk:
        yield disk


def client_of(server: DiskServer, name: str = "", *contexts: str) -> RawClient:
    return RawClient(where(server)).negotiate("structured", *contexts, name=name)


def exports(client: RawClient) -> list[str]:
    client.send(option(LIST))
    *listed, (_, last, _) = client.option_replies()
    assert last == ACK
    return [data[4 : 4 + int.from_bytes(data[:4])].decode() for _, _, data in listed]


# What each way means


def test_all_see_one_disk(disk: Disk) -> None:
    with NbdServer(disk, export_name="disk") as server, client_of(server) as one, client_of(server, "disk") as other:
        one.write(b"seen", 0)
        assert other.read(4, 0) == b"seen" == disk.pread(4, 0)
        assert one.flags & other.flags & CAN_MULTI_CONN
        assert server.written_bytes == 4096


def test_each_export_name_has_a_disk_that_stays(disk: Disk, base: Path) -> None:
    original = base.read_bytes()
    with NbdServer(disk, share="export", export_name="first") as server:
        with client_of(server, "a") as one, client_of(server, "a") as same, client_of(server, "b") as other:
            one.write(b"a's", 0)
            other.write(b"b's", 4096)
            assert same.read(3, 0) == b"a's"
            assert other.read(4096, 0) == original[:4096]
            assert same.read(4096, 4096) == original[4096:8192]
            assert one.flags & CAN_MULTI_CONN
        with client_of(server, "a") as later, client_of(server) as default, client_of(server, "first") as first:
            assert later.read(3, 0) == b"a's"
            default.write(b"default", 0)
            assert first.read(7, 0) == b"default", "no name is the default export's"
        assert disk.pread(SIZE, 0) == original
        assert (disk.dirty_bytes, server.written_bytes) == (0, 3 * 4096)
    assert server.errors == []


def test_each_connection_has_a_disk_that_goes_with_it(disk: Disk, base: Path) -> None:
    original = base.read_bytes()
    with NbdServer(disk, share="connection") as server:
        with client_of(server) as one, client_of(server) as other:
            one.write(b"mine", 0)
            assert other.read(4096, 0) == original[:4096]
            assert one.read(4, 0) == b"mine"
            assert not one.flags & CAN_MULTI_CONN
            assert server.written_bytes == 4096
        with client_of(server) as later:
            assert later.read(SIZE, 0) == original
            later.write(b"x" * 8192, 0)
        server.stop()
        assert server.written_bytes == 4096 + 8192, "what is gone counts, too"
    assert disk.pread(SIZE, 0) == original


@pytest.mark.parametrize("share", ["export", "connection"])
def test_what_the_servers_disk_was_written_is_not_in_theirs(disk: Disk, base: Path, share: str) -> None:
    disk.pwrite(b"the disk's own", 0)
    disk.checkpoint("point")
    with NbdServer(disk, share=share) as server, RawClient(where(server)) as client:  # type: ignore[arg-type]
        client.negotiate("structured", "qemu:dirty-bitmap:")
        assert list(client.contexts) == []
        assert client.read(SIZE, 0) == base.read_bytes()
        client.send(client.header(DISC))
        with client_of(server, "", "qemu:dirty-bitmap:cow") as again:
            assert again.block_status(SIZE, 0)["qemu:dirty-bitmap:cow"] == [(SIZE, 0)]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["all", "export", "connection"]),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, SIZE - 5000), st.integers(1, 5000)), max_size=12),
)
def test_who_sees_what_is_what_a_model_says(share: str, writes: list[tuple[int, int, int]]) -> None:
    """Clients 0 and 1 ask for one name, 2 and 3 for another where names count."""
    whose = {"all": [0, 0, 0, 0], "export": [0, 0, 1, 1], "connection": [0, 1, 2, 3]}[share]
    models = [bytearray(SIZE) for _ in range(4)]
    with Disk(ZeroBase(SIZE)) as disk, NbdServer(disk, share=share) as server:  # type: ignore[arg-type]
        names = ["a", "a", "b", "b"] if share == "export" else [""] * 4
        clients = [client_of(server, name) for name in names]
        for number, (who, offset, length) in enumerate(writes, 1):
            data = bytes([number]) * length
            clients[who].write(data, offset)
            models[whose[who]][offset : offset + length] = data
        for who, client in enumerate(clients):
            assert client.read(SIZE, 0) == models[whose[who]]
            client.close()


# What it costs, and its bounds


@pytest.mark.parametrize("share", ["export", "connection"])
def test_nothing_is_made_for_a_client_that_has_not_chosen(
    disk: Disk, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    with NbdServer(disk, share=share) as server:  # type: ignore[arg-type]
        make = server._shares._make

        def noticed() -> Disk:
            made.append(1)
            return make()

        monkeypatch.setattr(server._shares, "_make", noticed)
        with RawClient(where(server)) as client:
            client.greet()
            for _ in range(3):
                assert client.ask(INFO, infos("")) == ACK
                exports(client)
            assert (made, exports(client)) == ([], [""])
            client.go()
            client.read(1, 0)
            assert made == [1]


@pytest.mark.parametrize("share", ["export", "connection"])
def test_they_share_one_open_base(disk: Disk, share: str) -> None:
    with NbdServer(disk, share=share) as server:  # type: ignore[arg-type]
        first = client_of(server, "" if share == "connection" else "first")
        with first:
            first.read(1, 0)
            before = len(open_files())
            names = [""] * 8 if share == "connection" else [f"name {number}" for number in range(8)]
            clients = [client_of(server, name) for name in names]
            for client in clients:
                client.read(SIZE, 0)
            # Two descriptors for each connection, of which one is the client's
            assert len(open_files()) == before + 2 * len(clients)
            for client in clients:
                client.close()
    assert disk.pread(1, 0), "the base is still open"


def test_one_export_too_many_is_refused_and_those_there_are_go_on(disk: Disk) -> None:
    with NbdServer(disk, share="export", max_exports=2) as server, client_of(server, "a") as one:
        client_of(server, "b").close()
        with RawClient(where(server)) as late:
            late.greet()
            for asked in (INFO, GO):
                late.send(option(asked, infos("c")))
                ((_, kind, message),) = late.option_replies()
                assert (kind, message) == (POLICY, b"2 exports are in use, and there may be no more")
            assert exports(late) == ["", "a", "b"]
            late.go("b")
        with RawClient(where(server)) as old:
            old.greet()
            old.send(option(EXPORT_NAME, b"c"))
            assert old.at_end()
        assert one.read(1, 0) == disk.pread(1, 0)
    assert server.errors == []


def test_who_loses_the_race_for_the_last_export_is_hung_up_on(disk: Disk) -> None:
    with NbdServer(disk, share="export", max_exports=1) as server:
        export = server._shares.find("late")
        assert export is not None
        with client_of(server, "early") as early:
            original = server._shares.find
            server._shares.find = lambda name: export  # type: ignore[method-assign]
            with RawClient(where(server)) as late:
                late.greet()
                late.send(option(GO, infos("late")))
                assert late.at_end(), "and no ACK before"
            server._shares.find = original  # type: ignore[method-assign]
            assert early.read(1, 0) == disk.pread(1, 0)
    assert server.errors == []


def test_a_base_that_changed_is_told_by_the_disk_alone(base: Path) -> None:
    from cowkit.errors import BaseChangedError

    with pytest.raises(BaseChangedError), CowDisk(base) as disk:
        servers = [disk.serve(share=share) for share in ("export", "connection")]
        for server in servers:
            client_of(server).close()
        with base.open("r+b") as file:
            file.write(b"!")
        os.utime(base, ns=(1, 1))
        for server in servers:
            client_of(server).close()
            server.stop()
            assert server.errors == []


# Names, and read-only


def test_list_tells_of_each_export_with_its_description(disk: Disk) -> None:
    with NbdServer(disk, share="export", export_name="first", description="a disk to wreck") as server:
        for name in ("b", "a", "name of 4096 bytes".ljust(4096, "x")):
            client_of(server, name).close()
        with RawClient(where(server)) as client:
            client.greet()
            assert exports(client) == ["first", "b", "a", "name of 4096 bytes".ljust(4096, "x")]
            for name in ("first", "new"):
                client.send(option(INFO, infos(name, 1, 2)))
                told = {data[:2]: data[2:] for _, kind, data in client.option_replies() if kind == 3}
                assert (told[b"\0\1"], told[b"\0\2"]) == (name.encode(), b"a disk to wreck")


@pytest.mark.parametrize("share", ["all", "connection"])
def test_other_names_are_unknown_where_names_do_not_count(disk: Disk, share: str) -> None:
    with NbdServer(disk, share=share, export_name="disk") as server, RawClient(where(server)) as client:  # type: ignore[arg-type]
        client.greet()
        assert exports(client) == ["disk"]
        assert client.ask(INFO, infos("other")) == UNKNOWN
        client.go("disk")


@pytest.mark.parametrize("share", ["all", "export", "connection"])
def test_read_only_is_told_and_kept(disk: Disk, base: Path, share: str) -> None:
    with NbdServer(disk, share=share, read_only=True) as server, client_of(server) as client:  # type: ignore[arg-type]
        assert client.flags & READ_ONLY
        assert client.flags & (SEND_FLUSH | SEND_FUA | SEND_CACHE) == SEND_FLUSH | SEND_FUA | SEND_CACHE
        assert not client.flags & (SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO)
        for command in (WRITE, TRIM, WRITE_ZEROES):
            assert client.do(command, 0, 512, b"x" * 512 if command == WRITE else b"").error == EPERM
        assert client.read(SIZE, 0) == base.read_bytes()


def test_what_a_disk_is_made_like(base: Path) -> None:
    disk = Disk(FileBase(base), block_size=65536, size=SIZE + 5, cow_on_read=True)
    with disk, NbdServer(disk, share="connection") as server, client_of(server) as client:
        assert client.size == SIZE + 5
        assert client.read(1, 0) == base.read_bytes()[:1]
        assert server.written_bytes == 65536, "copied on read, in the same blocks"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"share": "some"}, "share is one of all, export, connection, not 'some'"),
        ({"share": "export", "max_exports": 0}, "a server of 0 exports serves nothing"),
        ({"max_exports": 5}, "a limit of 5 exports goes with a disk for each export name"),
        ({"share": "connection", "export_name": "x" * 5000}, "5000"),
    ],
)
def test_what_makes_no_sense(disk: Disk, options: dict[str, object], expected: str) -> None:
    before = open_files()
    with pytest.raises(UsageError, match=expected):
        NbdServer(disk, **options)  # type: ignore[arg-type]
    assert open_files() == before


def test_sizes_are_told_alike_before_and_after_a_disk_is_made(disk: Disk) -> None:
    with NbdServer(disk, share="export") as server, RawClient(where(server)) as client:
        client.greet()
        told = []
        for _ in range(2):
            client.send(option(INFO, infos("x", 3)))
            told.append(client.option_replies())
            client_of(server, "x").close()
        assert told[0] == told[1]
        assert struct.unpack(">HQH", told[0][0][2])[1] == SIZE
