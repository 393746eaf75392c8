"""Arguments of a type that cannot be: one line that says so, wherever the disk is, and never a bare Python error."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from cowkit import CowDisk, diff_images
from cowkit.cli.control_commands import KIND_OF_IMAGE
from cowkit.cli.image_arguments import add_image_arguments, asked_kind
from cowkit.diff import ImageChoice, ImageOptions
from cowkit.errors import CheckpointError, CowkitError, UsageError

CALLS: list[tuple[str, tuple[Any, ...], str]] = [
    ("pread", ("1M", 0), "length '1M' is no whole number of bytes"),
    ("pread", (1.5, 0), "length 1.5 is no whole number of bytes"),
    ("pread", (512, 0.0), "offset 0.0 is no whole number of bytes"),
    ("pread", (512, None), "offset None is no whole number of bytes"),
    ("zero", ("1M", 0), "length '1M' is no whole number of bytes"),
    ("zero", (4096.0, 0), "length 4096.0 is no whole number of bytes"),
    ("trim", (4096, "0"), "offset '0' is no whole number of bytes"),
    ("cache", (None, 0), "length None is no whole number of bytes"),
    ("pwrite", ("abc", 0), "what is written is bytes or other contiguous memory, not str"),
    ("pwrite", (b"abc", "0"), "offset '0' is no whole number of bytes"),
    ("dirty_extents", ("0",), "offset '0' is no whole number of bytes"),
    ("dirty_extents", (0, 1.5), "length 1.5 is no whole number of bytes"),
    ("checkpoint", (3,), "checkpoint name 3 is no printable text of 1 to 1023 bytes"),
    ("diff", (None,), "where to write the difference is a path, not None"),
    ("check_diff", (3,), "where to write the difference is a path, not 3"),
]


@pytest.mark.parametrize("server", ["thread", "process"])
def test_a_call_with_an_argument_of_a_wrong_type_is_refused_in_one_line_and_changes_nothing(server: Any) -> None:
    with CowDisk(size="1M", server=server) as disk:
        disk.pwrite(b"there", 4096)
        for method, arguments, says in CALLS:
            with pytest.raises(UsageError) as caught:
                getattr(disk, method)(*arguments)
            assert str(caught.value) == says
        assert disk.pread(5, 4096) == b"there"
        assert (disk.dirty_bytes, disk.checkpoints) == (4096, [])


@pytest.mark.parametrize("server", ["thread", "process"])
def test_what_is_no_checkpoint_is_no_checkpoint_of_the_disk(tmp_path: Path, server: Any) -> None:
    wrong: Any = 3
    with CowDisk(size="1M", server=server) as disk:
        for call in (
            lambda: disk.rollback(wrong),
            lambda: disk.changes(since=wrong),
            lambda: disk.diff(tmp_path / "diff.qcow2", since=wrong),
            lambda: disk.diff(tmp_path / "diff.qcow2", at=wrong),
        ):
            with pytest.raises(CheckpointError, match="the disk has no checkpoint 3"):
                call()


@pytest.mark.parametrize("server", ["thread", "process"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base": CowDisk}, "a base is a path, an NBD URI, or None for a blank disk, not <class"),
        ({"base": 64}, "a base is a path, an NBD URI, or None for a blank disk, not 64"),
        ({"overlay": 3}, "overlay is a path, not 3"),
        ({"tmpdir": 3}, "tmpdir is a path, not 3"),
        ({"base_format": 3}, "base_format is a text, not 3"),
        ({"partition": "x"}, "partition is a whole number, not 'x'"),
        ({"cow_on_read": "no"}, "cow_on_read is True or False, not 'no'"),
        ({"cow_on_cache": None}, "cow_on_cache is True or False, not None"),
        ({"name": 3}, "name is a text, not 3"),
    ],
)
def test_a_disk_of_what_is_of_a_wrong_type_is_refused(server: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(CowkitError, match=says) as caught:
        CowDisk(**({"size": "1M", "server": server} | options))
    assert isinstance(caught.value, UsageError)


def test_the_factory_refuses_a_disk_as_a_base(cow_disk_factory: Any, cow_disk: CowDisk) -> None:
    with pytest.raises(
        UsageError, match="a base is a path, an NBD URI, or None for a blank disk, not <CowDisk 'blank'"
    ):
        cow_disk_factory(cow_disk)


@pytest.mark.filterwarnings("error")
def test_an_option_that_python_refuses_leaves_no_disk_that_complains() -> None:
    with pytest.raises(TypeError, match="sise"):
        CowDisk(sise=1)  # type: ignore[call-arg]


DIFF_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"backing_file": 3}, "backing_file is a path, not 3"),
    ({"backing_format": 3}, "backing_format is a text, not 3"),
    ({"subclusters": "no"}, "subclusters is True or False, not 'no'"),
    ({"standalone": None}, "standalone is True or False, not None"),
    ({"raw": 3}, "raw is True or False, not 3"),
    ({"cluster_size": 3.5}, "cluster size must be a number of bytes or a string such as '64M', not 3.5"),
    ({"compress": 3}, "compress is 'zlib' or 'zstd', not 3"),
    ({"bitmap": 3}, "bitmap is a text, not 3"),
    ({"hash": True}, "hash is 'sampled' or 'full', not True"),
    ({"engine": 3}, "engine is 'native', 'qemu-img' or 'qmp', not 3"),
    ({"format": []}, "format is a text, not []"),
    ({"image_options": "a=b"}, "image_options are a mapping such as {'encrypt.format': 'luks'}, not 'a=b'"),
    ({"image_options": {3: 4}}, "image_options are a mapping such as {'encrypt.format': 'luks'}, not {3: 4}"),
    ({"secret_file": 3}, "secret_file is a path, not 3"),
    ({"progress": 3}, "progress is a function, not 3"),
]


@pytest.mark.parametrize("server", ["thread", "process"])
def test_an_option_of_a_wrong_type_of_a_difference_is_refused_and_nothing_is_written(
    tmp_path: Path, server: Any
) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        *DIFF_OPTIONS,
        ({"changes": "no"}, "changes is True or False, not 'no'"),
        ({"files": 3}, "files is True or False, not 3"),
    ]
    with CowDisk(size="1M", server=server) as disk:
        disk.pwrite(b"there", 4096)
        for options, says in wrong:
            with pytest.raises(UsageError) as caught:
                disk.diff(tmp_path / "diff.qcow2", **options)
            assert str(caught.value) == says
        image: Any = 3
        for call in (lambda: disk.changes(image=image), lambda: disk.check_diff(tmp_path / "diff.qcow2", image=image)):
            with pytest.raises(UsageError, match=r"image is a cowkit\.diff\.ImageOptions, not 3"):
                call()
    assert list(tmp_path.iterdir()) == []


def test_an_argument_of_a_wrong_type_for_images_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    now, base = tmp_path / "now.img", tmp_path / "base.img"
    for each in (now, base):
        each.write_bytes(bytes(8192))
    wrong: list[tuple[dict[str, Any], str]] = [
        *DIFF_OPTIONS,
        ({"now_format": 3}, "now_format is a text, not 3"),
        ({"base_format": []}, "base_format is a text, not []"),
        ({"context": 3}, "context is a text, not 3"),
        ({"now": 3}, "now is a path or an NBD URI, not 3"),
        ({"base": b"base.img"}, "base is a path or an NBD URI, not b'base.img'"),
        ({"path": 3}, "where to write the difference is a path, not 3"),
    ]
    for options, says in wrong:
        with pytest.raises(UsageError) as caught:
            diff_images(**({"now": now, "base": base, "path": tmp_path / "diff.qcow2"} | options))
        assert str(caught.value) == says
    assert sorted(tmp_path.iterdir()) == [base, now]


@pytest.mark.parametrize("server", ["thread", "process"])
def test_an_option_of_a_wrong_type_of_a_server_is_refused_and_none_is_started(tmp_path: Path, server: Any) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"socket": 3}, "socket is a path, not 3"),
        ({"tcp": 10809}, "tcp is a text, not 10809"),
        ({"vsock": "1"}, "vsock is a whole number, not '1'"),
        ({"listeners": 3}, "listeners are sockets in a list, not 3"),
        ({"listeners": ["x"]}, "listeners are sockets in a list, not ['x']"),
        ({"export_name": None}, "export_name is a text, not None"),
        ({"description": 3}, "description is a text, not 3"),
        ({"read_only": "no"}, "read_only is True or False, not 'no'"),
        ({"share": 3}, "share is one of all, export, connection, not 3"),
        ({"share": "export", "max_exports": "x"}, "max_exports is a whole number, not 'x'"),
        ({"tls_certs": 3}, "tls_certs is a path, not 3"),
        ({"tls_psk": []}, "tls_psk is a path, not []"),
        ({"tls_certs": "a\0"}, r"cannot read 'a\x00/server-cert.pem', which TLS needs: no file's name has a NUL"),
        ({"tls_certs": tmp_path, "tls_verify_peer": 3}, "tls_verify_peer is True or False, not 3"),
        ({"tls_certs": tmp_path, "tls": 3}, "TLS is one of on, require, not 3"),
        ({"on_idle": 3}, "on_idle is a function, not 3"),
        ({"start": None}, "start is True or False, not None"),
    ]
    with CowDisk(size="1M", server=server) as disk:
        for options, says in wrong:
            with pytest.raises(UsageError) as caught:
                disk.serve(**options)
            assert str(caught.value) == says


def test_an_image_option_that_there_is_not_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    wrong: Any = {"compres": "zlib"}
    with (
        CowDisk(size="1M") as disk,
        pytest.raises(TypeError, match="no image option 'compres': there are cluster_size,"),
    ):
        disk.diff(tmp_path / "diff.qcow2", **wrong)
    with pytest.raises(TypeError, match="no image option 'compres'"):
        diff_images("now", "base", tmp_path / "diff.qcow2", **wrong)


def test_python_the_control_socket_and_the_command_line_have_the_same_image_options() -> None:
    arguments = argparse.ArgumentParser()
    add_image_arguments(arguments, format_option="--format")
    every_one = (
        "--cluster-size=64K --subclusters --compress=zlib --bitmap=b --no-backing --raw --hash=full --engine=qmp"
    )
    asked = asked_kind(
        arguments.parse_args([*every_one.split(), "--format=qcow2", "--image-option=a=b", "--secret-file=s"])
    )
    members = {name.replace("-", "_") for name in KIND_OF_IMAGE}
    assert {*ImageOptions._fields} == {*ImageChoice.__annotations__} == members == {*asked}
