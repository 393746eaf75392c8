"""Foreign servers that break the protocol, lie or go away: one clear line, and nothing is lost."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest

from cowkit.errors import BaseChangedError, BaseError, CowkitError
from tests.bases.helpers import nbdkit
from tests.keeping.helpers import MIB, keep
from tests.keeping.lying_server import DONE, ERROR, OFFSET_DATA, OFFSET_HOLE, Reply, data, lying_server, status

pytestmark = [pytest.mark.requires(modules=["nbd"]), pytest.mark.usefixtures("no_leaks")]

SIZE = 8 * MIB
DEPTH = "qemu:allocation-depth"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    path = tmp_path / "diff.qcow2"
    path.write_bytes(b"the old one")
    return path


def fails(uri: str, base: Path, output: Path, **options: str) -> CowkitError:
    """It cannot be kept: the one line that says so."""
    with pytest.raises(CowkitError) as caught:
        keep(uri, base, output, **options)
    assert "\n" not in str(caught.value) and uri in str(caught.value)
    assert output.read_bytes() == b"the old one"
    assert sorted(path.name for path in output.parent.iterdir()) == ["diff.qcow2", "disk.img"]
    return caught.value


def part(offset: int, length: int) -> bytes:
    return struct.pack(">Q", offset) + bytes(length)


READS: dict[str, Reply] = {
    "no data at all": lambda offset, length: [(DONE, 0, b"")],
    "half of the data": lambda offset, length: [(DONE, OFFSET_DATA, part(offset, length // 2))],
    "too much data": lambda offset, length: [(DONE, OFFSET_DATA, part(offset, length + 1))],
    "data of elsewhere": lambda offset, length: [(DONE, OFFSET_DATA, part(offset + length, length))],
    "an impossible hole": lambda offset, length: [(DONE, OFFSET_HOLE, struct.pack(">QI", offset, 0))],
    "a chunk of no kind": lambda offset, length: [(DONE, 12345, b"?")],
    "an error": lambda offset, length: [(DONE, ERROR, struct.pack(">IH", 5, 3) + b"bad")],
    "nonsense": lambda offset, length: b"HTTP/1.0 200 OK\r\n\r\n" * 10,
    "nothing, and it is gone": lambda offset, length: None,
}


@pytest.mark.parametrize("said", READS)
def test_reads_that_are_answered_wrongly(base: Path, output: Path, said: str) -> None:
    with lying_server(itertools.repeat(SIZE), read=READS[said]) as uri:
        error = fails(uri, base, output)
    assert isinstance(error, BaseError)
    assert str(error).startswith(f"cannot read source {uri} at byte ")


def test_a_server_that_goes_in_the_middle(base: Path, output: Path) -> None:
    with lying_server(itertools.repeat(SIZE), read=lambda *at: data(*at) if at[0] < 5 * MIB else None) as uri:
        assert "has gone, or broke the protocol" in str(fails(uri, base, output))


EXTENTS: dict[str, Reply] = {
    "none": lambda offset, length: status(),
    "empty ones": lambda offset, length: status((0, 0), (0, 3), (0, 0)),
    "an empty one at last": lambda offset, length: status((4096, 0), (0, 1)),
    "of another context": lambda offset, length: status((length, 3), context=7),
    "half a one": lambda offset, length: [(DONE, 5, b"\0\0\0\1\0\0\0")],
    "none, but an error": lambda offset, length: [(DONE, ERROR, struct.pack(">IH", 5, 0))],
    "nonsense": lambda offset, length: b"\0" * 100,
    "nothing, and it is gone": lambda offset, length: None,
}


@pytest.mark.parametrize("said", EXTENTS)
def test_a_map_of_what_changed_that_is_impossible(base: Path, output: Path, said: str) -> None:
    with lying_server(itertools.repeat(SIZE), block_status=EXTENTS[said], contexts=("base:allocation", DEPTH)) as uri:
        fails(uri, base, output, context=DEPTH)


@pytest.mark.parametrize("said", ["none", "nonsense", "nothing, and it is gone", "half a one"])
def test_a_map_of_holes_that_ends_the_connection(base: Path, output: Path, said: str) -> None:
    with lying_server(itertools.repeat(SIZE), block_status=EXTENTS[said]) as uri:
        fails(uri, base, output)


@pytest.mark.parametrize("said", ["empty ones", "an empty one at last", "none, but an error", "of another context"])
def test_a_map_of_holes_that_says_nothing_of_use_is_done_without(base: Path, output: Path, said: str) -> None:
    with lying_server(itertools.repeat(SIZE), block_status=EXTENTS[said]) as uri:
        report = keep(uri, base, output)
    assert (report.changed_bytes, report.bytes_read) == (0, 2 * SIZE)


def test_extents_beyond_the_end_are_cut_off(base: Path, output: Path) -> None:
    with lying_server(itertools.repeat(SIZE), block_status=lambda offset, length: status((0xFFFFF000, 3))) as uri:
        report = keep(uri, base, output)
    assert (report.changed_bytes, report.bytes_read) == (0, SIZE), "all of it is a hole, and the base is read"


def test_another_size_at_the_end_is_noticed(base: Path, output: Path) -> None:
    # The first client is told of one size, all others of another.
    with lying_server(itertools.chain([SIZE], itertools.repeat(SIZE + 4096))) as uri:
        error = fails(uri, base, output)
    assert isinstance(error, BaseChangedError)
    assert f"source {uri} changed while it was in use: its size went from {SIZE} to {SIZE + 4096} bytes" in str(error)


def test_a_size_that_no_disk_has(base: Path, output: Path) -> None:
    with lying_server(itertools.repeat((1 << 63) + 1)) as uri:
        fails(uri, base, output)


@pytest.mark.requires("nbdkit")
def test_errors_of_real_servers(base: Path, output: Path) -> None:
    with nbdkit("--filter=error", "file", base, "error-pread=EIO", "error-pread-rate=100%") as (uri, _):
        assert "Input/output error" in str(fails(uri, base, output))
    with nbdkit("--filter=error", "file", base, "error-extents=EIO", "error-extents-rate=100%") as (uri, _):
        assert keep(uri, base, output).changed_bytes == 0, "what it does not tell is read"


@pytest.mark.requires("nbdkit")
def test_a_base_that_fails_is_an_error_of_the_base(base: Path, output: Path) -> None:
    with nbdkit("--filter=error", "file", base, "error-pread=EIO", "error-pread-rate=100%") as (uri, _):
        with pytest.raises(BaseError, match=r"^cannot read base nbd://.* at byte "):
            keep(base, uri, output)
        assert output.read_bytes() == b"the old one"
