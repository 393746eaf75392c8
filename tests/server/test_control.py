"""The control socket, driven by QEMU's own QMP clients, by cowkit's, and by hostile ones."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from cowkit.errors import ControlError, ListenError
from cowkit.server.control import Command, CommandContext, ControlServer
from cowkit.server.control_client import ControlClient
from cowkit.server.qmp import Argument

PATIENCE = 30
HELLO = b'{"execute": "qmp_capabilities"}'


class Commands:
    """Commands of every sort, with what the test needs to know of them."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.release = threading.Event()
        self.ended = threading.Event()
        self.stopping = threading.Event()

    def echo(self, context: CommandContext, arguments: dict[str, Any]) -> Any:
        return arguments

    def refuse(self, context: CommandContext, arguments: dict[str, Any]) -> Any:
        raise ControlError("not today")

    def crash(self, context: CommandContext, arguments: dict[str, Any]) -> Any:
        return 1 // len("")

    def unspeakable(self, context: CommandContext, arguments: dict[str, Any]) -> Any:
        return object()

    def long(self, context: CommandContext, arguments: dict[str, Any]) -> Any:
        """Runs until it is released or cancelled."""
        context.emit("STARTED", {})
        self.started.set()
        try:
            while not self.release.wait(0.005):
                context.check()
            return "done"
        finally:
            self.ended.set()

    def count(self, context: CommandContext, arguments: dict[str, Any]) -> Any:
        for number in range(arguments["to"]):
            context.emit("COUNTED", {"number": number})
        return arguments["to"]

    def table(self) -> dict[str, Command]:
        return {
            "echo": Command(self.echo, {"text": Argument(str), "size": Argument(int, required=False)}),
            "refuse": Command(self.refuse),
            "crash": Command(self.crash),
            "unspeakable": Command(self.unspeakable),
            "long": Command(self.long),
            "count": Command(self.count, {"to": Argument(int)}),
        }


@pytest.fixture
def commands() -> Commands:
    return Commands()


@pytest.fixture
def path() -> Iterator[Path]:
    # pytest's own directory may leave no room for a socket's path
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="cowkit-test-") as made:
        yield Path(made) / "control.sock"


@pytest.fixture
def server(path: Path, commands: Commands) -> Iterator[ControlServer]:
    threads = set(threading.enumerate())
    descriptors = len(os.listdir("/proc/self/fd"))
    with ControlServer(path, commands.table(), version="1.2.3") as made:
        yield made
        commands.release.set()
    assert not path.exists()
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


