"""The backing file that a user names: what of it is recorded, and what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cowkit import CowDisk, diff_images
from cowkit.diff.options import EngineName
from cowkit.errors import UsageError

NAME = "Bä se: x.img"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / NAME
    path.write_bytes(bytes(range(256)) * 4096)
    return path


def compare(one: Path, other: Path) -> None:
    subprocess.run(["qemu-img", "compare", "-q", one, other], check=True)


@pytest.mark.requires("qemu-img", "qemu-storage-daemon", "qemu-nbd")
@pytest.mark.parametrize("engine", ["native", "qemu-img", "qmp"])
def test_a_colon_in_a_relative_name_is_no_protocol_to_qemu(base: Path, tmp_path: Path, engine: EngineName) -> None:
    one, two, kept, now = (tmp_path / name for name in ("one.qcow2", "two.qcow2", "one: kept.qcow2", "now.img"))
    with CowDisk(base) as disk:
        disk.pwrite(b"earlier", 70_000)
        point = disk.checkpoint("point")
        assert disk.diff(one, backing_file=NAME, engine=engine).backing_file == f"./{NAME}"
        disk.diff(kept, backing_file=f"./{NAME}", engine=engine)
        disk.diff(now, raw=True)
        compare(one, now)
        disk.pwrite(b"later", 700_000)
        assert disk.diff(two, since=point, backing_file=kept.name, engine=engine).backing_file == f"./{kept.name}"
        disk.diff(now, raw=True)
        compare(two, now)
    assert diff_images(now, base, one, backing_file=NAME, engine=engine).backing_file == f"./{NAME}"
    compare(one, now)


def test_what_may_be_a_protocol_is_recorded_as_it_is(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        for name in ("rbd:pool/image", "nbd:localhost:10809", "sub/a:b.img", "nbd://localhost/x"):
            assert disk.diff(tmp_path / "d.qcow2", backing_file=name).backing_file == name


@pytest.mark.parametrize("name", [NAME, "not yet.img", "nbd://localhost/x"])
def test_a_format_that_nobody_knows_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    with CowDisk(base) as disk:
        for format in ("foo", "xz", "RAW"):
            with pytest.raises(UsageError, match=f"backing format '{format}' is none that QEMU knows: raw, qcow2, "):
                disk.diff(tmp_path / "d.qcow2", backing_file=name, backing_format=format)
        assert not (tmp_path / "d.qcow2").exists()
        assert (
            disk.diff(tmp_path / "d.qcow2", backing_file="not yet.img", backing_format="vmdk").backing_format == "vmdk"
        )
