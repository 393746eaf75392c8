"""TLS: who gets in, that nothing said in the clear counts, and that all goes on as without it."""

from __future__ import annotations

import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cowkit.disk import Disk, ZeroBase
from cowkit.errors import UsageError
from cowkit.server.server import NbdServer
from cowkit.server.tls import load_tls
from tests.server.certificates import Certificates, make_certificates, uri_with
from tests.server.negotiating import ABORT, ACK, GO, INVALID, LIST, STARTTLS, STRUCTURED_REPLY, TLS_REQD, infos, option
from tests.server.raw_client import EIO, READ, TIMEOUT, RawClient, where

pytestmark = pytest.mark.requires("openssl")

SIZE = 8 << 20


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return make_certificates(tmp_path / "certificates")


@contextmanager
def serving(disk: Disk, certificates: Certificates, **options: object) -> Iterator[NbdServer]:
    tls = load_tls(certs=certificates.server, **options)  # type: ignore[arg-type]
    with NbdServer(disk, tls=tls) as server:
        yield server
    assert server.errors == []


@pytest.fixture
def disk() -> Iterator[Disk]:
    with Disk(ZeroBase(SIZE)) as disk:
        yield disk


def client_context(certificates: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certificates / "ca-cert.pem"))
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # the end has to be told
    if (certificates / "client-cert.pem").exists():
        context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
    return context


class TlsClient(RawClient):
    """A raw client that can start TLS."""

    def start_tls(self, certificates: Path) -> None:
        assert self.ask(STARTTLS) == ACK
        context = client_context(certificates)
        self.sock = context.wrap_socket(self.sock, server_hostname="localhost", suppress_ragged_eofs=False)


def connect(uri: str, certificates: Path | None) -> Any:
    import nbd

    client = nbd.NBD()
    client.set_uri_allow_local_file(True)
    client.connect_uri(uri if certificates is None else uri_with(uri, certificates))
    return client


def assert_serves(server: NbdServer, certificates: Certificates) -> None:
    with TlsClient(where(server)) as client:
        client.greet()
        client.start_tls(certificates.client)
        client.go()
        assert client.read(1, SIZE - 1) == b"\0"


# Who gets in


@pytest.mark.requires(modules=["nbd"])
@pytest.mark.parametrize("host", [None, "127.0.0.1:0", "[::1]:0"])
def test_a_client_with_a_certificate_is_served_over_nbds(
    disk: Disk, certificates: Certificates, host: str | None
) -> None:
    tls = load_tls(certs=certificates.server, verify_peer=True)
    with NbdServer(disk, tcp=host, tls=tls) as server:
        assert server.uri.startswith("nbds+unix://" if host is None else "nbds://")
        client = connect(server.uri, certificates.client)
        assert client.get_tls_negotiated()
        data = os.urandom(5 << 20)
        client.pwrite(data, 1001)
        assert client.pread(len(data), 1001) == data == disk.pread(len(data), 1001)
        client.shutdown()
    assert server.errors == []


@pytest.mark.requires(modules=["nbd"])
@pytest.mark.parametrize("who", ["nameless", "revoked", "foreign"])
def test_a_client_without_a_good_certificate_is_refused_and_others_are_served(
    disk: Disk, certificates: Certificates, who: str
) -> None:
    import nbd

    with serving(disk, certificates, verify_peer=True) as server:
        with pytest.raises(nbd.Error):
            connect(server.uri, getattr(certificates, who))
        assert_serves(server, certificates)


@pytest.mark.requires(modules=["nbd"])
def test_without_verification_a_client_needs_no_certificate(disk: Disk, certificates: Certificates) -> None:
    with serving(disk, certificates) as server:
        client = connect(server.uri, certificates.nameless)
        assert client.get_tls_negotiated()
        client.shutdown()


