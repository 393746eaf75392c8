"""Differences between a base and what no cowkit serves: other people's servers, and images of other formats."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cowkit
from cowkit.diff import ImageOptions
from cowkit.disk import Kind
from cowkit.errors import BaseOpenError, OutputError, UsageError
from tests.bases.helpers import nbdkit
from tests.keeping.helpers import MIB, keep, noise_file, overlay, qemu_nbd, run, same, write, write_to_image

pytestmark = pytest.mark.requires("qemu-img", "qemu-nbd", "qemu-io", modules=["nbd"])

SIZE = 8 * MIB


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return noise_file(tmp_path / "disk.img", SIZE)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "diff.qcow2"


CHANGES: dict[int, bytes | int] = {
    4097: b"boo",
    MIB - 1: b"over the edge" * 1000,
    SIZE // 2 + 65536: b"in the hole",
    2 * MIB: 200_000,
    SIZE - 1: b"!",
}


def expected(base: Path) -> bytes:
    content = bytearray(base.read_bytes())
    for offset, change in CHANGES.items():
        length = change if isinstance(change, int) else len(change)
        content[offset : offset + length] = bytes(length) if isinstance(change, int) else change
    return bytes(content)


# Servers


@pytest.mark.requires("nbdkit")
@pytest.mark.parametrize("filters", [(), ("--filter=noextents",), ("--filter=multi-conn", "multi-conn-mode=disable")])
def test_nbdkits_cow_filter_gives_what_rebase_gives(
    base: Path, output: Path, tmp_path: Path, filters: tuple[str, ...]
) -> None:
    names = [each for each in filters if each.startswith("--")]
    settings = [each for each in filters if not each.startswith("--")]
    with nbdkit(*names, "--filter=cow", "file", base, *settings) as (uri, _):
        write(uri, CHANGES)
        report = keep(uri, base, output)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", uri, tmp_path / "rebased.qcow2")
        run("qemu-img", "rebase", "-q", "-f", "qcow2", "-F", "raw", "-b", base, tmp_path / "rebased.qcow2")
    same(output, tmp_path / "rebased.qcow2")
    (tmp_path / "expected").write_bytes(expected(base))
    same(output, tmp_path / "expected", other_format="raw")
    assert report.backing_file == str(base)
    assert report.changed_bytes < 300_000
    assert report.dirty_bytes == report.changed_bytes, "what is the same is told before it counts as dirty"


@pytest.mark.requires("nbdkit")
@pytest.mark.parametrize("tcp", [True, False])
def test_a_server_may_want_tls(base: Path, output: Path, tmp_path: Path, tcp: bool) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:00112233445566778899aabbccddeeff\n")
    keys.chmod(0o600)
    arguments = ("--tls=require", f"--tls-psk={keys}", "--filter=cow", "file", base)
    with nbdkit(*arguments, unix=None if tcp else tmp_path / "s") as (plain, _):
        place = plain.removeprefix("nbd://") if tcp else ""
        asked = f"tls-psk-file={keys}" + ("" if tcp else f"&socket={tmp_path}/s")
        uri = f"nbds{'' if tcp else '+unix'}://alice@{place}/?{asked}"
        write(uri, CHANGES)
        keep(uri, base, output)
        with pytest.raises(BaseOpenError, match=f"^cannot open source {re.escape(plain)}: "):
            keep(plain, base, output)
    (tmp_path / "expected").write_bytes(expected(base))
    same(output, tmp_path / "expected", other_format="raw")


def test_qemu_nbds_snapshot_is_compared(base: Path, output: Path, tmp_path: Path) -> None:
    with qemu_nbd("--snapshot", "--format=raw", image=str(base)) as uri:
        write(uri, CHANGES)
        keep(uri, base, output)
    (tmp_path / "expected").write_bytes(expected(base))
    same(output, tmp_path / "expected", other_format="raw")


@pytest.mark.parametrize("clients", [2, 3])
def test_a_server_that_takes_few_clients_does_not_hold_it_up(base: Path, output: Path, clients: int) -> None:
    with qemu_nbd("--read-only", f"--shared={clients}", "--format=raw", image=str(base)) as uri:
        assert keep(uri, base, output).changed_bytes == 0


def test_what_a_bitmap_says_is_believed_if_the_user_says_so(base: Path, output: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", base, copy)
    run("qemu-img", "bitmap", "-f", "qcow2", "--add", "-g", "64K", copy, "since monday")
    write_to_image(copy, {4096: 100, 5 * MIB: 70_000})
    context = "qemu:dirty-bitmap:since monday"
    with qemu_nbd("--read-only", "--bitmap=since monday", "--format=qcow2", image=str(copy)) as uri:
        by_server = keep(uri, base, output, context=context)
    same(output, copy)
    by_file = keep(copy, base, output, context=context)
    same(output, copy)
    assert by_server.changed == by_file.changed
    assert by_server.bytes_read < MIB > by_file.bytes_read


def test_what_the_allocation_depth_says_is_believed_if_the_user_says_so(
    base: Path, output: Path, tmp_path: Path
) -> None:
    middle = overlay(tmp_path / "middle.qcow2", base)
    write_to_image(middle, {MIB: 5000})
    top = overlay(tmp_path / "top.qcow2", middle, format="qcow2")
    write_to_image(top, {3 * MIB: 5000})
    for image in (middle, top):
        with qemu_nbd("--read-only", "--allocation-depth", "--format=qcow2", image=str(image)) as uri:
            report = keep(uri, base, output, context="qemu:allocation-depth")
        same(output, image)
        assert report.bytes_read < MIB


@pytest.mark.parametrize("clients", [0, 1])
def test_a_context_that_the_server_does_not_have_is_told_with_those_it_has(
    clients: int, base: Path, output: Path, tmp_path: Path
) -> None:
    image = overlay(tmp_path / "image.qcow2", base)
    with (
        qemu_nbd(
            "-r", f"--shared={clients}", "--persistent", "--allocation-depth", "--format=qcow2", image=str(image)
        ) as uri,
        pytest.raises(
            UsageError,
            match=r"has no metadata context qemu:dirty-bitmap:b; it has: base:allocation, qemu:allocation-depth$",
        ),
    ):
        keep(uri, base, output, context="qemu:dirty-bitmap:b")
    with pytest.raises(BaseOpenError, match=f"^cannot open source {image}: .*[Bb]itmap 'b' is not found"):
        keep(image, base, output, context="qemu:dirty-bitmap:b")
    with pytest.raises(UsageError, match="is read without any NBD server"):
        keep(base, base, output, context="qemu:dirty-bitmap:b")
    for context in ("base:allocation", "qemu:dirty-bitmap:", "b"):
        with pytest.raises(UsageError, match="does not tell what changed: give qemu:dirty-bitmap:NAME or"):
            keep(base, base, output, context=context)
    assert not output.exists()


# Images


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vdi", "vhdx", "qed", "raw"])
def test_an_image_of_any_format_is_compared(base: Path, output: Path, tmp_path: Path, format: str) -> None:
    image = tmp_path / f"copy.{format}"
    run("qemu-img", "convert", "-f", "raw", "-O", format, base, image)
    assert keep(image, base, output).changed_bytes == 0
    write_to_image(image, {0: 512, 2 * MIB: -MIB, 5 * MIB: 70_000})
    report = keep(image, base, output)
    same(output, image, other_format=format)
    assert report.changed_bytes < 2 * MIB
    # And the other way round: the image is the base.
    back = tmp_path / "back.qcow2"
    report = keep(base, image, back)
    same(back, base, other_format="raw")
    assert (report.backing_file, report.backing_format) == (str(image), format)


@pytest.mark.parametrize("size", [130_000, MIB + 512, 0, 1])
def test_odd_sizes_are_whole(tmp_path: Path, output: Path, size: int) -> None:
    base, now = tmp_path / "base.img", tmp_path / "now.img"
    base.write_bytes(random.Random(1).randbytes(size))
    now.write_bytes(base.read_bytes()[:-1] + b"x" if size else b"")
    report = keep(now, base, output)
    same(output, now, other_format="raw")
    assert report.changed_bytes == (min(size, (size - 1) % 4096 + 1) if size else 0)


@pytest.mark.parametrize("now_size", [3 * MIB + 100, 12 * MIB + 1])
def test_other_sizes_than_the_bases_are_kept(base: Path, tmp_path: Path, output: Path, now_size: int) -> None:
    now = tmp_path / "now.img"
    now.write_bytes((base.read_bytes() + b"more" * MIB * 2)[:now_size])
    assert keep(now, base, output).virtual_size == -(-now_size // 512) * 512
    same(output, now, other_format="raw")


def test_an_overlay_of_the_base_costs_what_it_holds(base: Path, output: Path, tmp_path: Path) -> None:
    image = overlay(tmp_path / "overlay.qcow2", base)
    assert keep(image, base, output).bytes_read == 0
    write_to_image(image, {0: 512, 5 * MIB: 70_000, 3 * MIB: -65536, SIZE // 2: -65536})
    report = keep(image, base, output)
    same(output, image)
    assert report.bytes_read < 10 * 65536
    assert report.zeroed_bytes == 65536, "the other one is zero in the base, too"


def test_an_overlay_of_another_file_is_compared_as_a_whole(base: Path, output: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(base.read_bytes())
    with other.open("r+b") as file:
        file.seek(MIB)
        file.write(b"not the base's")
    image = overlay(tmp_path / "overlay.qcow2", other)
    assert [each[:2] for each in keep(image, base, output).changed] == [(MIB, 4096)]
    same(output, image)


def test_two_overlays_of_one_file_are_compared_where_either_holds_something(
    base: Path, output: Path, tmp_path: Path
) -> None:
    one, two = overlay(tmp_path / "one.qcow2", base), overlay(tmp_path / "two.qcow2", base)
    write_to_image(one, {MIB: 5000, 2 * MIB: 5000})
    write_to_image(two, {MIB: 5000, 3 * MIB: 5000})
    report = keep(two, one, output)
    same(output, two)
    assert [each[:2] for each in report.changed] == [(2 * MIB, 8192), (3 * MIB, 8192)]
    assert report.bytes_read < 10 * 65536
    assert (report.backing_file, report.backing_format) == (str(one), "qcow2")


def test_what_an_overlay_is_too_short_for_differs(base: Path, output: Path, tmp_path: Path) -> None:
    short = overlay(tmp_path / "short.qcow2", base, size=SIZE // 4)
    report = keep(base, short, output)
    same(output, base, other_format="raw")
    assert report.changed_bytes == SIZE // 2, "a quarter is the same, and a quarter is zero in both"
    assert report.bytes_read <= SIZE // 2 + 65536


def test_a_disk_that_was_put_back_is_nothing_on_top_of_its_overlay(base: Path, output: Path, tmp_path: Path) -> None:
    image = overlay(tmp_path / "overlay.qcow2", base)
    write_to_image(image, {MIB: 5000})
    assert [each[:2] for each in keep(base, image, output).changed] == [(MIB, 8192)]
    same(output, base, other_format="raw")


@pytest.mark.requires("nbdkit")
def test_a_chain_of_three_grows_with_a_live_disk(base: Path, tmp_path: Path) -> None:
    below = base
    with nbdkit("--filter=cow", "file", base) as (uri, _):
        for number in (1, 2, 3):
            write(uri, {number * MIB: b"new" * 1000 * number, 10 * number: b"rewritten"})
            path = tmp_path / f"d{number}.qcow2"
            report = keep(uri, below, path)
            assert len(report.changed) == 2 and report.changed_bytes <= 4 * 4096
            run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmp_path / "now.raw")
            same(path, tmp_path / "now.raw", other_format="raw")
            below = path
    info = report.backing_file, report.backing_format
    assert info == (str(tmp_path / "d2.qcow2"), "qcow2")


points = st.lists(
    st.tuples(st.integers(0, 60), st.integers(-3, 3).filter(bool), st.integers(1, 3)), min_size=1, max_size=4
)


def check_layers(layers: list[tuple[int, list[tuple[int, int, int]]]], fork: int) -> None:
    """Overlays upon overlays of these sizes (in units of 32 KiB, with a sector more), and another chain that leaves at ``fork``."""
    unit = 32768
    with TemporaryDirectory() as made:
        place = Path(made)
        chain = [noise_file(place / "base.raw", 40 * unit)]

        def grow(name: str, on: Path, size: int, writes: list[tuple[int, int, int]]) -> Path:
            image = overlay(place / f"{name}.qcow2", on, format=on.suffix[1:], size=size * unit + 512)
            for at, length, seed in writes:
                length = max(-size, min(length, size - at)) if at < size else 0
                if at + abs(length) <= size and length:
                    write_to_image(image, {at * unit: length * unit}, seed=seed)
            return image

        for number, (size, writes) in enumerate(layers):
            chain.append(grow(f"layer{number}", chain[-1], size, writes))
        side = grow("side", chain[fork % len(chain)], layers[0][0], [(5, 2, 3), *layers[-1][1]])
        for now, base in ((chain[-1], chain[0]), (chain[-1], chain[1]), (side, chain[-1]), (chain[-1], side)):
            report = keep(now, base, place / "diff.qcow2")
            same(place / "diff.qcow2", now, other_format=now.suffix[1:])
            assert {each.kind for each in report.changed} <= {Kind.DATA, Kind.ZERO}


some_layers = given(
    layers=st.lists(st.tuples(st.integers(1, 63), points), min_size=2, max_size=3), fork=st.integers(0, 3)
)


@settings(max_examples=2, deadline=None)
@some_layers
def test_what_images_say_of_their_layers_is_enough(
    layers: list[tuple[int, list[tuple[int, int, int]]]], fork: int
) -> None:
    check_layers(layers, fork)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@some_layers
def test_what_many_images_say_of_their_layers_is_enough(
    layers: list[tuple[int, list[tuple[int, int, int]]]], fork: int
) -> None:
    check_layers(layers, fork)


# Outputs


@pytest.mark.parametrize(
    "options",
    [
        ImageOptions(cluster_size=4096),
        ImageOptions(subclusters=True),
        ImageOptions(compress="zlib"),
        ImageOptions(bitmap="changed"),
        ImageOptions(standalone=True),
    ],
    ids=["4K", "subclusters", "zlib", "bitmap", "standalone"],
)
def test_each_kind_of_image_can_be_had(base: Path, output: Path, tmp_path: Path, options: ImageOptions) -> None:
    image = tmp_path / "copy.vmdk"
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", base, image)
    write_to_image(image, {MIB: 5000, 4 * MIB: -MIB})
    keep(image, base, output, options=options)
    same(output, image, other_format="vmdk")


def test_a_raw_image_can_be_had(base: Path, tmp_path: Path) -> None:
    image = overlay(tmp_path / "overlay.qcow2", base)
    write_to_image(image, {MIB: 5000})
    keep(image, base, tmp_path / "now.raw", options=ImageOptions(raw=True))
    same(tmp_path / "now.raw", image, format="raw")


@pytest.mark.parametrize("name", ["top.qcow2", "middle.qcow2", "disk.img", "link"])
def test_neither_source_nor_base_nor_what_they_stand_on_is_replaced(base: Path, tmp_path: Path, name: str) -> None:
    middle = overlay(tmp_path / "middle.qcow2", base)
    top = overlay(tmp_path / "top.qcow2", middle, format="qcow2")
    (tmp_path / "link").symlink_to(top)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(OutputError, match="it is the same file as"):
        keep(top, base, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before


def test_formats_in_doubt_are_asked_for(base: Path, output: Path, tmp_path: Path) -> None:
    image = overlay(tmp_path / "image.qcow2", base)
    os.rename(image, tmp_path / "image")
    image = tmp_path / "image"
    with pytest.raises(
        BaseOpenError, match=r"^source .*image begins like .* \(--from-format qcow2, --from-format raw\)"
    ):
        keep(image, base, output)
    assert keep(image, base, output, now_format="qcow2").changed_bytes == 0
    with pytest.raises(BaseOpenError, match=r"^base .*image begins like .* \(--format qcow2, --format raw\)"):
        keep(base, image, output)
    assert keep(base, image, output, base_format="qcow2").changed_bytes == 0


def test_the_function_for_users_is_the_same(base: Path, output: Path, tmp_path: Path) -> None:
    image = overlay(tmp_path / "overlay.qcow2", base)
    write_to_image(image, {MIB: 5000})
    told: list[tuple[int, int]] = []
    report = cowkit.diff_images(
        image, base, output, cluster_size="4K", now_format="qcow2", progress=lambda *step: told.append(step)
    )
    assert (report.cluster_size, report.changed_bytes, told[-1]) == (4096, 8192, (SIZE, SIZE))
    same(output, image)
    assert cowkit.diff_images(image, base, output, now_format="qcow2", format="raw").format == "raw"
    assert len(output.read_bytes()) == SIZE