class Raw:
    """A client that says exactly what it is told to."""

    def __init__(self, path: Path, *, negotiate: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(os.fspath(path))
        self.file = self.socket.makefile("rb")
        assert "QMP" in self.read()
        if negotiate:
            self.send(HELLO)
            assert self.read() == {"return": {}}

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> dict[str, Any]:
        line = self.file.readline()
        return dict(json.loads(line)) if line else {}


# QEMU's clients


def test_the_qemu_package_drives_it(server: ControlServer, path: Path) -> None:
    async def drive() -> None:
        client = QMPClient("test")
        await client.connect(os.fspath(path))
        assert client.greeting is not None
        assert client.greeting.QMP.version["package"] == "cowkit 1.2.3"
        assert await client.execute("echo", {"text": "\udce9ü", "size": 2**70}) == {"text": "\udce9ü", "size": 2**70}
        with pytest.raises(ExecuteError, match="not today") as refused:
            await client.execute("refuse")
        assert refused.value.error_class == "GenericError"
        with pytest.raises(ExecuteError) as unknown:
            await client.execute("nonsense")
        assert unknown.value.error_class == "CommandNotFound"
        names = [command["name"] for command in await client.execute("query-commands")]  # type: ignore[attr-defined]
        assert {"echo", "long", "query-version"} <= set(names)
        with client.listener() as events:
            server.emit("SHUTDOWN", {"guest": False})
            event = await asyncio.wait_for(events.get(), PATIENCE)
            assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": False})
        await client.disconnect()

    asyncio.run(drive())


def test_qmp_shell_drives_it(server: ControlServer, path: Path, tmp_path: Path) -> None:
    shell = shutil.which("qmp-shell", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shell is not None, "it comes with qemu.qmp"
    done = subprocess.run(
        [shell, path],
        input="query-commands\necho text=hello size=4\nrefuse\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert "Connected to QEMU 1.2.3" in done.stdout
    assert '"text": "hello"' in done.stdout
    assert "not today" in done.stdout


# cowkit's own client


def test_our_client_gets_results_events_and_errors(server: ControlServer, path: Path) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    with ControlClient(path) as client:
        assert client.execute("count", {"to": 100}, on_event=lambda *event: seen.append(event)) == 100
        assert client.execute("echo", {"text": "x" * 500_000}) == {"text": "x" * 500_000}
        with pytest.raises(ControlError, match=r"^not today$"):
            client.execute("refuse")
        with pytest.raises(ControlError, match="Parameter 'text' is missing"):
            client.execute("echo")
    assert seen == [("COUNTED", {"number": number}) for number in range(100)]


def test_an_answer_may_be_far_longer_than_a_request(path: Path) -> None:
    large = ["x" * 1000] * 20_000
    with (
        ControlServer(path, {"large": Command(lambda context, arguments: large)}, version="1"),
        ControlClient(path) as client,
    ):
        assert client.execute("large") == large


def test_a_mistake_in_a_command_is_answered_and_kept_for_the_owner(server: ControlServer, path: Path) -> None:
    with ControlClient(path) as client:
        for command, what in (("crash", "ZeroDivisionError"), ("unspeakable", "TypeError")):
            with pytest.raises(ControlError, match=f"internal error in {command}: {what}"):
                client.execute(command)
        assert client.execute("echo", {"text": "on"}) == {"text": "on"}
    assert [type(error) for error in server.errors] == [ZeroDivisionError, TypeError]


def test_nobody_at_the_path_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"cannot reach a server at .*none: No such file or directory"):
        ControlClient(tmp_path / "none")
    with pytest.raises(ControlError, match=r"cannot reach a server at .*: AF_UNIX path too long"):
        ControlClient(tmp_path / ("x" * 200))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"", "ended before it answered"),
        (b"SSH-2.0\n{", "does not speak QMP"),
        (b'{"hello": 1}\n', "does not speak QMP"),
        (b"[]", "does not speak QMP"),
        (b'{"QMP": {}}', "ended before it answered"),
        (None, "does not answer"),
    ],
)
def test_something_else_at_the_path_is_a_clear_error(path: Path, said: bytes | None, expected: str) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(os.fspath(path))
        other.listen()

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.settimeout(PATIENCE)
                if said is not None:
                    connection.sendall(said)
                    connection.shutdown(socket.SHUT_WR)
                while connection.recv(1000):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ControlError, match=expected):
            ControlClient(path, timeout=PATIENCE if said is not None else 0.05)
        thread.join()


def test_no_socket_can_be_had_twice_at_one_path(server: ControlServer, path: Path) -> None:
    with pytest.raises(ListenError, match=r"cannot listen for control at .*: Address already in use"):
        ControlServer(path, {}, version="1").start()
    with pytest.raises(ListenError, match="path too long"):
        ControlServer(path / ("x" * 100), {}, version="1").start()


# Order, and long commands


def test_answers_come_in_the_order_of_the_commands(server: ControlServer, path: Path, commands: Commands) -> None:
    with Raw(path) as client:
        client.send(
            b'{"execute": "long", "id": 0}{"execute": "query-version", "id": 1} nonsense\n{"execute": "nix", "id": 2}'
        )
        assert client.read()["event"] == "STARTED"
        commands.release.set()
        assert client.read() == {"return": "done", "id": 0}
        assert client.read()["id"] == 1
        assert "JSON parse error" in client.read()["error"]["desc"]
        assert client.read()["id"] == 2