@pytest.mark.requires(modules=["nbd"])
def test_in_the_clear_nobody_is_served_where_tls_is_required_and_anybody_where_it_is_on(
    disk: Disk, certificates: Certificates
) -> None:
    import nbd

    with serving(disk, certificates) as server:
        with pytest.raises(nbd.Error, match="requires TLS"):
            connect(server.uri.replace("nbds", "nbd"), None)
        with RawClient(where(server)) as client:
            client.greet()
            for number, data in ((LIST, b""), (STRUCTURED_REPLY, b""), (GO, infos(""))):
                assert client.ask(number, data) == TLS_REQD
    with serving(disk, certificates, choice="on") as server:
        for uri, credentials in ((server.uri.replace("nbds", "nbd"), None), (server.uri, certificates.client)):
            served = connect(uri, credentials)
            assert served.get_tls_negotiated() == (credentials is not None)
            assert served.pread(3, 0) == bytes(3)
            served.shutdown()


@pytest.mark.requires("qemu-img")
def test_qemu_reads_and_writes_with_its_own_credentials(disk: Disk, certificates: Certificates, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(SIZE))
    with serving(disk, certificates, verify_peer=True) as server:
        options = (
            *("--object", f"tls-creds-x509,id=tls,endpoint=client,dir={certificates.client}", "--image-opts"),
            *("-n", "--target-image-opts"),
        )
        served = f"driver=nbd,path={server.socket},tls-creds=tls,tls-hostname=localhost"
        file = f"driver=file,filename={image}"
        qemu = subprocess.run(
            ["qemu-img", "convert", *options, file, served], capture_output=True, text=True, check=False
        )
        assert qemu.returncode == 0, qemu.stderr
        assert disk.pread(SIZE, 0) == image.read_bytes()


@pytest.mark.requires("nbdcopy")
def test_nbdcopy_both_ways_with_several_connections(disk: Disk, certificates: Certificates, tmp_path: Path) -> None:
    image, back = tmp_path / "image", tmp_path / "back"
    image.write_bytes(os.urandom(SIZE))
    with serving(disk, certificates, verify_peer=True) as server:
        uri = uri_with(server.uri, certificates.client)
        subprocess.run(["nbdcopy", "-C", "4", image, uri], check=True)
        subprocess.run(["nbdcopy", "-C", "4", uri, back], check=True)
    assert back.read_bytes() == image.read_bytes() == disk.pread(SIZE, 0)


# What is said in the clear


def test_nothing_said_before_tls_counts_behind_it(disk: Disk, certificates: Certificates) -> None:
    """nbdkit kept structured replies: CVE-2021-3716."""
    with serving(disk, certificates, choice="on") as server, TlsClient(where(server)) as client:
        client.greet()
        assert client.ask(STRUCTURED_REPLY) == ACK
        client.start_tls(certificates.client)
        client.go()
        assert client.read(5, 0) == bytes(5)  # in a simple reply


def test_bytes_in_the_clear_behind_starttls_end_the_connection(disk: Disk, certificates: Certificates) -> None:
    with serving(disk, certificates) as server:
        with RawClient(where(server)) as client:
            client.greet()
            client.send(option(STARTTLS) + option(GO, infos("")))
            received = b""
            try:
                while more := client.sock.recv(100):
                    received += more
            except ConnectionResetError:
                pass
            assert len(received) in (0, 20), "no answer but that to STARTTLS"
        assert_serves(server, certificates)


@pytest.mark.parametrize(
    "hello", [b"\0" * 100, b"\x16\x03\x01\x40\x00" + b"x" * 20000, b"IHAVEOPT\0\0\0\7\0\0\0\0", b""]
)
def test_a_handshake_that_goes_wrong_ends_that_connection_alone(
    disk: Disk, certificates: Certificates, hello: bytes
) -> None:
    with serving(disk, certificates) as server:
        with RawClient(where(server)) as client:
            client.greet()
            assert client.ask(STARTTLS) == ACK
            client.send(hello)
            client.sock.shutdown(socket.SHUT_WR)
            try:
                while client.sock.recv(100):
                    pass  # an alert
            except ConnectionResetError:
                pass
        assert_serves(server, certificates)


