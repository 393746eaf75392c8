"""`cowkit diff --from` what no cowkit serves."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bases.helpers import nbdkit
from tests.cli.helpers import COWKIT, PATIENCE, ROOT, Run, Serve, complaint, content, write
from tests.keeping.helpers import overlay, run, same, write_to_image
from tests.keeping.lying_server import data, lying_server

pytestmark = pytest.mark.requires("qemu-img", "qemu-nbd", "qemu-io", modules=["nbd"])


@pytest.mark.requires("nbdkit")
def test_the_export_of_another_server_is_kept(base: Path, tmp_path: Path, cowkit: Run) -> None:
    with nbdkit("--filter=cow", "file", base) as (uri, _):
        write(uri, b"boo", 4097)
        done = cowkit("diff", "--base", "disk.img", "--from", uri, "-o", "diff.qcow2")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("diff.qcow2: 4 KiB changed in 1 extent on top of disk.img\n")
        wanted = bytearray(base.read_bytes())
        wanted[4097:4100] = b"boo"
        assert content(tmp_path / "diff.qcow2", base) == wanted
        next_one = cowkit("diff", "--base", "diff.qcow2", "--from", uri, "-o", "next.qcow2", "--json", "--exit-code")
    report = json.loads(next_one.stdout)
    assert (next_one.returncode, report["changed_bytes"]) == (0, 0)
    assert (report["backing_file"], report["backing_format"]) == ("diff.qcow2", "qcow2")
    same(tmp_path / "next.qcow2", tmp_path / "diff.qcow2")


def test_another_size_is_a_change(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    size = base.stat().st_size
    smaller = tmp_path / "smaller.img"
    smaller.write_bytes(base.read_bytes()[:-4096])
    ask = ("diff", "--base", base, "--exit-code")
    done = cowkit(*ask, "--from", smaller, "--stat")
    assert done.returncode == 1
    line = f"the size changed: {size - 4096} bytes, 4096 less than before ({size})"
    assert done.stdout.splitlines()[-1] == line
    done = cowkit(*ask, "--from", smaller, "-o", "d.qcow2")
    assert (done.returncode, done.stdout.splitlines()[1].strip()) == (1, line)
    odd, sector = tmp_path / "odd.img", tmp_path / "sector.img"
    odd.write_bytes(base.read_bytes()[: size - 100])
    sector.write_bytes(odd.read_bytes().ljust(size, b"\0"))
    image = tmp_path / "sector.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", sector, image], check=True)
    for source, resized in ((image, False), (sector, True)):  # an image is not known to the byte, a raw file is
        done = cowkit("diff", "--base", odd, "--exit-code", "--from", source, "--stat", "--json")
        report = json.loads(done.stdout)
        assert (done.returncode, report["resized"], report["base_size"]) == (resized, resized, size - 100)
    serve(base, "--size", str(size + 5000))
    done = cowkit(*ask, "--stat", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["changed_bytes"], report["resized"]) == (1, 0, True)
    assert (report["size"], report["base_size"]) == (size + 5000, size)
    assert "(was " in cowkit("map").stdout


def test_a_source_that_ends_inside_the_last_sector_of_the_base_has_changed(
    base: Path, tmp_path: Path, cowkit: Run
) -> None:
    noise = os.urandom(3000)
    longer, shorter = tmp_path / "longer.img", tmp_path / "shorter.img"
    longer.write_bytes(noise)
    shorter.write_bytes(noise[:2999])
    done = cowkit("diff", "--base", longer, "--from", shorter, "-o", "d.qcow2", "--exit-code", "--json")
    assert (done.returncode, json.loads(done.stdout)["resized"]) == (1, True)
    for now, before, status in ((shorter, longer, 1), ("d.qcow2", longer, 1), ("d.qcow2", shorter, 0)):
        done = cowkit("diff", "--base", before, "--from", now, "--stat", "--exit-code", "--json")
        assert (done.returncode, json.loads(done.stdout)["resized"]) == (status, bool(status)), (now, before)
    done = cowkit("verify", "d.qcow2", "--base", longer, "--against", longer)
    assert done.stdout.splitlines()[:-1] == [f"1 byte at 2999 differs: cowkit reads it otherwise than {longer} does"]


def test_images_are_kept_with_all_options(base: Path, tmp_path: Path, cowkit: Run) -> None:
    image = overlay(tmp_path / "overlay.qcow2", base)
    write_to_image(image, {8192: 5000})
    os.rename(image, tmp_path / "overlay")
    done = cowkit(
        *(
            "diff",
            "--base",
            base,
            "--base-format",
            "raw",
            "--from",
            "overlay",
            "--from-format",
            "qcow2",
            "-o",
            "d.qcow2",
        ),
        *("--cluster-size", "4K", "--bitmap", "b", "--backing", "copy.img", "--json", "--exit-code"),
    )
    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (
        1,
        "cowkit: d.qcow2 cannot be read as long as its backing file copy.img is not there\n",
    )
    assert (report["cluster_size"], report["changed_bytes"], report["backing_file"]) == (4096, 8192, "copy.img")
    os.link(base, tmp_path / "copy.img")
    same(tmp_path / "d.qcow2", tmp_path / "overlay")
    assert cowkit("diff", "--base", base, "--from", base, "-o", "e.qcow2", "--exit-code").returncode == 0
    for options in (("--no-backing", "--compress", "zlib"), ("--subclusters",)):
        arguments = ("--base", base, "--from", "overlay", "--from-format", "qcow2", "-o", "f.qcow2")
        assert cowkit("diff", *arguments, *options).returncode == 0
        same(tmp_path / "f.qcow2", tmp_path / "overlay")


def test_a_bitmap_is_believed_if_asked_for(base: Path, tmp_path: Path, cowkit: Run) -> None:
    image = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", base, image)
    write_to_image(image, {0: 512})
    run("qemu-img", "bitmap", "-f", "qcow2", "--add", image, "b")
    write_to_image(image, {65536: 512})
    arguments = ("--base", base, "--from", image, "-o", "d.qcow2", "--json")
    changed = json.loads(cowkit("diff", *arguments).stdout)["changed"]
    assert [each["offset"] for each in changed] == [0, 65536]
    changed = json.loads(cowkit("diff", *arguments, "--from-context", "qemu:dirty-bitmap:b").stdout)["changed"]
    assert [each["offset"] for each in changed] == [65536]


@pytest.mark.parametrize("spelling", ["nbd+unix://?socket={}", "nbd+unix:///?socket={}"])
def test_a_disk_that_cowkit_serves_is_asked_for_what_it_knows(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run, spelling: str
) -> None:
    server = serve(base, "--socket", tmp_path / "sock")
    write(server.uri, b"boo", 4097)
    (tmp_path / "link").symlink_to(tmp_path / "sock")
    for name in ("sock", "link"):
        uri = spelling.format(tmp_path / name)
        done = cowkit("diff", "--base", base, "--from", uri, "-o", "d.qcow2", "--json")
        assert json.loads(done.stdout)["bytes_read"] < 1 << 18, "all that is dirty, and no more"
        said = complaint(cowkit("diff", "--from", uri, "-o", "d.qcow2", "--base-format", "raw"))
        assert "--base-format is for a source that no cowkit serves" in said


@pytest.mark.parametrize("named", [True, False])
def test_a_disk_that_cowkit_serves_is_kept_on_top_of_an_earlier_difference(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run, named: bool
) -> None:
    server = serve("disk.img")
    write(server.uri, b"one", 4097)
    assert cowkit("diff", "--base", "disk.img", "-o", "d1.qcow2").returncode == 0
    assert cowkit("checkpoint", "two", "--base", "disk.img").returncode == 0
    write(server.uri, b"two", 65536)
    source = ("--from", server.uri) if named else ()
    done = cowkit("diff", "--base", "d1.qcow2", *source, "-o", "d2.qcow2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert [each["offset"] for each in report["changed"]] == [65536]
    assert (report["backing_file"], report["backing_format"]) == ("d1.qcow2", "qcow2")
    assert report["bytes_read"] <= 4 * 65536, "what the two differences hold"
    assert cowkit("diff", "--base", "disk.img", "-o", "all.qcow2").returncode == 0
    same(tmp_path / "d2.qcow2", tmp_path / "all.qcow2")
    at = cowkit("diff", "--base", "d1.qcow2", *source, "--at", "two", "-o", "d3.qcow2", "--exit-code")
    assert (at.returncode, at.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.glob("*.qcow2")) == ["all.qcow2", "d1.qcow2", "d2.qcow2", "d3.qcow2"]
    assert not list(tmp_path.glob(".cowkit*"))


def test_a_blank_disk_is_kept_on_top_of_its_earlier_difference(tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    server = serve("--size", "1M")
    for number, source in enumerate(((), (), ("--from", "blank"), ("--from", server.uri))):
        write(server.uri, b"boo", number << 16)
        before = ("--base", f"d{number - 1}.qcow2") if number else ()
        done = cowkit("diff", *before, *source, "-o", f"d{number}.qcow2", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert [each["offset"] for each in json.loads(done.stdout)["changed"]] == [number << 16]
    assert cowkit("diff", "-o", "all.qcow2").returncode == 0
    same(tmp_path / "d3.qcow2", tmp_path / "all.qcow2")
    other = tmp_path / "other.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", other, "2M"], check=True)
    assert "no server matches base other.qcow2" in complaint(cowkit("diff", "--base", "other.qcow2", "--stat"))
    done = cowkit("diff", "--base", "other.qcow2", "--from", "blank", "--stat", "--json")  # where it is said which
    assert (done.returncode, json.loads(done.stdout)["resized"]) == (0, True)


@pytest.mark.parametrize("window", [(), ("--partition", "1"), ("--size", "1M")], ids=["file", "partition", "blank"])
def test_a_disk_that_cowkit_serves_is_compared_with_another_base(
    base: Path, tmp_path: Path, serve: Serve, cowkit: Run, window: tuple[str, ...]
) -> None:
    content = bytearray(base.read_bytes())
    content[446:510] = bytes(64)
    content[446:462] = b"\0\0\0\0\x83\0\0\0" + (8).to_bytes(4, "little") + (1024).to_bytes(4, "little")
    content[510:512] = b"\x55\xaa"
    base.write_bytes(content)
    server = serve(*window) if "--size" in window else serve("disk.img", *window)
    write(server.uri, b"boo", 4097)
    now = bytearray({(): content, ("--size", "1M"): bytes(1 << 20)}.get(window, content[4096 : 4096 + (1024 << 9)]))
    (tmp_path / "same.img").write_bytes(now)
    now[4097:4100] = b"boo"
    (tmp_path / "now.img").write_bytes(now)
    for source in (server.uri, server.uri.replace("nbd+unix:///", "nbd+unix://")):
        done = cowkit("diff", "--base", "same.img", "--from", source, "-o", "d.qcow2", "--json", "--base-format", "raw")
        assert (done.returncode, done.stderr) == (0, "")
        report = json.loads(done.stdout)
        assert (report["backing_file"], report["changed"][0]["offset"], report["changed_extents"]) == (
            "same.img",
            4096,
            1,
        )
        same(tmp_path / "d.qcow2", tmp_path / "now.img", other_format="raw")
    assert cowkit("diff", "--base", "now.img", "--from", server.uri, "--stat", "--exit-code").returncode == 0
    said = complaint(cowkit("diff", "--base", "now.img", "--from", server.pid, "-o", "d.qcow2"))
    assert said.endswith("; leave out --base, or --from"), "a process id chooses a disk, of another base than this"
    assert not list(tmp_path.glob(".cowkit*"))


def test_a_map_takes_the_same_sources_as_diff(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    def drawn(*arguments: object) -> list[int]:
        done = cowkit("map", *arguments, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        return [each["offset"] for each in json.loads(done.stdout)["changed"]]

    server = serve("disk.img")
    write(server.uri, b"one", 4097)
    assert cowkit("diff", "-o", "d1.qcow2").returncode == 0
    write(server.uri, b"two", 65536)
    assert drawn("--base", "d1.qcow2") == [65536]
    assert drawn("--base", "disk.img", "--from", "d1.qcow2") == [4096]
    assert drawn("--base", "disk.img", "--from", "d1.qcow2", "--from-format", "qcow2") == [4096]
    said = complaint(cowkit("map", "--base", "disk.img", "--from", "d1.qcow2", "--svg", "d1.qcow2"))
    assert "it is the same file as d1.qcow2" in said
    assert cowkit("diff", "-o", "alone.qcow2", "--no-backing").returncode == 0
    assert cowkit("map", "alone.qcow2").stdout.startswith("1 MiB: 1 MiB in 1 extent of the disk's data, ")
    assert cowkit("map", "alone.qcow2", "--svg", "it.svg").returncode == 0
    assert "alone.qcow2: its data" in (tmp_path / "it.svg").read_text()


def test_what_makes_no_sense_is_one_clear_line(base: Path, tmp_path: Path, serve: Serve, cowkit: Run) -> None:
    def said(*arguments: object) -> str:
        return complaint(cowkit("diff", *arguments, "-o", "d.qcow2"))

    assert f"to compare {base} itself with a base, give --base" in said("--from", base)
    uri = "nbd+unix:///?socket=/nowhere"
    assert f"to compare {uri} itself with a base, give --base" in said("--from", uri)
    assert f"cannot open source {uri}: " in said("--from", uri, "--base", base)
    for option in ("--since", "--at"):
        assert f"{option} names a checkpoint of a disk that cowkit serves" in said(
            "--from", uri, "--base", base, option, "x"
        )
    assert "--from-context is for a source that no cowkit serves" in said("--from-context", "qemu:dirty-bitmap:b")
    assert "does not tell what changed" in said("--from", base, "--base", base, "--from-context", "base:allocation")
    assert "cannot open base none.img: No such file" in said("--from", base, "--base", "none.img")
    for missing in ("none.img", "./none"):
        told = said("--from", missing, "--base", base)
        assert f"no server matches --from {missing}, and there is no file {missing}; `cowkit ls`" in told
    assert "no server matches --from ., and . is no image file" in said("--from", ".", "--base", base)
    assert "no server matches --from none with base" in said("--from", "none", "--base", base)
    assert not (tmp_path / "d.qcow2").exists()
    assert "it is the same file as" in complaint(cowkit("diff", "--from", base, "--base", base, "-o", base))


def test_a_server_that_goes_leaves_the_old_output(base: Path, tmp_path: Path, cowkit: Run) -> None:
    output = tmp_path / "d.qcow2"
    output.write_bytes(b"the old one")
    base.write_bytes(bytes(8 << 20))
    with lying_server(itertools.repeat(8 << 20), read=lambda *at: data(*at) if at[0] < 4 << 20 else None) as uri:
        said = complaint(cowkit("diff", "--base", base, "--from", uri, "-o", "d.qcow2"))
    assert said.startswith(f"cannot read source {uri} at byte ")
    assert said.endswith("the NBD server behind it has gone, or broke the protocol")
    assert output.read_bytes() == b"the old one"


def test_ctrl_c_ends_it_though_the_server_does_not_answer(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "d.qcow2"
    output.write_bytes(b"the old one")
    read_end, write_end = os.pipe()

    def asked(offset: int, length: int) -> bytes:
        os.write(write_end, b"!")
        return b""  # and no more

    with lying_server(itertools.repeat(1 << 20), read=asked) as uri:
        process = subprocess.Popen([*COWKIT, "diff", "--base", base, "--from", uri, "-o", output], cwd=tmp_path)
        assert os.read(read_end, 1) == b"!"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    os.close(read_end)
    os.close(write_end)
    assert output.read_bytes() == b"the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.qcow2", "disk.img"]


def test_without_libnbd_it_is_said_how_to_get_it(base: Path, tmp_path: Path) -> None:
    (tmp_path / "nbd.py").write_text("raise ImportError\n")
    done = subprocess.run(
        [sys.executable, "-m", "cowkit.cli.main", "diff", "--base", base, "--from", "nbd://localhost", "-o", "d.qcow2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        check=False,
    )
    assert "apt install python3-libnbd" in complaint(done)


def test_a_socket_file_is_no_image(tmp_path: Path, base: Path, cowkit: Run) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "s"))
        assert "cannot reach a server at" in complaint(cowkit("diff", "--base", base, "--from", "s", "-o", "d.qcow2"))
