"""Compressed bases: random access, damage, and the file that keeps what was decoded."""

from __future__ import annotations

import importlib
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowkit.bases import compressed, open_base
from cowkit.bases.compressed import CompressedBase
from cowkit.disk import Base, Disk
from cowkit.errors import BaseChangedError, BaseError, MissingToolError
from tests.bases.helpers import SHAPES, check_reads, write_compressed

pytestmark = [
    pytest.mark.requires("xz", modules=["xz", "indexed_gzip", "indexed_bzip2", "backports.zstd"]),
    pytest.mark.usefixtures("no_leaks"),
]

FORMATS = ["xz", "gz", "bz2", "zst"]


def written(folder: Path, content: bytes, shape: str) -> Path:
    return write_compressed(folder / f"disk.img.{shape.partition('-')[0]}", content, shape)


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    for module in ("xz", "indexed_gzip", "indexed_bzip2", "backports.zstd"):
        importlib.import_module(module)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_reads_of_several_threads_are_the_raw_disks(tmp_path: Path, content: bytes, shape: str) -> None:
    base = open_base(written(tmp_path, content, shape), tmpdir=tmp_path)
    check_reads(base, content)
    base.verify()
    base.verify_path()
    base.release()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [0, 1, 4095])
def test_the_smallest_disks_are_read_too(tmp_path: Path, format: str, size: int) -> None:
    base = open_base(written(tmp_path, b"x" * size, format))
    assert base.size == size
    assert base.pread(size, 0) == b"x" * size
    base.release()


class Counting:
    """How many bytes a base's decoder has decoded."""

    def __init__(self, base: Base) -> None:
        assert isinstance(base, CompressedBase)
        self._decoder = base._decoder
        self.total = 0
        base._decoder = self
        self.size, self.starts, self.close = self._decoder.size, self._decoder.starts, self._decoder.close

    def read(self, length: int, offset: int) -> bytes:
        data = self._decoder.read(length, offset)
        self.total += len(data)
        return data


@pytest.mark.parametrize("shape", ["xz", "xz-streams", "gz", "bz2", "zst-frames"])
def test_a_random_read_decodes_its_block_alone(tmp_path: Path, content: bytes, shape: str) -> None:
    base = open_base(written(tmp_path, content, shape))
    counting = Counting(base)
    assert base.pread(4096, 2_500_000) == content[2_500_000 : 2_500_000 + 4096]
    assert counting.total <= 1 << 20
    base.release()


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_decoded_twice(tmp_path: Path, content: bytes, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "_WHOLE", 0)  # so also blocks that are left half way
    path = written(tmp_path, content, shape)
    base = open_base(path, format=path.suffix[1:])  # without a look at what is inside
    counting = Counting(base)
    chance = random.Random(2)
    for _ in range(50):
        offset = chance.randrange(len(content) - 4096)
        assert base.pread(4096, offset) == content[offset : offset + 4096]
    base.pread(len(content), 0)
    assert counting.total == len(content)
    base.release()


@pytest.mark.parametrize("shape", SHAPES)
def test_where_no_decoded_bytes_can_be_kept_reads_go_on(
    tmp_path: Path, content: bytes, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, content, shape)
    base = open_base(path, tmpdir=tmp_path / "there-is-none")
    check_reads(base, content, rounds=5)
    base.release()
    base = open_base(path, tmpdir=tmp_path)
    base.pread(1, 1_234_567)
    monkeypatch.setattr(
        os, "fstatvfs", lambda _fd: os.statvfs_result((4096, 4096, 1 << 30, 1 << 30, 0, 0, 0, 0, 0, 255))
    )
    check_reads(base, content, rounds=5)
    base.release()