def test_garbage_within_tls_ends_that_connection_alone(disk: Disk, certificates: Certificates) -> None:
    with serving(disk, certificates) as server:
        for rounds in range(2):
            with TlsClient(where(server)) as client:
                client.greet()
                client.start_tls(certificates.client)
                if rounds:
                    client.go()
                raw = socket.socket(fileno=os.dup(client.sock.fileno()))
                raw.sendall(b"\x17\x03\x03\0\x20" + b"x" * 32)
                raw.close()
                with pytest.raises(ssl.SSLError):
                    client.sock.recv(1)
        assert_serves(server, certificates)


def test_starttls_within_tls_is_refused(disk: Disk, certificates: Certificates) -> None:
    with serving(disk, certificates) as server, TlsClient(where(server)) as client:
        client.greet()
        client.start_tls(certificates.client)
        assert client.ask(STARTTLS) == INVALID
        client.go()


def test_the_end_is_told_within_tls(disk: Disk, certificates: Certificates) -> None:
    with serving(disk, certificates) as server, TlsClient(where(server)) as client:
        client.greet()
        client.start_tls(certificates.client)
        assert client.ask(ABORT) == ACK
        assert client.sock.recv(1) == b"", "without close_notify this is an SSLEOFError"


# The server's end


@pytest.mark.parametrize("how_far", ["greeted", "acknowledged", "in the handshake", "in tls", "in transmission"])
def test_stop_waits_for_no_client_wherever_it_is(disk: Disk, certificates: Certificates, how_far: str) -> None:
    with serving(disk, certificates) as server, TlsClient(where(server)) as client:
        client.greet()
        if how_far == "acknowledged":
            assert client.ask(STARTTLS) == ACK
        elif how_far == "in the handshake":
            assert client.ask(STARTTLS) == ACK
            client.send(b"\x16\x03\x01\x02")
        elif how_far != "greeted":
            client.start_tls(certificates.client)
            if how_far == "in transmission":
                client.go()
        server.stop()
        assert server.connections == 0


def test_stop_waits_for_no_client_that_does_not_read(disk: Disk, certificates: Certificates) -> None:
    with serving(disk, certificates) as server, TlsClient(where(server)) as client:
        client.greet()
        client.start_tls(certificates.client)
        client.go()
        disk.pwrite(b"x" * SIZE, 0)
        for _ in range(4):
            client.send(client.request(READ, 0, SIZE)[1])
        assert client.take(16)
        server.stop()


def test_a_client_that_takes_too_long_in_the_handshake_is_given_up(disk: Disk, certificates: Certificates) -> None:
    tls = load_tls(certs=certificates.server)
    with NbdServer(disk, tls=tls, handshake_seconds=0.3) as server, RawClient(where(server)) as client:
        try:
            client.greet()
            client.ask(STARTTLS)
            client.send(b"\x16")
        except ConnectionError:
            pass  # so slow is the machine now that it was given up before
        assert client.at_end()
    assert server.errors == []


# Data


@pytest.mark.parametrize("dialect", ["simple", "structured", "extended"])
def test_a_disk_over_tls_is_what_a_model_says(disk: Disk, certificates: Certificates, dialect: str) -> None:
    model = bytearray(SIZE)
    chance = random.Random(dialect)
    with serving(disk, certificates) as server, TlsClient(where(server)) as client:
        client.greet()
        client.start_tls(certificates.client)
        client.extended, client.structured = dialect == "extended", dialect != "simple"
        if client.structured:
            assert client.ask(11 if client.extended else STRUCTURED_REPLY) == ACK
        client.go()
        for _ in range(40):
            length = chance.choice((1, 511, 4096, 16384, 16385, 100_000, 3 << 20))
            offset = chance.randrange(SIZE - length)
            if chance.random() < 0.5:
                data = chance.randbytes(length)
                client.write(data, offset)
                model[offset : offset + length] = data
            else:
                assert client.read(length, offset) == model[offset : offset + length]
        # Many requests at once come in many records, and go out in others
        wanted = [chance.randrange(SIZE - 5000) for _ in range(600)]
        asked = {}
        sending = b""
        for offset in wanted:
            cookie, request = client.request(READ, offset, 5000)
            asked[cookie] = offset
            sending += request
        client.send(sending)
        for _ in wanted:
            reply = client.reply()
            offset = asked.pop(reply.cookie)
            assert reply.data == model[offset : offset + 5000]
        assert client.read(SIZE, 0) == model


