"""Where a server listens, pipes, activated sockets, and clients that connect and stay silent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowkit.disk import Disk, ZeroBase
from cowkit.errors import ListenError
from cowkit.server.listener import uri_of
from cowkit.server.pipes import PipeStream
from cowkit.server.server import NbdServer
from tests.server.negotiating import ABORT, ACK, INFO, LIST, infos
from tests.server.raw_client import DISC, READ, TIMEOUT, RawClient, assert_serves, where

SIZE = 1 << 20


@pytest.fixture
def disk() -> Iterator[Disk]:
    with Disk(ZeroBase(SIZE)) as disk:
        yield disk


def address(uri: str) -> tuple[str, int]:
    host, _, port = uri.removeprefix("nbd://").rpartition(":")
    return host.strip("[]"), int(port)


# Where it listens


def test_tcp_without_a_host_is_the_loopback_address(disk: Disk) -> None:
    for where_to in ("0", ":0"):
        with NbdServer(disk, tcp=where_to) as server, RawClient(address(server.uri)) as client:
            assert address(server.uri)[0] == "127.0.0.1"
            assert client.negotiate().size == SIZE
            assert server.socket is None


@pytest.mark.requires(modules=["nbd"])
def test_ipv6_has_its_uri_in_brackets(disk: Disk) -> None:
    import nbd

    with NbdServer(disk, tcp="[::1]:0", export_name="an export") as server:
        assert server.uri.startswith("nbd://[::1]:")
        assert server.uri.endswith("/an%20export")
        client = nbd.NBD()
        client.connect_uri(server.uri)
        assert client.get_size() == SIZE
        client.shutdown()


def test_one_server_listens_in_several_places(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with NbdServer(disk, tcp="127.0.0.1:0", socket_path=path) as server:
        assert [uri.partition(":")[0] for uri in server.uris] == ["nbd+unix", "nbd"]
        with RawClient(str(path)) as one, RawClient(address(server.uris[1])) as other:
            one.negotiate().write(b"here and there", 5)
            assert other.negotiate().read(14, 5) == b"here and there"
            assert server.connections == 2
    assert not path.exists()


def test_where_one_place_cannot_be_had_the_others_are_given_up(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with NbdServer(disk, tcp="127.0.0.1:0") as server:
        port = address(server.uri)[1]
        with pytest.raises(
            ListenError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another"
        ):
            NbdServer(disk, socket_path=path, tcp=f"127.0.0.1:{port}")
    assert not path.exists()


def test_vsock_is_served_or_its_lack_is_said(disk: Disk) -> None:
    if not os.path.exists("/dev/vsock"):
        with pytest.raises(ListenError, match="cannot listen on vsock port 0: "):
            NbdServer(disk, vsock=0)
        return
    with NbdServer(disk, vsock=0) as server:
        cid, _, port = server.uri.removeprefix("nbd+vsock://").removesuffix("/").partition(":")
        assert int(cid) >= 2
        with socket.socket(socket.AF_VSOCK) as sock:
            sock.settimeout(0.3)
            try:
                sock.connect((1, int(port)))
            except OSError:
                return  # without vsock_loopback, only a guest or the host could connect
            with RawClient(sock) as client:
                assert client.negotiate().size == SIZE


@pytest.mark.parametrize("port", [-1, 2**32 - 1, 2**70])
def test_a_port_that_is_none_for_vsock_is_said_so(disk: Disk, port: int) -> None:
    with pytest.raises(ListenError, match=f"{port} is no vsock port"):
        NbdServer(disk, vsock=port)


def test_a_kernel_without_vsock_is_said_so(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "AF_VSOCK", 12345)
    with pytest.raises(ListenError, match=r"this kernel has no vsock .*; modprobe vsock may bring it"):
        NbdServer(disk, vsock=5)


def test_a_socket_without_a_file_has_no_uri_and_is_served_all_the_same(disk: Disk) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(b"\0cowkit-test-%d" % os.getpid())
    listener.listen()
    name = listener.getsockname()
    with NbdServer(disk, listeners=[listener]) as server:
        assert server.uris == ()
        with pytest.raises(ListenError, match="listens on nothing that an NBD URI can tell"):
            server.uri  # noqa: B018
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(name)
        with RawClient(sock) as client:
            assert client.negotiate().size == SIZE


def test_a_listener_that_was_given_is_not_shut_down_for_others(disk: Disk, tmp_path: Path) -> None:
    """The activator has it, too, and starts the program anew for the next client."""
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as kept:
        kept.bind(path)
        kept.listen()
        for _ in range(2):
            with NbdServer(disk, listeners=[kept.dup()]) as server:
                assert server.uri == uri_of(kept, "")
                with RawClient(path) as client:
                    client.negotiate()
        assert os.path.exists(path)


def test_only_its_own_socket_file_is_removed(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    server = NbdServer(disk, socket_path=path)
    path.unlink()
    path.write_text("another's")
    server.stop()
    assert path.read_text() == "another's"


# Clients that connect and stay silent


def test_a_client_that_does_not_choose_is_given_up_and_one_that_did_is_not(disk: Disk) -> None:
    with NbdServer(disk) as server, RawClient(where(server)) as served:
        served.negotiate()
        server._handshake_seconds = 0.2
        with RawClient(where(server)) as silent, RawClient(where(server)) as talker:
            silent.take(18)
            assert silent.at_end()
            try:  # asking for this and that does not count
                talker.greet()
                while True:
                    assert talker.ask(INFO, infos("")) == ACK
            except OSError:
                pass
        server._handshake_seconds = 60
        assert served.read(1, 0) == b"\0"
        assert_serves(server)


def test_when_very_many_stay_silent_the_oldest_has_to_go(disk: Disk) -> None:
    with NbdServer(disk, most_negotiating=4) as server:
        chosen = RawClient(where(server)).negotiate()
        silent = []
        for _ in range(10):  # each is greeted before the next one comes: the oldest may have to go before it is
            silent.append(RawClient(where(server)))
            silent[-1].take(18)
        for client in silent[:6]:
            assert client.at_end()
        assert_serves(server)
        assert silent[6].at_end()
        assert chosen.read(1, 0) == b"\0"
        assert len([each for each in threading.enumerate() if each.name == "cowkit-client"]) <= 5
        for client in silent[7:]:
            client.send(b"\0\0\0\3")
            assert client.ask(LIST) == ACK
        for client in (*silent, chosen):
            client.close()


def test_a_server_that_stops_waits_for_no_silent_client(disk: Disk) -> None:
    with NbdServer(disk) as server, RawClient(where(server)) as client:
        client.take(18)
        server.stop()
        assert client.at_end()


# Pipes


@pytest.fixture
def piped(disk: Disk) -> Iterator[tuple[NbdServer, int, int, threading.Event]]:
    """A server whose client is at two pipes: where that writes and where it reads."""
    receive, theirs = os.pipe()
    ours, send = os.pipe()
    ended = threading.Event()
    with NbdServer(disk) as server:
        server.adopt(PipeStream(receive, send), on_end=ended.set)
        os.close(receive)
        os.close(send)
        yield server, theirs, ours, ended
    for fd in (theirs, ours):
        try:
            os.close(fd)
        except OSError:
            pass
    assert server.errors == []


class PipeClient(RawClient):
    """A raw client at two pipes."""

    def __init__(self, send: int, receive: int) -> None:
        ours, theirs = socket.socketpair()
        super().__init__(ours)
        self._theirs = theirs
        self._send_to, self._receive_from = send, receive

    def send(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._send_to, data) :]

    def take(self, length: int) -> bytes:
        found = b""
        while len(found) < length:
            more = os.read(self._receive_from, length - len(found))
            if not more:
                raise ConnectionError("the server hung up")
            found += more
        return found

    def at_end(self) -> bool:
        return os.read(self._receive_from, 1) == b""

    def close(self) -> None:
        super().close()
        self._theirs.close()


Piped = tuple[NbdServer, int, int, threading.Event]


@pytest.mark.parametrize("dialect", ["simple", "structured", "extended"])
def test_a_client_at_two_pipes_is_served(piped: Piped, disk: Disk, dialect: str) -> None:
    server, send, receive, ended = piped
    with PipeClient(send, receive) as client:
        client.negotiate(dialect)  # type: ignore[arg-type]
        data = os.urandom(300_000)  # several times what a pipe holds
        client.write(data, 77)
        assert client.read(len(data), 77) == data == disk.pread(len(data), 77)
        assert_serves(server)
        assert not ended.is_set()
        client.send(client.header(DISC))
        assert client.at_end()
    assert ended.wait(TIMEOUT)
    assert server.connections == 0


def test_a_pipes_end_is_the_clients(piped: Piped) -> None:
    _, send, _, ended = piped
    os.close(send)
    assert ended.wait(TIMEOUT)


def test_a_pipe_that_nobody_reads_any_more_is_the_clients_end(piped: Piped) -> None:
    _, send, receive, ended = piped
    with PipeClient(send, receive) as client:
        client.negotiate()
        os.close(receive)
        client.send(client.request(READ, 0, SIZE)[1])
        assert ended.wait(TIMEOUT)


@pytest.mark.parametrize("how", ["waits for the client", "waits for the client to read"])
def test_stop_waits_for_no_client_at_pipes(piped: Piped, disk: Disk, how: str) -> None:
    server, send, receive, ended = piped
    with PipeClient(send, receive) as client:
        client.negotiate()
        if how != "waits for the client":
            disk.pwrite(b"x" * SIZE, 0)
            client.send(client.request(READ, 0, SIZE)[1])
            client.take(16)
        server.stop()
        assert ended.is_set()


def test_a_patient_client_has_all_the_time_it_wants(disk: Disk) -> None:
    ours, theirs = socket.socketpair()
    with NbdServer(disk, handshake_seconds=0.01) as server:
        server.adopt(theirs, on_end=lambda: None)
        with RawClient(ours) as client, RawClient(where(server)) as other:
            assert other.take(18)
            assert other.at_end()
            client.greet()
            assert client.ask(ABORT) == ACK


# Sockets that were handed over

_LISTEN = (
    "import os, sys; from cowkit.server.activation import activated_listeners\n"
    "try: found = activated_listeners()\n"
    "except Exception as error: print(type(error).__name__, error); sys.exit()\n"
    "print([(each.fileno(), each.get_inheritable(), each.family.name) for each in found], [k for k in os.environ if 'LISTEN' in k])\n"
    "for each in found: each.close()"
)


def activated(count: str | None, *files: int, pid: str = "$$") -> str:
    """What a program says that is started with descriptors from 3 on."""
    script = [f"exec {number}<&{fd}" for number, fd in enumerate(files, 3)]
    if count is not None:
        script.append(f"export LISTEN_FDS={count} LISTEN_PID={pid} LISTEN_FDNAMES=a:b")
    script.append('exec "$0" -c "$1"')
    # The descriptors must not be among those that the shell is to make of them
    done = subprocess.run(
        ["bash", "-c", "\n".join(script), sys.executable, _LISTEN],
        pass_fds=files,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def high(sock: socket.socket) -> int:
    """A copy of its descriptor, with a number over those that are handed over."""
    import fcntl

    return fcntl.fcntl(sock, fcntl.F_DUPFD, 100)


def test_activated_sockets_are_taken_and_not_passed_on() -> None:
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        for sock in (tcp, unix):
            if sock.family == socket.AF_INET:
                sock.bind(("127.0.0.1", 0))
            else:
                sock.bind(b"\0cowkit-activated-%d" % os.getpid())
            sock.listen()
        files = [high(tcp), high(unix)]
        try:
            assert activated("2", *files) == "[(3, False, 'AF_INET'), (4, False, 'AF_UNIX')] []"
            assert activated("0", *files) == "[] []"
            assert activated("2", *files, pid="1") == "[] ['LISTEN_FDS', 'LISTEN_PID', 'LISTEN_FDNAMES']"
            assert activated(None, *files) == "[] []"
        finally:
            for fd in files:
                os.close(fd)


def test_what_is_handed_over_and_makes_no_sense_is_one_clear_line(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as plain, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        datagram.bind(b"\0cowkit-datagram-%d" % os.getpid())
        files = [high(plain), high(datagram), os.open(tmp_path, os.O_RDONLY)]
        try:
            for fd in files[:2]:
                said = activated("1", fd)
                assert said.startswith(
                    "ListenError descriptor 3, handed over by LISTEN_FDS, is no listening stream socket: "
                )
            assert "is no socket: " in activated("1")
            assert activated("many").startswith("ListenError LISTEN_FDS='many' is no number of sockets")
        finally:
            for fd in files:
                os.close(fd)
