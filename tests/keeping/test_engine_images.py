"""The engine qmp writes whatever image QEMU can write, and each engine what cowkit can, from any base."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowkit import CowDisk
from cowkit.diff import Qcow2Image
from cowkit.diff.identity import Hash, identify
from cowkit.diff.options import EngineName
from cowkit.diff.recorded import Recorded
from cowkit.errors import OutputError, UsageError
from tests.diff.helpers import make_base, noise, run

pytestmark = pytest.mark.requires("qemu-img", "qemu-storage-daemon", "setpriv", modules=["nbd", "qemu.qmp"])

SIZE = (1 << 20) + 512
QUICK = "10"
"""Milliseconds that a key is to take (encrypt.iter-time); QEMU's two seconds are for people with secrets."""

each_engine = pytest.mark.parametrize("engine", ["native", "qemu-img", "qmp"])


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CowDisk]:
    """A changed disk; ``now.img`` has what is on it."""
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "base.img", SIZE, {0: noise(SIZE // 2, 1)})
    with CowDisk("base.img") as disk:
        wreck(disk)
        disk.diff("now.img", raw=True)
        yield disk


def wreck(disk: CowDisk) -> None:
    disk.pwrite(noise(70_000, 2), 30_000)
    disk.trim(200_000, 200_000)  # some clusters as a whole
    disk.pwrite(b"end", disk.size - 3)


def info(image: str, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", *options, image))
    return found


FORMATS: list[tuple[str, dict[str, str | int | bool]]] = [
    ("vmdk", {}),
    ("vmdk", {"subformat": "streamOptimized", "hwversion": "6"}),
    ("vdi", {"preallocation": "metadata"}),
    ("vhdx", {"subformat": "dynamic"}),
    ("vpc", {"force-size": "on"}),
    ("qed", {"table_size": 4}),
    ("qcow", {}),
    ("parallels", {}),
    ("qcow2", {"version": "v2"}),
    ("qcow2", {"lazy-refcounts": True, "refcount-bits": "64"}),
]


@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_each_format_of_qemu_reads_as_the_disk(
    format: str, options: dict[str, str | int | bool], disk: CowDisk
) -> None:
    report = disk.diff("image", format=format, image_options=options)
    assert (report.engine, report.format) == ("qmp", format)
    run("qemu-img", "compare", "-q", "-f", format, "-F", "raw", "image", "now.img")
    named = info("image")
    assert named["format"] == format
    assert report.backing_file == ("base.img" if format in ("qcow2", "qed") else None)
    assert named.get("backing-filename") == report.backing_file


def test_options_may_have_the_names_that_qemu_img_gives_them(disk: CowDisk) -> None:
    for compat in ("0.10", "1.1"):
        disk.diff("a.qcow2", image_options={"compat": compat})
        assert info("a.qcow2")["format-specific"]["data"]["compat"] == compat
    for on, version in ((True, "6"), ("off", "4")):
        disk.diff("b.vmdk", format="vmdk", image_options={"compat6": on})
        assert f'ddb.virtualHWVersion = "{version}"'.encode() in Path("b.vmdk").read_bytes()[:65536]
    disk.diff("c.vdi", format="vdi", image_options={"static": "on"})
    run("qemu-img", "compare", "-q", "-f", "vdi", "-F", "raw", "c.vdi", "now.img")
    kind_of_image = Path("c.vdi").read_bytes()[76:80]  # 1: dynamic, 2: static
    assert int.from_bytes(kind_of_image, "little") == 2


def test_options_reach_the_image(disk: CowDisk) -> None:
    disk.diff("a.qcow2", image_options={"lazy-refcounts": "on", "refcount_bits": "8"})
    data = info("a.qcow2")["format-specific"]["data"]
    assert (data["lazy-refcounts"], data["refcount-bits"]) == (True, 8)
    disk.diff("b.vmdk", format="vmdk", image_options={"subformat": "streamOptimized"})
    assert info("b.vmdk")["format-specific"]["data"]["create-type"] == "streamOptimized"


def test_an_image_that_has_its_name_in_it_has_the_one_that_it_gets(disk: CowDisk, tmp_path: Path) -> None:
    disk.diff("disk.vmdk", format="vmdk")
    assert b'"disk.vmdk"' in (tmp_path / "disk.vmdk").read_bytes()[:65536]


@pytest.mark.parametrize(
    ("format", "options", "opened"),
    [
        ("qcow2", {"encrypt.format": "luks", "encrypt.iter-time": QUICK}, "encrypt.key-secret=s"),
        pytest.param("luks", {"iter-time": QUICK}, "key-secret=s", marks=pytest.mark.slow),
    ],
)
def test_an_encrypted_image_opens_with_the_secret_and_not_without(
    format: str, options: dict[str, str | int | bool], opened: str, disk: CowDisk, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(b"open, sesame\n")
    disk.diff("image", format=format, image_options=options, secret_file="key")
    assert noise(4096, 2) not in (tmp_path / "image").read_bytes()
    command = ["qemu-img", "compare", "--object", "secret,id=s,file=key", "--image-opts"]
    run(*command, f"driver={format},file.filename=image,{opened}", "driver=raw,file.filename=now.img")
    (tmp_path / "key").write_bytes(b"open, barley\n")
    wrong = subprocess.run(
        [*command, f"driver={format},file.filename=image,{opened}", "driver=raw,file.filename=now.img"],
        capture_output=True,
        check=False,
    )
    assert b"Invalid password" in wrong.stderr


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"engine": "qemu"}, "engine is 'native', 'qemu-img' or 'qmp', not 'qemu'"),
    ({"engine": "native", "format": "vmdk"}, "the engine native cannot write the format 'vmdk': the engine qmp can"),
    ({"engine": "qemu-img", "image_options": {"version": "v2"}}, "the image option 'version': the engine qmp can"),
    ({"engine": "qemu-img", "secret_file": "key"}, "cannot write an encrypted image (secret file): the engine qmp can"),
    ({"engine": "qemu-img", "bitmap": "b"}, "cannot put in a bitmap: the engines native and qmp can"),
    ({"format": "vmdk", "subclusters": True}, "subclusters: for the format qcow2, not for 'vmdk'"),
    ({"format": "vmdk", "backing_file": "base.img"}, "has no backing file"),
    ({"format": "vmdk", "raw": True}, "a raw file is not of the format 'vmdk'"),
    ({"raw": True, "secret_file": "key"}, "a raw file has no secret file"),
    ({"format": "nfs"}, "this QEMU cannot write the format 'nfs' to a file: it can write luks, "),
    ({"format": ""}, "this QEMU cannot write the format ''"),
    ({"image_options": {"size": "1"}}, "the image option 'size' is cowkit's own to choose"),
    ({"image_options": {"backing_file": "x"}}, "the image option 'backing_file' is cowkit's own to choose"),
    (
        {"image_options": {"cluster_size": "4K"}},
        "'cluster_size' is cowkit's own: give --cluster-size (in Python, cluster_size=) ",
    ),
    ({"image_options": {"compression_type": "zstd"}}, "give --compress (in Python, compress=) instead"),
    ({"image_options": {"compat": "0.9"}}, "'compat' of the format qcow2 is none of 0.10, v2, 1.1, v3: '0.9'"),
    ({"image_options": {"compat": "1.1", "version": "v3"}}, "is given twice"),
    ({"image_options": {"colour": "red"}}, "there is no image option 'colour' of the format qcow2: QEMU has "),
    ({"image_options": {"encrypt": "luks"}}, "'encrypt' of the format qcow2 takes no value of its own"),
    ({"image_options": {"version": "v9"}}, "'version' of the format qcow2 is none of v2, v3: 'v9'"),
    (
        {"image_options": {"lazy-refcounts": "perhaps"}},
        "'lazy-refcounts' of the format qcow2 is on or off, not 'perhaps'",
    ),
    ({"image_options": {"refcount-bits": "many"}}, "'many'"),
    ({"image_options": {"version": None}}, "the image option 'version' is a string, a number, true or false"),
    ({"image_options": {"lazy-refcounts": "on", "lazy_refcounts": "on"}}, "is given twice"),
    ({"secret_file": "nix"}, "cannot read the secret file 'nix': No such file or directory"),
    ({"format": "vdi", "secret_file": "base.img"}, "images of the format 'vdi' are not encrypted"),
]


@pytest.mark.parametrize(("asked", "words"), REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(asked: dict[str, Any], words: str, disk: CowDisk) -> None:
    with pytest.raises(UsageError) as caught:
        disk.diff("image", **asked)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_qemu_refuses_is_said_in_its_words(disk: CowDisk) -> None:
    with pytest.raises(OutputError) as caught:
        disk.diff("image", image_options={"refcount-bits": 3})
    assert str(caught.value).startswith(
        "cannot write image: qemu-storage-daemon: Refcount width must be a power of two"
    )


@each_engine
def test_the_names_that_are_asked_for_are_recorded(engine: EngineName, disk: CowDisk, tmp_path: Path) -> None:
    disk.diff("a.qcow2", engine=engine)
    assert info("a.qcow2")["backing-filename"] == "base.img"
    disk.diff("b.qcow2", engine=engine, backing_file="not/yet/there.raw", backing_format="raw")
    found = info("b.qcow2")
    assert (found["backing-filename"], found["backing-filename-format"]) == ("not/yet/there.raw", "raw")
    run("qemu-img", "rebase", "-u", "-b", "base.img", "-F", "raw", "b.qcow2")
    run("qemu-img", "compare", "-q", "b.qcow2", "now.img")


@each_engine
def test_an_image_of_another_format_is_a_base(engine: EngineName, tmp_path: Path) -> None:
    make_base(tmp_path / "base.img", SIZE, {0: noise(SIZE // 2, 1)})
    run("qemu-img", "convert", "-O", "qcow2", tmp_path / "base.img", tmp_path / "base.qcow2")
    with CowDisk(tmp_path / "base.qcow2") as disk:
        wreck(disk)
        disk.diff(tmp_path / "now.img", raw=True)
        report = disk.diff(tmp_path / "diff.qcow2", engine=engine)
    assert (report.backing_file, report.backing_format) == (str(tmp_path / "base.qcow2"), "qcow2")
    run("qemu-img", "compare", "-q", tmp_path / "diff.qcow2", tmp_path / "now.img")


@each_engine
def test_a_compressed_base_is_refused_unless_a_raw_copy_is_named(engine: EngineName, tmp_path: Path) -> None:
    make_base(tmp_path / "base.img", SIZE, {0: noise(SIZE // 2, 1)})
    (tmp_path / "base.img.gz").write_bytes(gzip.compress((tmp_path / "base.img").read_bytes()))
    with CowDisk(tmp_path / "base.img.gz") as disk:
        wreck(disk)
        with pytest.raises(UsageError, match="backing file"):
            disk.diff(tmp_path / "diff.qcow2", engine=engine)
        disk.diff(tmp_path / "now.img", raw=True)
        disk.diff(tmp_path / "diff.qcow2", engine=engine, backing_file="base.img")
        disk.diff(tmp_path / "alone.qcow2", engine=engine, standalone=True)
    run("qemu-img", "compare", "-q", tmp_path / "diff.qcow2", tmp_path / "now.img")
    run("qemu-img", "compare", "-q", tmp_path / "alone.qcow2", tmp_path / "now.img")


@each_engine
def test_an_export_is_a_base(engine: EngineName, tmp_path: Path) -> None:
    make_base(tmp_path / "base.img", SIZE, {0: noise(SIZE // 2, 1)})
    with CowDisk(tmp_path / "base.img") as below, CowDisk(below.uri) as disk:
        wreck(disk)
        disk.diff(tmp_path / "now.img", raw=True)
        report = disk.diff(tmp_path / "diff.qcow2", engine=engine)
        assert report.backing_file == below.uri
        run("qemu-img", "compare", "-q", tmp_path / "diff.qcow2", tmp_path / "now.img")


@each_engine
def test_clients_go_on_writing_and_the_image_is_of_one_moment(engine: EngineName, disk: CowDisk) -> None:
    def write_on(done: int, total: int) -> None:
        disk.pwrite(noise(SIZE, done % 5), 0)

    disk.diff("diff.qcow2", engine=engine, progress=write_on)
    run("qemu-img", "compare", "-q", "diff.qcow2", "now.img")


@each_engine
@pytest.mark.parametrize("hash", [None, "full"])
def test_the_image_tells_its_base_from_others(engine: EngineName, hash: Hash | None, disk: CowDisk) -> None:
    disk.diff("diff.qcow2", engine=engine, hash=hash)
    with Qcow2Image("diff.qcow2") as image:
        image.check()
        assert image.identity == Recorded(identify(disk.engine.base, full=hash == "full"), disk.size).to_bytes()
    run("qemu-img", "check", "-q", "diff.qcow2")
    run("qemu-img", "compare", "-q", "diff.qcow2", "now.img")
    with CowDisk("base.img", overlay="diff.qcow2") as again:
        assert again.pread(again.size, 0)[: disk.size] == disk.pread(disk.size, 0)


def test_an_image_without_a_place_for_that_does_without_unless_it_is_asked_for(disk: CowDisk) -> None:
    disk.diff("old.qcow2", image_options={"version": "v2"})
    run("qemu-img", "compare", "-q", "old.qcow2", "now.img")
    with pytest.raises(UsageError, match="has no place for who its base is"):
        disk.diff("old.qcow2", image_options={"version": "v2"}, hash="sampled")
    with pytest.raises(UsageError, match="'qed' has no place for who the base is"):
        disk.diff("image", format="qed", hash="full")
