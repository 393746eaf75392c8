"""The runtime directory: private, self-cleaning, and how servers find each other."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowkit.errors import ControlError, ListenError
from cowkit.server.runtime import (
    CONTROL_SOCKET,
    SERVER_FILE,
    SOCKET_PATH_LIMIT,
    ServerInfo,
    make_socket_dir,
    publish,
    remove_socket_dir,
    running,
    runtime_dir,
)


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short path: pytest's own may leave no room for a socket's."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="cowkit-test-") as made:
        yield Path(made)


@pytest.fixture(autouse=True)
def place(short: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COWKIT_RUNTIME_DIR", str(short / "run"))
    return short / "run"


@pytest.fixture
def directory() -> Iterator[Path]:
    made = make_socket_dir()
    yield made
    remove_socket_dir(made)


def info(directory: Path, **changes: Any) -> ServerInfo:
    whole = ServerInfo(
        pid=os.getpid(),
        name="disk",
        base="/images/d\udcffsk.img",
        identity=(1, 2**63),
        size=10**15,
        uris=("nbd+unix:///?socket=/a", "nbd://localhost:1"),
        started=12.5,
        control=str(directory / CONTROL_SOCKET),
    )
    return ServerInfo.from_json({**whole.to_json(), **changes})


def python(code: str) -> subprocess.Popen[str]:
    """A process that runs ``code`` and then waits to be killed."""
    code = f"import os\nfrom cowkit.server.runtime import *\n{code}\nimport signal; signal.pause()"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_private_directory_is_the_users_alone_and_goes_with_all_in_it(place: Path) -> None:
    made = make_socket_dir()
    assert made.parent == place
    assert [stat.S_IMODE(directory.stat().st_mode) for directory in (place, made)] == [0o700, 0o700]
    (made / "nbd.sock").touch()
    remove_socket_dir(made)
    remove_socket_dir(made)
    assert list(place.iterdir()) == []


def test_the_longest_socket_path_in_it_can_be_bound(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = f"{short}/"
    longest = start + "x" * (SOCKET_PATH_LIMIT - len(start) - len("/4194304-abcdef/control.sock"))
    monkeypatch.setenv("COWKIT_RUNTIME_DIR", longest)
    made = make_socket_dir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(made / "control.sock"))
    remove_socket_dir(made)
    monkeypatch.setenv("COWKIT_RUNTIME_DIR", longest + "x")
    with pytest.raises(ListenError, match="108 bytes, over the 107"):
        make_socket_dir()


@pytest.fixture
def session(short: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("COWKIT_RUNTIME_DIR")
    session = short / "session"
    session.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(session))
    return session


def test_the_sessions_runtime_directory_is_used(session: Path) -> None:
    assert runtime_dir() == session / "cowkit"


@pytest.mark.parametrize("trouble", ["missing", "too long", "a file", "relative", "unset"])
def test_an_unusable_session_directory_leaves_the_one_in_tmp(
    session: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {
        "missing": session / "none",
        "too long": session / ("x" * 80),
        "a file": session / "file",
        "relative": Path("x"),
    }
    (session / ("x" * 80)).mkdir()
    (session / "file").touch()
    if trouble == "unset":
        monkeypatch.delenv("XDG_RUNTIME_DIR")
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(place[trouble]))
    assert runtime_dir() == Path(f"/tmp/cowkit-{os.geteuid()}")


def test_what_is_served_below_tmp_is_found_from_inside_a_session(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(session / "none"))
    made = make_socket_dir()
    try:
        publish(made, info(made))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(session))
        assert info(made) in running()
    finally:
        remove_socket_dir(made)


def make_unsafe(place: Path, how: str, elsewhere: Path) -> None:
    if how == "symlink":
        elsewhere.mkdir(mode=0o700)
        place.symlink_to(elsewhere)
    elif how == "file":
        place.touch(mode=0o600)
    elif how == "foreign":
        place.mkdir(mode=0o700)
        os.chown(place, 12345, 12345)
    else:
        place.mkdir()
        place.chmod(0o710 if how == "group" else 0o701)


@pytest.mark.parametrize("how", ["symlink", "file", "foreign", "group", "world"])
def test_an_unsafe_runtime_directory_is_refused(place: Path, short: Path, how: str) -> None:
    if how == "foreign" and os.geteuid():
        pytest.skip("only root can give a directory away")
    make_unsafe(place, how, short / "elsewhere")
    with pytest.raises(ListenError, match=r"is not safe: .*COWKIT_RUNTIME_DIR names another"):
        make_socket_dir()
    with pytest.raises(ControlError, match="is not safe"):
        running()


def test_a_runtime_directory_that_cannot_be_made_is_one_clear_error(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COWKIT_RUNTIME_DIR", str(short / "none" / "run"))
    with pytest.raises(ListenError, match=r"cannot make the runtime directory .*none/run: No such file or directory"):
        make_socket_dir()
    assert running() == []


def test_what_is_published_is_found_as_it_was(directory: Path) -> None:
    assert running() == []
    publish(directory, info(directory))
    assert running() == [info(directory)]
    assert running()[0].uri == "nbd+unix:///?socket=/a"
    publish(directory, info(directory, base=None, identity=None))
    assert running() == [info(directory, base=None, identity=None)]
    assert {file.name for file in directory.iterdir()} == {SERVER_FILE}


def test_servers_are_listed_oldest_first(directory: Path) -> None:
    others = [make_socket_dir() for _ in range(3)]
    for made, started in zip([directory, *others], [3, 1, 2, 0], strict=True):
        publish(made, info(made, started=started))
    assert [found.started for found in running()] == [0, 1, 2, 3]
    for made in others:
        remove_socket_dir(made)
    assert [found.started for found in running()] == [3]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"version": 2}', '{"version": 1}', "null", '{"version": 1, "uris": []}', "[" * 100_000, "\xff"],
)
def test_a_description_that_cannot_be_read_hides_its_server_alone(directory: Path, text: str) -> None:
    other = make_socket_dir()
    publish(other, info(other))
    (directory / SERVER_FILE).write_text(text, encoding="latin-1")
    assert running() == [info(other)]
    remove_socket_dir(other)


def test_another_process_finds_it_and_does_not_remove_it(directory: Path) -> None:
    publish(directory, info(directory))
    code = "from cowkit.server.runtime import *; print(running()[0].size); remove_socket_dir(make_socket_dir())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(info(directory).size)
    assert directory.exists()


def test_what_a_killed_process_left_is_removed_by_a_listing_and_by_the_next_server(place: Path) -> None:
    for look in ("print(running())", "print(make_socket_dir())"):
        process = python(
            "made = make_socket_dir(); (made / 'nbd.sock').touch(); (made / 'server.json').touch(); print(made, flush=True)"
        )
        assert process.stdout
        left = Path(process.stdout.readline().strip())
        assert left.parent == place
        running()
        assert left.exists(), "its maker lives"
        kill(process)
        assert left.exists()
        looker = python(f"{look}; print(flush=True)")
        assert looker.stdout
        looker.stdout.readline()
        assert not left.exists()
        kill(looker)


def test_two_who_look_at_once_do_not_take_each_other_for_an_owner(place: Path) -> None:
    made = make_socket_dir()
    published = info(made)
    remove_socket_dir(made)
    left = place / "12-abcdef"
    left.mkdir()
    publish(left, published)
    looking = os.open(left, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    assert running() == []
    os.close(looking)


def test_a_process_id_used_again_protects_nothing(place: Path) -> None:
    remove_socket_dir(make_socket_dir())
    left = place / f"{os.getpid()}-000000"
    left.mkdir(mode=0o700)
    assert running() == []
    assert not left.exists()


def test_what_is_not_a_private_directory_is_left_alone(place: Path, directory: Path) -> None:
    (place / "notes").mkdir()
    (place / "12-nothex").mkdir()
    (place / "12-abcdef").touch()
    (place / "13-abcdef").symlink_to(place / "notes")
    assert running() == []
    assert {entry.name for entry in place.iterdir()} == {directory.name, "notes", "12-nothex", "12-abcdef", "13-abcdef"}


def test_a_stale_directory_with_a_directory_in_it_is_kept(place: Path) -> None:
    remove_socket_dir(make_socket_dir())
    (place / "12-abcdef" / "precious").mkdir(parents=True)
    assert running() == []
    assert (place / "12-abcdef" / "precious").exists()


def test_a_forked_child_removes_nothing_of_its_parents(directory: Path) -> None:
    published = info(directory)
    publish(directory, published)
    child = os.fork()
    if not child:
        try:
            remove_socket_dir(directory)
            os._exit(0 if running() == [published] else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert running() == [published]


def test_a_forked_child_that_lives_on_does_not_keep_its_parents_directory() -> None:
    code = "made = make_socket_dir()\nchild = os.fork()\nif child: print(child, made, flush=True)\nelse: os.close(1)"
    process = python(code)
    assert process.stdout
    child, made = process.stdout.readline().split()
    kill(process)
    try:
        assert running() == []
        assert not Path(made).exists()
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_makers_and_lookers_at_once_never_take_a_living_directory_away() -> None:
    lookers = [python("print(flush=True)\nwhile True: running()") for _ in range(2)]
    for looker in lookers:
        assert looker.stdout
        looker.stdout.readline()
    failures: list[Path] = []

    def make() -> None:
        for _ in range(150):
            made = make_socket_dir()
            publish(made, info(made))
            if not (made / SERVER_FILE).exists():
                failures.append(made)
            remove_socket_dir(made)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for looker in lookers:
        kill(looker)
    assert failures == []


def test_a_description_is_json_with_a_version(directory: Path) -> None:
    publish(directory, info(directory))
    assert json.loads((directory / SERVER_FILE).read_text())["version"] == 1
