"""Random disks: whoever writes the image, it is sound, and it reads as the disk does."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowkit import CowDisk
from cowkit.diff import DiffReport, Qcow2Image
from cowkit.diff.options import EngineName
from cowkit.disk import Extent, FileBase
from cowkit.errors import UsageError
from tests.diff.helpers import Doing, base_pieces, content, doings, make_base, noise, run

pytestmark = pytest.mark.requires("qemu-img", "qemu-storage-daemon", "setpriv", modules=["nbd", "qemu.qmp"])

ENGINES: tuple[EngineName, ...] = ("native", "qemu-img", "qmp")
SAME = ("dirty_bytes", "dirty_extents", "changed", "virtual_size", "cluster_size", "backing_file", "backing_format")

sizes = st.one_of(st.just(0), st.integers(1, 300_000), st.integers(1, 70).map(lambda n: n * 4096))
blocks = st.integers(9, 17).map(lambda n: 1 << n)
kinds = st.one_of(
    st.fixed_dictionaries({}, optional={"cluster_size": st.sampled_from([4096, 65536, 131072])}),
    st.fixed_dictionaries({"subclusters": st.just(True)}, optional={"cluster_size": st.sampled_from([16384, 131072])}),
    st.fixed_dictionaries(
        {"compress": st.sampled_from(["zlib", "zstd"])}, optional={"cluster_size": st.sampled_from([4096, 131072])}
    ),
    st.fixed_dictionaries({"raw": st.just(True)}),
    st.fixed_dictionaries({"bitmap": st.just("dirty")}, optional={"subclusters": st.booleans()}),
)


@st.composite
def wishes(draw: st.DrawFn) -> dict[str, Any]:
    """Options that go together."""
    asked: dict[str, Any] = draw(kinds)
    if "raw" not in asked and draw(st.booleans()):
        asked["standalone"] = True
    return asked


def keep(disk: CowDisk, image: Path, asked: dict[str, Any], expected: bytes) -> list[DiffReport]:
    """Let each engine write it, and look at what they wrote."""
    reports = []
    for engine in ENGINES:
        if engine == "qemu-img" and "bitmap" in asked:
            continue
        one = image.with_name(f"{engine}-{image.name}")
        reports.append(disk.diff(one, engine=engine, **asked))
        look_at(one, expected, raw=asked.get("raw", False))
    first = reports[0]
    for other in reports[1:]:
        assert [getattr(other, name) for name in SAME] == [getattr(first, name) for name in SAME]
        run("qemu-img", "compare", "-q", first.path, other.path)
        if "bitmap" in asked:
            assert marked(Path(other.path), asked["bitmap"]) == marked(Path(first.path), asked["bitmap"])
    return reports


def marked(image: Path, bitmap: str) -> list[Extent]:
    with Qcow2Image(image) as opened:
        return list(opened.bitmap(bitmap))


def look_at(image: Path, expected: bytes, *, raw: bool) -> None:
    if raw:
        assert image.read_bytes() == expected[: image.stat().st_size]
        return
    run("qemu-img", "check", "-q", image)
    assert read(image) == expected


def read(image: Path) -> bytes:
    """What our own reader finds, with the files below that the image names."""
    with Qcow2Image(image) as alone:
        below = alone.backing_file
    if below is None:
        with Qcow2Image(image) as opened:
            opened.check()
            return opened.pread(opened.size, 0)
    path = image.parent / below
    if path.suffix == ".qcow2":
        data = read(path)
    else:
        data = path.read_bytes()
    with Qcow2Image(image, lambda length, offset: data[offset : offset + length], len(data)) as opened:
        opened.check()
        return opened.pread(opened.size, 0)


def scenario(
    base_size: int | None,
    pieces: dict[int, int],
    size: int | None,
    block: int,
    todo: list[Doing],
    asked: dict[str, Any],
) -> None:
    """A disk with a checkpoint halfway: now, then, and the increment between the two."""
    with tempfile.TemporaryDirectory() as folder:
        data = {at: noise(length, 9) for at, length in pieces.items()}
        path = None if base_size is None else make_base(Path(folder, "base.img"), base_size, data)
        whole = max(size or 0, base_size or 0)
        if not whole:
            asked.pop("bitmap", None)
        with CowDisk(path, size=whole, block_size=block, tmpdir=folder) as disk:
            for doing in todo[: len(todo) // 2]:
                doing.do(disk.engine)
            then = content(disk.engine)
            disk.checkpoint("halfway")
            for doing in todo[len(todo) // 2 :]:
                doing.do(disk.engine)
            now = content(disk.engine)
            keep(disk, Path(folder, "now.qcow2"), asked, now)
            if len(todo) % 2:
                keep(disk, Path(folder, "then.qcow2"), {**asked, "at": "halfway"}, then)
            elif "raw" not in asked and "standalone" not in asked:
                first = Path(folder, "first.qcow2")
                disk.diff(first, at="halfway")
                increment = {**asked, "since": "halfway", "backing_file": "first.qcow2"}
                if base_size is None:
                    increment.pop("backing_file")
                    return
                keep(disk, Path(folder, "increment.qcow2"), increment, now)


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


arguments = {
    "base_size": st.none() | sizes,
    "pieces": base_pieces,
    "size": st.none() | sizes,
    "block": blocks,
    "todo": doings,
    "asked": wishes(),
}


@examples(5)
@given(**arguments)
def test_the_engines_agree(**chosen: Any) -> None:
    scenario(**chosen)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(300)
@given(**arguments)
def test_the_engines_agree_hundreds_of_times(**chosen: Any) -> None:
    scenario(**chosen)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_base_larger_than_the_disk_does_not_show_through_behind_its_end(engine: EngineName, tmp_path: Path) -> None:
    from cowkit.diff import ImageOptions
    from cowkit.disk import Disk
    from cowkit.keeping.live import keep as keep_disk

    path = make_base(tmp_path / "base.img", 200_000, {0: noise(200_000, 1)})
    with Disk(FileBase(path), size=130_000, tmpdir=tmp_path) as disk:
        disk.pwrite(b"boo", 5)
        kinds: list[dict[str, Any]] = [{}, {"compress": "zlib"}, {"standalone": True}, {"subclusters": True}]
        for number, asked in enumerate(kinds):
            image = tmp_path / f"{number}.qcow2"
            keep_disk(disk, image, options=ImageOptions(**asked, engine=engine))
            look_at(image, content(disk), raw=False)


def test_the_bitmap_of_the_engine_qmp_is_the_native_one(tmp_path: Path) -> None:
    path = make_base(tmp_path / "base.img", 1 << 20, {0: noise(1 << 20, 1)})
    with CowDisk(path) as disk:
        disk.pwrite(b"boo", 70_000)
        disk.pwrite(noise(8192, 1), 0)  # dirty, and as it was
        disk.trim(100_000, 500_000)
        found = []
        for engine in ("native", "qmp"):
            image = tmp_path / f"{engine}.qcow2"
            disk.diff(image, engine=engine, bitmap="b")
            found.append(marked(image, "b"))
    assert found[0] == found[1]


@pytest.mark.parametrize("engine", ["native", "qmp"])
def test_an_empty_disk_has_no_bitmap(engine: EngineName, tmp_path: Path) -> None:
    with CowDisk(size=0) as disk, pytest.raises(UsageError, match="nothing for a bitmap to mark"):
        disk.diff(tmp_path / "diff.qcow2", engine=engine, bitmap="b")
