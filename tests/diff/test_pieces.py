"""The pieces that two sources are compared in: whatever their holes are, nothing that may differ is left out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowkit.diff import pieces as pieces_module
from cowkit.diff.pieces import BLOCK, pieces
from cowkit.disk import Extent, Kind, ZeroBase

PIECE = 4 * BLOCK
SHORT = 2 * BLOCK


class Holey(ZeroBase):
    """Runs of these lengths, of data and holes by turns."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(sum(lengths))
        self.data = bytearray()
        for number, length in enumerate(lengths):
            self.data += bytes([number % 2]) * length

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        at, end = offset, offset + length
        while at < end:
            kind = self.data[at]
            stop = self.data.find(bytes([1 - kind]), at, end)
            stop = end if stop < 0 else stop
            yield Extent(at, stop - at, Kind.DATA if kind else Kind.HOLE)
            at = stop


lengths = st.lists(st.one_of(st.integers(0, 3 * BLOCK), st.sampled_from([BLOCK, 5 * BLOCK])), min_size=1, max_size=12)
ranges = st.lists(st.tuples(st.integers(0, 30 * BLOCK), st.integers(0, 6 * BLOCK)), max_size=5)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(now_lengths=lengths, base_lengths=lengths, suspected=ranges, everywhere=st.booleans())
def test_all_that_may_differ_is_in_a_piece_that_says_no_more_than_is_so(
    monkeypatch: pytest.MonkeyPatch,
    now_lengths: list[int],
    base_lengths: list[int],
    suspected: list[tuple[int, int]],
    everywhere: bool,
) -> None:
    monkeypatch.setattr(pieces_module, "PIECE", PIECE)
    monkeypatch.setattr(pieces_module, "_SHORT", SHORT)
    now, base = Holey(now_lengths), Holey(base_lengths)
    size = now.size
    suspects = [(0, size)] if everywhere else sorted((at, at + length) for at, length in suspected)
    old = base.data[:size].ljust(size, b"\0")
    covered = bytearray(size)
    end = 0
    for piece in pieces(now, base, suspects):
        assert end <= piece.offset < piece.end <= size
        assert piece.offset % BLOCK == 0 and (piece.end % BLOCK == 0 or piece.end == size)
        assert piece.offset // PIECE == (piece.end - 1) // PIECE
        end = piece.end
        assert not (piece.now_is_zero and any(now.data[piece.offset : end]))
        assert not (piece.base_is_zero and any(old[piece.offset : end]))
        assert not (piece.now_is_zero and piece.base_is_zero)
        covered[piece.offset : end] = b"\1" * piece.length
    for start, stop in suspects:
        for at in range(start, min(stop, size)):
            assert covered[at] or not (now.data[at] or old[at])


def test_long_holes_of_both_are_left_out_and_short_ones_are_not() -> None:
    now, base = Holey([1 << 20, BLOCK, 8 * BLOCK, 1 << 20]), Holey([2 << 20, BLOCK])
    found = [(each.offset, each.length) for each in pieces(now, base, [(0, now.size)])]
    assert found == [(1 << 20, 1 << 20), (2 << 20, BLOCK), ((2 << 20) + BLOCK, 8 * BLOCK)]