def test_a_thousand_commands_at_once_are_all_answered(server: ControlServer, path: Path) -> None:
    with Raw(path) as client:
        client.send(
            b"".join(b'{"execute": "echo", "arguments": {"text": ""}, "id": %d}' % number for number in range(1000))
        )
        assert [client.read()["id"] for _ in range(1000)] == list(range(1000))


def test_a_long_command_holds_up_no_other_client_and_no_event(
    server: ControlServer, path: Path, commands: Commands
) -> None:
    with Raw(path) as busy, ControlClient(path) as other:
        busy.send(b'{"execute": "long"}')
        assert busy.read()["event"] == "STARTED"
        assert other.execute("echo", {"text": "me"}) == {"text": "me"}
        server.emit("NEWS")
        assert busy.read()["event"] == "NEWS"
        commands.release.set()
        assert busy.read() == {"return": "done"}


def test_a_commands_events_go_to_its_client_alone_and_the_servers_to_all(server: ControlServer, path: Path) -> None:
    with Raw(path) as one, Raw(path) as two, Raw(path, negotiate=False) as silent:
        one.send(b'{"execute": "count", "arguments": {"to": 1}}')
        assert [one.read().get("event"), one.read().get("return")] == ["COUNTED", 1]
        server.emit("NEWS", {"a": 1})
        assert [client.read()["data"] for client in (one, two)] == [{"a": 1}, {"a": 1}]
        silent.send(HELLO)
        assert silent.read() == {"return": {}}, "no event before the negotiation is over"


def test_a_client_that_hangs_up_gives_up_its_command(server: ControlServer, path: Path, commands: Commands) -> None:
    with Raw(path) as client:
        client.send(b'{"execute": "long"}{"execute": "crash"}')
        assert commands.started.wait(PATIENCE)
    assert commands.ended.wait(PATIENCE)
    with ControlClient(path) as other:
        other.execute("echo", {"text": ""})
    assert server.errors == [], "what waited behind it was not run"


def test_a_client_that_only_ends_its_input_gets_its_answers(
    server: ControlServer, path: Path, commands: Commands
) -> None:
    with Raw(path) as client:
        client.send(b'{"execute": "long"}{"execute": "echo", "arguments": {"text": "last"}}')
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read()["event"] == "STARTED"
        commands.release.set()
        assert [client.read(), client.read(), client.read()] == [{"return": "done"}, {"return": {"text": "last"}}, {}]


# The end


def test_stopping_cancels_what_runs_and_still_answers_it(path: Path, commands: Commands) -> None:
    server = ControlServer(path, commands.table(), version="1")
    server.start()
    with Raw(path) as client, Raw(path) as idle:
        client.send(b'{"execute": "long"}{"execute": "echo", "arguments": {"text": "too late"}}')
        assert client.read()["event"] == "STARTED"
        server.emit("SHUTDOWN")
        server.stop()
        assert client.read()["event"] == "SHUTDOWN"
        assert client.read()["error"]["desc"] == "given up: the server is stopping"
        assert client.read() == {}
        assert idle.read()["event"] == "SHUTDOWN"
        assert idle.read() == {}
    assert not path.exists()
    server.stop()
    server.emit("NOBODY")


def test_our_client_says_when_the_server_ends_before_it_answers(path: Path, commands: Commands) -> None:
    server = ControlServer(path, commands.table(), version="1")
    server.start()
    with ControlClient(path) as client:
        server.stop()
        with pytest.raises(ControlError, match=r"ended before it answered|cannot be asked"):
            client.execute("echo", {"text": ""})


