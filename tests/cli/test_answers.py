"""`cowkit diff --stat`, `--map`, `--svg`, `--files`, `--estimate`, and `cowkit map`."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cowkit import CowDisk
from cowkit.cli.answers import map_lines
from tests.cli.helpers import COWKIT, PATIENCE, Run, Serve, complaint, content, write
from tests.diff.answers.ext_images import EXPECTED, SCRIPT, change_in_place, debugfs, make_image, make_tree

pytestmark = pytest.mark.requires(modules=["nbd"])


def test_stat_says_how_much_and_writes_nothing(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    server = serve(base)
    write(server.uri, b"boo", 4097)
    write(server.uri, base.read_bytes()[8192:12288], 8192)
    done = cowkit("diff", "--stat")
    assert (done.returncode, done.stderr) == (0, "")
    header, disk = (line.split("  ") for line in done.stdout.splitlines())
    assert [cell.strip() for cell in header if cell] == [
        "bytes (extents)",
        "dirty",
        "changed",
        "identical",
        "zeroed",
        "trimmed",
    ]
    assert [cell.strip() for cell in disk if cell] == [
        "disk",
        "8 KiB (1)",
        "4 KiB (1)",
        "4 KiB (1)",
        "0 B (0)",
        "0 B (0)",
    ]
    assert list(tmp_path.iterdir()) == [base]
    assert cowkit("diff", "--stat", "--exit-code").returncode == 1


def test_with_an_output_the_answers_are_of_the_same_moment(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run
) -> None:
    write(serve(base).uri, b"boo", 4097)
    done = cowkit("diff", "-o", "diff.qcow2", "--stat", "--map", "--svg", "picture.svg", "--json")
    report = json.loads(done.stdout)
    assert report["changes"]["changed"] == report["changed"] == [{"offset": 4096, "length": 4096, "kind": "data"}]
    assert content(tmp_path / "diff.qcow2", base)[4097:4100] == b"boo"
    ET.parse(tmp_path / "picture.svg")


def test_the_map_is_plain_text_in_a_pipe(base: Path, serve: Serve, cowkit: Run) -> None:
    write(serve(base).uri, b"x" * (1 << 19), 1 << 19)
    lines = cowkit("map", "--base", base).stdout.splitlines()
    assert lines[0] == "1 MiB: 512 KiB in 1 extent changed, 0 B of it zeroed; 0 B more written but the same"
    assert lines[1] == "·" * 40 + "█" * 40
    assert lines[2].startswith("· unchanged")


def test_the_map_is_as_wide_as_the_terminal_and_in_colours(base: Path, serve: Serve, tmp_path: Path) -> None:
    write(serve(base).uri, b"x" * (1 << 19), 1 << 19)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "60", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    try:
        process = subprocess.Popen([*COWKIT, "map"], stdout=theirs, cwd=tmp_path, env=environment)
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # EIO: the other end is closed
                break
            if not part:
                break
            seen += part
        assert process.wait(PATIENCE) == 0
    finally:
        os.close(ours)
    assert "█" * 30 in seen.decode().replace("\x1b[33m", "").replace("\x1b[0m", "")
    assert b"\x1b[33m" in seen


def test_a_map_marks_partitions() -> None:
    with CowDisk(size="8M") as disk:
        mbr = bytearray(512)
        mbr[446:462] = b"\0\0\0\0\x83\0\0\0" + (2048).to_bytes(4, "little") + (4096).to_bytes(4, "little")
        mbr[510:512] = b"\x55\xaa"
        disk.pwrite(mbr, 0)
        report = disk.changes()
    lines = [line for line, _ in map_lines(report, 40)]
    assert lines[1].strip("·") != ""
    assert lines[2] == "     [1-------]"
    assert lines[3] == "partition 1: unknown content, 2 MiB; 0 B in 0 extents of the disk's data"
    assert lines[4] == "·" * 40
    assert report.partition_table == "added"


def test_a_kept_difference_is_drawn_without_a_server(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    write(serve(base).uri, b"x", 0)
    assert cowkit("diff", "-o", "diff.qcow2", "--cluster-size", "4K").returncode == 0
    report = json.loads(cowkit("map", "diff.qcow2", "--json").stdout)
    assert report["changed"] == [{"offset": 0, "length": 4096, "kind": "data"}]
    assert "4 KiB in 1 extent changed" in cowkit("map", "diff.qcow2").stdout
    assert cowkit("map", "diff.qcow2", "--svg", "it.svg").stdout == ""
    assert "diff.qcow2: what changed" in (tmp_path / "it.svg").read_text()


def test_checkpoints_bound_what_is_answered(base: Path, serve: Serve, cowkit: Run) -> None:
    server = serve(base)
    write(server.uri, b"x", 0)
    cowkit("checkpoint", "one")
    write(server.uri, b"x", 65536)
    assert [each["offset"] for each in json.loads(cowkit("map", "--since", "one", "--json").stdout)["changed"]] == [
        65536
    ]
    assert [
        each["offset"] for each in json.loads(cowkit("diff", "--stat", "--at", "one", "--json").stdout)["changed"]
    ] == [0]


def test_an_estimate_is_the_size_of_what_is_written_then(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    write(serve(base).uri, b"x" * 100_000, 5000)
    for options in (
        ("--subclusters",),
        ("--compress", "zlib"),
        ("--raw",),
        ("--format", "rbd"),
        ("--cluster-size", "8K"),
    ):
        report = json.loads(cowkit("diff", "--estimate", "--json", *options).stdout)
        assert cowkit("diff", "-o", "out", *options).returncode == 0
        assert report["estimate"]["file_size"] == (tmp_path / "out").stat().st_size
    assert cowkit("diff", "--estimate").stdout.startswith("the image would have ")


@pytest.mark.requires("mke2fs", "debugfs", "e2image")
def test_files_names_exactly_the_files_that_a_script_changed(tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    image = make_image(tmp_path / "disk.img", make_tree(tmp_path / "tree"), "-t", "ext4")
    changed = Path(shutil.copyfile(image, tmp_path / "changed.img"))
    debugfs(changed, SCRIPT)
    change_in_place(changed, "/deep/er/in place")
    server = serve(image)
    before, after = image.read_bytes(), changed.read_bytes()
    for at in range(0, len(after), 4096):
        if after[at : at + 4096] != before[at : at + 4096]:
            write(server.uri, after[at : at + 4096], at)
    done = cowkit("diff", "--base", image, "--files")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.partition("  (")[0] for line in done.stdout.splitlines()]
    assert sorted(line.rpartition(" /")[2].rstrip("/") for line in lines) == sorted(path[1:] for path in EXPECTED)
    assert "M /deep/er/in place  (content)" in done.stdout.splitlines()
    assert "R /moved -> /after" in done.stdout.splitlines()
    report = json.loads(cowkit("diff", "-o", "d.qcow2", "--files", "--json").stdout)
    assert {each["path"] for each in report["changes"]["files"][0]["changes"]} == set(EXPECTED)


def test_what_cannot_be_told_is_a_line_on_standard_error_and_status_2(base: Path, serve: Serve, cowkit: Run) -> None:
    write(serve(base).uri, b"x", 0)
    done = cowkit("diff", "--files")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cowkit: disk: no known file system, so its files cannot be told\n"


@pytest.mark.requires("sfdisk", "mke2fs", "debugfs")
def test_what_cannot_be_told_of_one_partition_is_status_2_and_the_others_are_told(
    tmp_path: Path, serve: Serve, cowkit: Run
) -> None:
    disk = tmp_path / "two.img"
    with disk.open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["sfdisk", "-q", disk], input="start=2048,size=16384\nstart=20480\n", text=True, check=True)
    subprocess.run(["mke2fs", "-q", "-E", "offset=1048576", disk, "8192k"], check=True, capture_output=True)
    server = serve(disk)
    write(server.uri, b"LUKS\xba\xbe", 20480 * 512)
    done = cowkit("diff", "--files")
    assert (done.returncode, done.stdout) == (2, "partition 1 (ext2): no file changed\n")
    assert done.stderr == "cowkit: partition 2: it holds an encrypted volume, which is not looked into\n"


@pytest.mark.parametrize(
    ("magic", "at", "place", "told"),
    [
        (b"SWAPSPACE2", 4086, 16384, "no files here (swap)\n"),
        (b"SWAPSPACE2", 4086, None, "no files here (swap)\n"),
        (b"LUKS\xba\xbe", 0, None, "nothing changed (luks)\n"),
        (b"LABELONE", 512, None, "nothing changed (lvm)\n"),
        (b"", 0, None, "no known file system, and nothing changed\n"),
    ],
)
def test_what_is_no_file_system_is_not_said_to_have_files_that_did_not_change(
    tmp_path: Path, serve: Serve, cowkit: Run, magic: bytes, at: int, place: int | None, told: str
) -> None:
    disk = tmp_path / "other.img"
    disk.write_bytes((bytes(at) + magic).ljust(1 << 20, b"\0"))
    server = serve(disk)
    if place is not None:
        write(server.uri, b"paged out", place)
    done = cowkit("diff", "--files")
    assert (done.returncode, done.stdout, done.stderr) == (0, told, "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "nothing to do: give -o OUT"),
        (("-o", "x", "--estimate"), "--estimate tells how large OUT would be"),
        (("--stat", "--raw"), "--raw says what kind of image"),
        (("--stat", "--backing", "x"), "--backing and --backing-format are for what -o writes"),
        (("-o", "x", "--raw", "--format", "qcow2"), "a raw file is not of the format 'qcow2'"),
        (("-o", "x", "--format", "rbd", "--subclusters"), "a difference for rbd has no subclusters"),
        (("--estimate", "--cluster-size", "5K"), "is no power of two"),
        (("--stat", "--svg", "/nowhere/x.svg"), "there is no directory /nowhere"),
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_is_refused_in_a_line(
    base: Path, serve: Serve, cowkit: Run, arguments: tuple[str, ...], told: str
) -> None:
    serve(base)
    done = cowkit("diff", *arguments)
    assert told in (complaint(done) if not done.stdout else done.stderr)
    assert done.returncode == 2


@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_a_picture_never_replaces_what_it_is_of(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run, link: Callable[[Path, Path], None] | None
) -> None:
    server = serve("disk.img")
    assert cowkit("diff", "-o", "d1.qcow2").returncode == 0
    assert cowkit("diff", "--base", "d1.qcow2", "-o", "d2.qcow2").returncode == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("disk.img", "d1.qcow2", "d2.qcow2")}

    def refused(name: str, *arguments: object) -> None:
        picture = tmp_path / name
        if link is not None:
            picture = tmp_path / "picture.svg"
            link(tmp_path / name, picture)
        said = complaint(cowkit(*arguments, "--svg", picture))
        why = said.removeprefix(f"cannot write {picture}: it is the ")
        assert why.startswith(("same file as ", "base of the disk disk.img that "))
        assert why.endswith(("still needed", f" process {server.pid} serves; end that first"))
        if link is not None:
            picture.unlink()
        assert {each: (tmp_path / each).read_bytes() for each in before} == before

    for command in ("diff", "map"):
        refused("disk.img", command)
        refused("disk.img", command, "--base", "disk.img")
        refused("disk.img", command, "--from", server.uri)
    refused("disk.img", "diff", "-o", "d3.qcow2")
    refused("d1.qcow2", "diff", "-o", "d1.qcow2")
    refused("d1.qcow2", "diff", "--base", "d1.qcow2")
    refused("disk.img", "diff", "--base", "d1.qcow2")
    for name in before:
        refused(name, "map", "d2.qcow2")
        refused(name, "diff", "--base", "d1.qcow2", "--from", "d2.qcow2")
    assert not (tmp_path / "d3.qcow2").exists()


@pytest.mark.parametrize(
    "arguments", [("diff",), ("map",), ("map", "d.qcow2"), ("diff", "-o", "d.qcow2")], ids=" ".join
)
def test_a_picture_is_not_written_to_standard_output(
    tmp_path: Path, serve: Serve, cowkit: Run, base: Path, arguments: tuple[str, ...]
) -> None:
    serve(base)
    assert "a picture cannot be written to standard output" in complaint(cowkit(*arguments, "--svg", "-"))
    assert list(tmp_path.iterdir()) == [base]


# The schema


def properties_of(schema: dict[str, Any], definition: str) -> set[str]:
    """The members that the schema tells of."""
    found = schema["$defs"][definition]
    names = set(found["properties"])
    for other in found.get("allOf", ()):
        names |= properties_of(schema, other["$ref"].rpartition("/")[2])
    return names


@pytest.mark.requires("mke2fs", "debugfs", modules=["jsonschema"])
def test_what_json_prints_is_as_the_schema_has_it(tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    import jsonschema

    schema = json.loads(cowkit("diff", "--json-schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    image = make_image(tmp_path / "disk.img", make_tree(tmp_path / "tree"), "-t", "ext4")
    changed = Path(shutil.copyfile(image, tmp_path / "changed.img"))
    change_in_place(changed, "/same")
    server = serve(image)
    at = next(
        at
        for at in range(0, 24 << 20, 4096)
        if changed.read_bytes()[at : at + 4096] != image.read_bytes()[at : at + 4096]
    )
    write(server.uri, changed.read_bytes()[at : at + 4096], at)
    outputs = [
        ("diff_report", cowkit("diff", "-o", "d.qcow2", "--json")),
        ("diff_report", cowkit("diff", "-o", "d.qcow2", "--json", "--files", "--stat")),
        ("changes_report", cowkit("diff", "--json", "--files", "--estimate")),
        ("changes_report", cowkit("map", "--json")),
        ("changes_report", cowkit("map", "d.qcow2", "--json")),
    ]
    for definition, done in outputs:
        report = json.loads(done.stdout)
        jsonschema.validate(report, schema)
        assert set(report) <= properties_of(schema, definition)
        assert set(report) >= properties_of(schema, definition) - {"changes"}
    for each in report["partitions"]:
        assert set(each) == properties_of(schema, "partition")
