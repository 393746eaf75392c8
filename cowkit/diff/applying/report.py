"""What came of applying a difference."""

from __future__ import annotations

from typing import Literal, NamedTuple

from cowkit.disk.sizes import format_size

SCHEMA = 1
"""The version of what :meth:`ApplyReport.to_json` returns; new keys do not change it."""


Others = Literal["fit", "refused", "unnoticed"]
"""What becomes of other differences to a base that was written to: they fit as before, since nothing was to be written (or but
zeroes behind its end, of less than a sector); they are refused; or only those are that were written with ``hash="full"``, since no
block that is sampled has changed."""


class ApplyReport(NamedTuple):
    """A difference that was applied. All amounts are in bytes."""

    path: str | None
    """The difference; None where it is not known which one a journal was written for."""
    target: str
    """The file that has it now."""
    in_place: bool
    size: int
    """The size of the file now."""
    written_bytes: int
    """What the difference holds as data."""
    zeroed_bytes: int
    """What it holds as zeroes."""
    finished: bool
    """Whether it was an interrupted one that was finished from its journal."""
    recognised: bool
    """Whether the base is known by the identity that the difference records."""
    seconds: float
    others: Others | None = None
    """In place: what becomes of differences to the base as it was; None where that is not known."""
    base: str | None = None
    """Where the base is, as it was given or found; None where there is none: the difference is a blank disk's, or all of a disk."""

    lowest: str | None = None
    """The image that stands on the base: the difference, or the lowest of those that it stands on; None where it is not known."""
    size_before: int | None = None
    """In place: the size of the base before; None where it is not known."""

    def to_json(self) -> dict[str, object]:
        """The same as JSON has it; ``schema`` is the version of its form."""
        return {"schema": SCHEMA, **self._asdict(), "seconds": round(self.seconds, 6)}

    def summary(self) -> str:
        """A few lines for people."""
        held = f"{format_size(self.written_bytes)} written, {format_size(self.zeroed_bytes)} zeroed"
        if self.finished:
            what = f"of {self.path} " if self.path is not None else ""
            return f"{self.target}: the interrupted apply {what}is finished, {held}"
        if not self.in_place:
            based = f"a copy of the base with {self.path} in it"
            alone = f"all of the disk of {self.path}, which stands on no base"
            return f"{self.target}: {alone if self.base is None else based}, {held}, {format_size(self.size)} in all"
        same = "nothing was to be written: it is the base that it was"
        if self.size_before not in (None, self.size):
            same = (
                f"nothing but its size has changed, from {self.size_before} to {self.size} bytes, which are as many sectors: "
                "differences to it as it was fit it as before"
            )
        return (
            f"{self.target}: {self.path} is in it now, {held}"
            + {
                "fit": f"\n  {same}",
                "refused": "\n  it is another base now: differences to it as it was are refused from now on",
                "unnoticed": "\n  it is another base now, and no block that is sampled tells it from the old one: differences to it as it "
                "was do not fit it any more, but only those that were written with --hash full are refused",
                None: "",
            }[self.others]
        )
