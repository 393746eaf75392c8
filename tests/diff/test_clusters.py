"""How dirty extents are cut into clusters, and how much room an image's tables need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowkit.diff.clusters import Part, by_cluster
from cowkit.diff.qcow2.layout import Geometry, geometry, refcounts_for
from cowkit.disk import Extent, Kind
from cowkit.errors import UsageError


@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 40), st.sampled_from([Kind.DATA, Kind.ZERO])), max_size=20
    ),
    cluster=st.sampled_from([1, 2, 8, 16]),
)
def test_cutting_into_clusters_keeps_every_byte_once_and_in_order(
    lengths: list[tuple[int, int, Kind]], cluster: int
) -> None:
    extents, at = [], 0
    for gap, length, kind in lengths:
        extents.append(Extent(at + gap, length, kind))
        at += gap + length
    pieces: list[Extent] = []
    seen = -1
    for work in by_cluster(extents, cluster):
        if isinstance(work, Part):
            assert work.start % cluster == 0
            assert work.start > seen
            assert all(work.start <= each.offset and each.end <= work.start + cluster for each in work.pieces)
            seen = work.start
            pieces += work.pieces
        else:
            assert work.offset % cluster == work.length % cluster == 0
            assert work.offset > seen
            assert work.length
            seen = work.end - cluster
            pieces.append(work)
    flat = [(byte, each.kind) for each in pieces for byte in range(each.offset, each.end)]
    assert flat == [(byte, each.kind) for each in extents for byte in range(each.offset, each.end)]


@given(clusters=st.integers(1, 2**48), bits=st.integers(12, 21))
def test_refcounts_count_themselves_and_waste_nothing(clusters: int, bits: int) -> None:
    shape = Geometry(0, 1 << bits)
    counts = refcounts_for(shape, clusters)
    assert counts.total == clusters + counts.blocks + counts.table_clusters
    assert counts.blocks * shape.refcounts >= counts.total > (counts.blocks - 1) * shape.refcounts - 1
    assert counts.table_clusters * shape.cluster_size >= counts.blocks * 8


def test_an_l1_table_covers_the_disk_and_no_more() -> None:
    assert geometry(5 << 40, 65536).l1_entries == 10240
    assert geometry((5 << 40) + 1, 65536).l1_entries == 10241
    assert geometry(0, 65536).l1_entries == 0
    assert geometry(1, 65536).size == 512


def test_sizes_end_where_qemu_ends() -> None:
    assert geometry(8 << 40, 4096).l1_entries * 8 == 32 << 20
    with pytest.raises(UsageError, match="larger cluster size"):
        geometry((8 << 40) + 1, 4096)
    assert geometry(1 << 61, 2 << 20).l1_entries * 8 == 32 << 20