def test_a_server_may_stop_while_clients_come_and_go(path: Path, commands: Commands) -> None:
    for _ in range(20):
        server = ControlServer(path, commands.table(), version="1")
        server.start()
        over = threading.Event()

        def knock(over: threading.Event = over) -> None:
            while not over.is_set():
                try:
                    with ControlClient(path) as client:
                        client.execute("echo", {"text": "x" * 1000})
                except ControlError:
                    pass

        threads = [threading.Thread(target=knock) for _ in range(3)]
        for thread in threads:
            thread.start()
        with ControlClient(path) as client:
            client.execute("count", {"to": 10})
        server.stop()
        over.set()
        for thread in threads:
            thread.join()
        assert server.errors == []


# Hostile clients


@pytest.mark.parametrize(
    "said",
    [
        b"\x00" * 100_000,
        b"[" * 3_000_000,
        b'{"a": "' + b"x" * 3_000_000,
        b'{"execute": "echo", "arguments": {"text": 1}}' * 1000,
        b"\xff" * 1_000_000,
        b"GET / HTTP/1.1\r\n\r\n" * 1000,
    ],
)
def test_a_hostile_client_ends_nothing_but_its_own_connection(server: ControlServer, path: Path, said: bytes) -> None:
    with Raw(path) as good:
        for leave_at_once in (True, False):
            with Raw(path) as bad:
                try:
                    bad.send(said)
                    if not leave_at_once:
                        bad.socket.shutdown(socket.SHUT_WR)
                        while bad.file.read(65536):
                            pass
                except OSError:
                    pass
        good.send(b'{"execute": "echo", "arguments": {"text": "fine"}}')
        assert good.read() == {"return": {"text": "fine"}}
    assert server.errors == []


def test_a_client_that_never_reads_is_dropped(server: ControlServer, path: Path) -> None:
    with Raw(path) as deaf:
        deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with Raw(path) as good:
            for _ in range(100):
                server.emit("NEWS", {"text": "x" * 100_000})
                assert good.read()["event"] == "NEWS"
        received = 0
        while data := deaf.socket.recv(1 << 20):
            received += len(data)
        assert received < 9_000_000


def test_a_client_that_asks_and_never_reads_is_not_read_from_without_end(server: ControlServer, path: Path) -> None:
    asked = b'{"execute": "echo", "arguments": {"text": "' + b"x" * 100_000 + b'"}}'
    with Raw(path) as deaf:
        deaf.socket.setblocking(False)
        sent = 0
        with ControlClient(path) as good:
            while sent < 100_000_000:
                try:
                    sent += deaf.socket.send(asked[sent % len(asked) :])
                except BlockingIOError:
                    good.execute("echo", {"text": "still here"})
                    continue
                except OSError:
                    break
        assert sent < 100_000_000


def test_a_client_is_not_read_from_while_its_commands_wait(
    server: ControlServer, path: Path, commands: Commands
) -> None:
    asked = b'{"execute": "echo", "arguments": {"text": "' + b"x" * 100_000 + b'"}}'
    with Raw(path) as eager, ControlClient(path) as other:
        eager.send(b'{"execute": "long"}')
        assert eager.read()["event"] == "STARTED"
        eager.socket.setblocking(False)
        sent = refused = 0
        while refused < 20 and sent < 50_000_000:
            try:
                sent += eager.socket.send(asked[sent % len(asked) :])
                refused = 0
            except BlockingIOError:
                refused += 1
                other.execute("echo", {"text": "the server has had the time to read"})
        assert sent < 10_000_000
        eager.socket.settimeout(PATIENCE)
        commands.release.set()
        assert eager.read() == {"return": "done"}
        for _ in range(sent // len(asked)):
            assert "return" in eager.read()


def test_out_of_descriptors_is_waited_out(path: Path, commands: Commands) -> None:
    server = ControlServer(path, commands.table(), version="1")
    server.start()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    hoard: list[int] = []
    client = socket.socket(socket.AF_UNIX)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, before[1]))
        try:
            while True:
                hoard.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        client.connect(os.fspath(path))
        os.close(hoard.pop())
        client.settimeout(PATIENCE)
        assert b"QMP" in client.recv(1000)
    finally:
        for fd in hoard:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        client.close()
        server.stop()
