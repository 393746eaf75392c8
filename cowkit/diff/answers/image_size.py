"""How large images would be; see :mod:`cowkit.diff.answers.estimate`."""

from __future__ import annotations

from typing import Any, NamedTuple, Self


class ImageSize(NamedTuple):
    """How large an image would be."""

    cluster_size: int
    subclusters: bool
    file_size: int
    """Its length in bytes."""
    allocated: int
    """What it takes on a file system with blocks of 4 KiB, in bytes: its holes are left out."""


class Estimate(NamedTuple):
    """How large the image that was asked for would be, and others."""

    file_size: int
    """Its length in bytes: exact."""
    allocated: int
    """What it takes on a file system with blocks of 4 KiB, in bytes."""
    cluster_size: int | None
    """In bytes; None where it has none (raw, rbd)."""
    others: tuple[ImageSize, ...]
    """Plain images on top of the base with other clusters: upper bounds. Empty where another kind of image was asked for."""
    subclusters: bool = False
    """Whether the image that was asked for would have its clusters divided by 32."""

    def to_json(self) -> dict[str, object]:
        """The same as JSON has it."""
        return {**self._asdict(), "others": [each._asdict() for each in self.others]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What :meth:`to_json` made."""
        return cls(**{**data, "others": tuple(ImageSize(**each) for each in data["others"])})