def broken(data: bytes) -> Iterator[tuple[str, bytes]]:
    for part in (3, 2):
        yield f"cut at 1/{part}", data[: len(data) // part]
    yield "one byte short", data[:-1]
    for place in (len(data) // 4, len(data) // 2, len(data) - 40):
        yield (
            f"16 bytes wrong at {place}",
            data[:place] + bytes(byte ^ 0x5A for byte in data[place : place + 16]) + data[place + 16 :],
        )


def read_whole(path: Path) -> bytes | BaseError:
    try:
        base = open_base(path)
    except BaseError as error:
        return error
    try:
        return base.pread(base.size, 0)
    except BaseError as error:
        return error
    finally:
        base.release()


@pytest.mark.parametrize("shape", SHAPES)
def test_damaged_files_are_an_error_of_one_line_and_never_other_bytes(
    tmp_path: Path, content: bytes, shape: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, content, shape)
    data = path.read_bytes()
    for what, wrong in broken(data):
        path.write_bytes(wrong)
        got = read_whole(path)
        if isinstance(got, bytes):
            # What was hit is a skippable frame: nobody reads that.
            assert got == content and shape == "zst-frames", what
        else:
            complaint = str(got)
            assert "\n" not in complaint and "damaged" in complaint and path.name in complaint, what
            assert got.__cause__ is not None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("format", FORMATS)
def test_garbage_behind_the_right_first_bytes_is_an_error(tmp_path: Path, format: str) -> None:
    path = written(tmp_path, b"good", format)
    head = path.read_bytes()[:11]
    for rest in (b"", bytes(1), bytes(5000), random.Random(1).randbytes(5000), b"\xff" * 5000):
        path.write_bytes(head + rest)
        with pytest.raises(BaseError) as caught:
            base = open_base(path)
            try:
                base.pread(base.size, 0)
            finally:
                base.release()
        assert "\n" not in str(caught.value)


def test_bytes_after_a_damaged_block_can_still_be_read(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, content, "xz")
    data = bytearray(path.read_bytes())
    data[60:100] = bytes(40)
    path.write_bytes(data)
    base = open_base(path, format="xz")
    for _ in range(2):
        with pytest.raises(BaseError, match=r"cannot read base .*/disk\.img\.xz at byte 0: an xz file that is damaged"):
            base.pread(400_000, 0)
    assert base.pread(400_000, 400_000) == content[400_000:800_000]
    base.release()


def test_a_compressed_file_that_changes_is_noticed(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, content, "xz")
    base = open_base(path)
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(BaseChangedError):
        base.pread(4096, 3_000_000)
    with pytest.raises(BaseChangedError):
        base.verify()
    base.release()
    path = written(tmp_path, content, "gz")
    base = open_base(path)
    path.rename(tmp_path / "other")
    with pytest.raises(BaseChangedError, match="is not there any more"):
        base.verify_path()
    base.release()


@pytest.mark.parametrize("format", FORMATS)
def test_it_says_why_it_is_no_backing_file_and_what_to_do(tmp_path: Path, content: bytes, format: str) -> None:
    base = open_base(written(tmp_path, content, format))
    assert base.backing_refusal is not None
    assert "cannot be a qcow2 backing file" in base.backing_refusal
    assert base.backing_refusal.endswith("(--backing disk.img)")
    assert base.given == base.path == str(tmp_path / f"disk.img.{format}")
    base.release()


@pytest.mark.parametrize("format", FORMATS)
def test_a_missing_library_is_told_with_how_to_get_it(
    tmp_path: Path, content: bytes, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, content, format)
    module = {"xz": "xz", "gz": "indexed_gzip", "bz2": "indexed_bzip2", "zst": "backports.zstd"}[format]
    for each in (module, "compression.zstd"):
        monkeypatch.setitem(sys.modules, each, None)
    with pytest.raises(MissingToolError, match=rf"`{re.escape(sys.executable)} -m pip install [a-z0-9.-]+`$"):
        open_base(path)


def test_the_engine_reads_and_writes_on_top_of_it(tmp_path: Path, content: bytes) -> None:
    disk: Any
    with Disk(open_base(written(tmp_path, content, "xz"), tmpdir=tmp_path), tmpdir=tmp_path) as disk:
        disk.pwrite(b"boo", 1_000_001)
        assert disk.pread(4096, 1_000_000) == content[1_000_000:1_000_001] + b"boo" + content[1_000_004:1_004_096]
