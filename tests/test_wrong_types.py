"""Arguments of a type that cannot be: one line that says so, wherever the disk is, and never a bare Python error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cowkit import CowDisk
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
    ],
)
def test_a_disk_of_what_is_no_path_is_refused(server: Any, options: dict[str, Any], says: str) -> None:
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
