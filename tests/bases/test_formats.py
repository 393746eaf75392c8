"""Which format a base has: name and content agree, or the user says it, or an error asks."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cowkit.bases import open_base
from cowkit.bases.formats import FORMATS, detect, known_format
from cowkit.disk import FileBase
from cowkit.errors import BaseError, BaseOpenError, UsageError
from tests.bases.helpers import qemu_img, write_compressed

GUEST_QCOW2 = struct.pack(">IIQI", 0x514649FB, 3, 104, 11).ljust(104, b"\0") + b"/etc/passwd"


def test_a_raw_file_is_a_plain_file_base(raw: Path) -> None:
    base = open_base(raw)
    assert type(base) is FileBase
    assert (base.backing_format, base.backing_refusal) == ("raw", None)
    base.release()


@pytest.mark.parametrize("name", ["disk.img", "disk", "disk.raw", "disk.vmdk", "disk.xz"])
def test_a_qcow2_header_that_a_guest_wrote_into_a_raw_disk_is_not_believed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(GUEST_QCOW2.ljust(4096, b"\0"))
    with pytest.raises(
        BaseOpenError, match=r"begins like a qcow2 image and its name .*base_format='qcow2' or base_format='raw'"
    ):
        open_base(path)
    base = open_base(path, format="raw")
    assert base.pread(104, 0) == GUEST_QCOW2[:104]
    base.release()


@pytest.mark.parametrize("shape", ["xz", "gz", "bz2", "zst", "zst-frames"])
def test_a_raw_disk_that_begins_like_a_compressed_file_is_asked_about(
    tmp_path: Path, content: bytes, shape: str
) -> None:
    path = write_compressed(tmp_path / "disk.img", content, shape)
    with pytest.raises(BaseOpenError, match="say which it is"):
        open_base(path)
    raw_base, decoded = open_base(path, format="raw"), open_base(path, format=shape.partition("-")[0])
    assert raw_base.size == path.stat().st_size
    assert decoded.size == len(content)
    raw_base.release()
    decoded.release()


@pytest.mark.parametrize("name", ["disk.qcow2", "disk.XZ", "disk.vhd", "disk.zst", "disk.vdi"])
def test_a_name_that_the_content_belies_is_asked_about(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(4096))
    with pytest.raises(
        BaseOpenError, match="does not begin like one: if it is a raw disk, say so with base_format='raw'"
    ):
        open_base(path)
    base = open_base(path, format="raw")
    assert base.size == 4096
    base.release()


@pytest.mark.requires("qemu-img")
def test_a_compressed_qcow2_image_is_not_taken_for_a_raw_disk(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    path = write_compressed(tmp_path / "disk.qcow2.gz", image.read_bytes(), "gz")
    other = write_compressed(tmp_path / "disk.img.gz", image.read_bytes(), "gz")
    for each in (path, other):
        with pytest.raises(BaseOpenError, match="seems to hold a qcow2 file and no raw disk: decompress it first"):
            open_base(each)
        base = open_base(each, format="gz")
        assert base.size == image.stat().st_size
        base.release()


def test_a_format_that_is_none_is_refused(raw: Path) -> None:
    with pytest.raises(UsageError, match=r"base format 'qcow3' is none of raw, xz, "):
        open_base(raw, format="qcow3")
    assert known_format("GZIP") == "gz"
    assert known_format("vhd") == "vpc"


def test_what_is_no_file_is_refused_in_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.qcow2"):
        with pytest.raises(BaseOpenError) as caught:
            open_base(path)
        assert "\n" not in str(caught.value)


@given(
    st.sampled_from(["disk.img", "a.qcow2", "a.xz", "a.gz", "a.zst", "a.bz2", "a.vhd", "a.vdi", "a.dmg", "a.vmdk"]),
    st.one_of(
        st.binary(max_size=600),
        st.sampled_from([b"QFI\xfb", b"\xfd7zXZ\0", b"\x1f\x8b", b"BZh9", b"conectix", b"\x50\x2a\x4d\x18", b"KDMV"]),
    ),
)
@example("disk.img", b"")
def test_whatever_the_bytes_a_format_comes_from_a_name_that_claims_it_or_is_raw(name: str, head: bytes) -> None:
    try:
        found = detect(name, head, head)
    except BaseError as error:
        complaint = str(error)
        assert "\n" not in complaint
        return
    assert found in FORMATS
    assert found == "raw" or name.endswith(found.replace("vpc", "vhd"))


def test_a_raw_base_imports_nothing_for_the_other_kinds(raw: Path) -> None:
    program = (
        "import sys\n"
        "import cowkit, tempfile\n"
        "before = set(sys.modules)\n"
        "from cowkit.bases import open_base\n"
        "open_base(sys.argv[1]).release()\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}),"
        " *[name for name in sys.modules if name.startswith('cowkit.bases.')])"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(raw)], check=True, capture_output=True, text=True)
    loaded = set(ran.stdout.split())
    assert not loaded & {"nbd", "xz", "lzma", "bz2", "indexed_gzip", "indexed_bzip2", "backports", "subprocess", "json"}
    assert loaded & {"cowkit.bases.opening", "cowkit.bases.compressed", "cowkit.bases.image"} == {
        "cowkit.bases.opening"
    }