@pytest.mark.parametrize("structured", [False, True])
def test_a_base_that_was_cut_short_is_an_error_and_not_the_end_of_the_process(
    certificates: Certificates, tmp_path: Path, structured: bool
) -> None:
    """In a process of its own, which a SIGBUS would end."""
    base = tmp_path / "base"
    base.write_bytes(os.urandom(SIZE))
    code = (
        "import sys; from cowkit import CowDisk; disk = CowDisk(sys.argv[1]); "
        "server = disk.serve(tls_certs=sys.argv[2]); print(server.socket, flush=True); sys.stdin.read(); "
        "server.stop(); assert server.errors == [], server.errors\n"
        "try: disk.close()\nexcept Exception as error: assert 'changed while it was in use' in str(error)"
    )
    command = [sys.executable, "-c", code, str(base), str(certificates.server)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdin
        path = process.stdout.readline().strip()
        with TlsClient(path) as client, TlsClient(path) as other:
            for each in (client, other):
                each.greet()
                each.start_tls(certificates.client)
                each.structured = structured
                if structured:
                    assert each.ask(STRUCTURED_REPLY) == ACK
                each.go()
            kept = client.read(4096, 0)
            os.truncate(base, 4096)
            cookies = [client.request(READ, offset, 4096) for offset in (0, 8192, 0)]
            client.send(b"".join(request for _, request in cookies))
            found = [client.reply() if structured or index != 1 else simple_error(client) for index in range(3)]
            assert [reply if isinstance(reply, int) else reply.error for reply in found] == [0, EIO, 0]
            assert client.read(4096, 0) == kept
            # A megabyte goes out at once, and the head of what cannot be read would just have had a place in the first one
            before = 254 if structured else 255
            requests = [client.request(READ, 0, 4096)[1] for _ in range(before)]
            client.send(b"".join([*requests, client.request(READ, 8192, 4096)[1]]))
            assert [client.reply().data for _ in range(before)] == [kept] * before
            assert (client.reply().error if structured else simple_error(client)) == EIO
            # More than goes out at once: part of the data is on its way when it turns out that the rest is not there
            other.send(other.request(READ, 0, SIZE)[1])
            with pytest.raises((ConnectionError, ssl.SSLError)):
                other.reply()
            client.write(b"!" * 4096, 8192)
            assert [client.read(4096, 0), client.read(4096, 8192)] == [kept, b"!" * 4096]
        assert process.communicate(timeout=TIMEOUT)[0] == ""
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def simple_error(client: RawClient) -> int:
    magic, error = client.take(4), client.take(4)
    assert magic == b"\x67\x44\x66\x98"
    client.take(8)
    return int.from_bytes(error)


def test_tls_gives_back_its_descriptors(disk: Disk, certificates: Certificates) -> None:
    with serving(disk, certificates) as server:
        assert_serves(server, certificates)
        threads = [thread for thread in threading.enumerate() if thread.name == "cowkit-client"]
        for thread in threads:
            thread.join(TIMEOUT)
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(5):
            assert_serves(server, certificates)
        for thread in [thread for thread in threading.enumerate() if thread.name == "cowkit-client"]:
            thread.join(TIMEOUT)
        assert len(os.listdir("/proc/self/fd")) <= len(before)


# What makes no sense


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-cert.pem"])
def test_a_missing_file_is_named(certificates: Certificates, name: str) -> None:
    (certificates.server / name).unlink()
    with pytest.raises(UsageError, match=f"cannot read .*/{name}, which TLS needs: No such file or directory"):
        load_tls(certs=certificates.server, verify_peer=True)


def test_without_verification_the_authority_may_be_missing(certificates: Certificates) -> None:
    (certificates.server / "ca-cert.pem").unlink()
    assert load_tls(certs=certificates.server).mode == "require"


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-cert.pem", "ca-crl.pem"])
@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_file_that_is_no_good_is_named(certificates: Certificates, name: str, content: bytes) -> None:
    (certificates.server / name).write_bytes(content)
    with pytest.raises(UsageError, match=name) as caught:
        load_tls(certs=certificates.server, verify_peer=True)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_not_the_certificates_is_said_so(certificates: Certificates) -> None:
    shutil.copy(certificates.client / "client-key.pem", certificates.server / "server-key.pem")
    with pytest.raises(UsageError, match="are no certificate with its key: key values mismatch"):
        load_tls(certs=certificates.server)


def test_a_key_with_a_password_is_said_so_instead_of_asking_for_it(certificates: Certificates) -> None:
    key = certificates.server / "server-key.pem"
    command = ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", f"{key}.new"]
    subprocess.run(command, check=True, capture_output=True)
    os.replace(f"{key}.new", key)
    with pytest.raises(UsageError, match=f"the key in {key} has a password"):
        load_tls(certs=certificates.server)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "TLS needs the server's credentials"),
        ({"choice": "on"}, "TLS needs the server's credentials"),
        ({"verify_peer": True}, "verifying clients needs the server's credentials"),
        ({"certs": "x", "psk": "y"}, "give one of the two"),
        ({"psk": "x", "verify_peer": True}, "there is no certificate of the client's to verify"),
        ({"certs": "x", "choice": "maybe"}, "TLS is one of on, require, not 'maybe'"),
    ],
)
def test_arguments_that_do_not_go_together(options: dict[str, object], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        load_tls(**options)  # type: ignore[arg-type]


# Pre-shared keys

_HAS_PSK = hasattr(ssl.SSLContext, "set_psk_server_callback")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.psk"
    path.write_text(f"# made by a test\nalice:{os.urandom(32).hex()}\nbob:{os.urandom(32).hex()}\n")
    return path


@pytest.mark.skipif(_HAS_PSK, reason="this Python has pre-shared keys")
def test_pre_shared_keys_on_an_old_python_say_what_they_need(keys: Path) -> None:
    with pytest.raises(UsageError, match=r"need Python 3\.13 or newer"):
        load_tls(psk=keys)


@pytest.mark.skipif(not _HAS_PSK, reason="this Python has no pre-shared keys")
@pytest.mark.requires("nbdinfo")
def test_who_has_a_pre_shared_key_gets_in_and_nobody_else(disk: Disk, keys: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.psk"
    wrong.write_text(f"alice:{os.urandom(32).hex()}\neve:{os.urandom(32).hex()}\n")
    with NbdServer(disk, tcp="127.0.0.1:0", tls=load_tls(psk=keys)) as server:

        def size(name: str, path: Path) -> str:
            uri = f"{server.uri.replace('://', f'://{name}@')}?tls-psk-file={path}"
            return subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, check=False).stdout

        assert [size("alice", keys), size("bob", keys)] == [f"{SIZE}\n"] * 2
        assert [size("alice", wrong), size("eve", wrong)] == ["", ""]
    assert server.errors == []


@pytest.mark.skipif(not _HAS_PSK, reason="this Python has no pre-shared keys")
@pytest.mark.parametrize("content", ["", "alice", "alice:", "alice:xyz", ":1234", "alice:123"])
def test_a_file_without_keys_is_said_so(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.psk"
    path.write_text(content)
    with pytest.raises(UsageError, match=str(path)):
        load_tls(psk=path)
    with pytest.raises(UsageError, match="cannot read"):
        load_tls(psk=tmp_path / "none")
