"""Damaged differences: one clear line, nothing written, and never a wrong success."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from cowkit import CowDisk
from cowkit.diff import Qcow2Image
from cowkit.diff.applying.copy import apply_to
from cowkit.diff.applying.in_place import apply_in_place
from cowkit.diff.chain import DiffChain
from cowkit.diff.qcow2.layout import EXTENSION_IDENTITY, HEADER, OFFSET_MASK
from cowkit.diff.verify import verify_diff
from cowkit.disk import FileBase
from cowkit.errors import CowkitError
from tests.diff.helpers import make_base, noise

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB

Damage = Callable[[bytearray, random.Random], None]


@pytest.fixture(scope="module", params=["plain", "subclusters", "zlib"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a difference to it."""
    folder = tmp_path_factory.mktemp("damage")
    base = make_base(folder / "base.img", SIZE, {0: noise(SIZE, 1)})
    with CowDisk(base) as disk:
        for at in range(0, SIZE, 128 * KIB):
            disk.pwrite(noise(5000, at >> 17), at + 3000)
        disk.zero(70_000, 300_000)
        disk.diff(
            folder / "diff.qcow2",
            cluster_size=None if request.param == "subclusters" else 4096,
            subclusters=request.param == "subclusters",
            compress="zlib" if request.param == "zlib" else None,
            bitmap="b",
        )
    return base, folder / "diff.qcow2"


def tables(image: Path) -> list[tuple[int, int]]:
    """Where the tables of an image are: offset and length of what they use."""
    with Qcow2Image(image) as opened:
        header = opened._header
        found = [(header.l1_table_offset, header.l1_size * 8), (header.refcount_table_offset, 16)]
        found += [(entry & OFFSET_MASK, 1024) for entry in opened._l1 if entry]
        found += [(int.from_bytes(image.read_bytes()[header.refcount_table_offset :][:8], "big"), 256)]
    return found


def in_the_header(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(HEADER.size)
    data[at] ^= 1 << chance.randrange(8)


def in_an_extension(data: bytearray, chance: random.Random) -> None:
    start = data.index(EXTENSION_IDENTITY.to_bytes(4, "big"))
    data[start + chance.randrange(120)] ^= 1 << chance.randrange(8)


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


@pytest.mark.parametrize("where", ["header", "extension", "table", "cut"])
@pytest.mark.parametrize("rounds", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_a_damaged_difference_is_one_line_and_nothing_is_written(
    where: str, rounds: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, sound = pair[0], pair[1]
    before, whole = base.read_bytes(), sound.read_bytes()
    places = tables(sound)
    diff = tmp_path / "diff.qcow2"
    target = Path(shutil.copy(base, tmp_path / "base.img"))
    for seed in range(rounds):
        chance = random.Random(f"{where} {seed}")
        data = bytearray(whole)
        if where == "header":
            in_the_header(data, chance)
        elif where == "extension":
            in_an_extension(data, chance)
        elif where == "cut":
            cut(data, chance)
        else:
            start, length = chance.choice(places)
            data[start + chance.randrange(length)] ^= 1 << chance.randrange(8)
        diff.write_bytes(data)
        readable = read(diff, target)
        for use in (lambda: apply_to(diff, tmp_path / "new.img"), lambda: CowDisk(target, overlay=diff).close()):
            refusal = refused(use)
            assert "\n" not in str(refusal)
            assert (tmp_path / "new.img").exists() is False or refusal is None
            assert refusal is not None or readable is not None, f"seed {seed}"
            (tmp_path / "new.img").unlink(missing_ok=True)
        refusal = refused(lambda: apply_in_place(diff, base=target))
        assert "\n" not in str(refusal)
        if refusal is not None:
            assert target.read_bytes() == before
        else:
            assert target.read_bytes().ljust(len(readable or b""), b"\0") == readable
            target.write_bytes(before)


def refused(use: Callable[[], object]) -> CowkitError | None:
    """The error that it ends with, if it is one of cowkit's."""
    try:
        use()
    except CowkitError as error:
        return error
    return None


def read(diff: Path, base: Path) -> bytes | None:
    """What cowkit's reader has, if it has it."""
    source = FileBase(base)
    try:
        with DiffChain(diff, source) as chain:
            chain.stand_on(source)
            return chain.pread(min(chain.size, 1 << 24), 0)
    except CowkitError:
        return None
    finally:
        source.release()


@pytest.mark.requires("qemu-img", "qemu-nbd", "setpriv", modules=["nbd"])
@pytest.mark.parametrize("rounds", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_verify_never_says_that_a_damaged_difference_is_right_where_readers_differ(
    rounds: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, sound = pair[0], pair[1]
    whole = sound.read_bytes()
    with CowDisk(base, overlay=sound) as disk:
        live = disk.pread(SIZE, 0)
    (tmp_path / "live.img").write_bytes(live)
    diff = tmp_path / "diff.qcow2"
    places = tables(sound)
    for seed in range(rounds):
        chance = random.Random(seed)
        data = bytearray(whole)
        if seed % 3 == 0:
            in_the_header(data, chance)
        else:
            start, length = chance.choice(places)
            data[start + chance.randrange(length)] ^= 1 << chance.randrange(8)
        diff.write_bytes(data)
        with suppress(CowkitError):
            found = verify_diff(diff, base=base, against=tmp_path / "live.img")
            same = read(diff, base) == live
            assert found.disagreements or same, f"seed {seed}"
