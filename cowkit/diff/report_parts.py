"""What the report of an image and the report of changes tell in the same way."""

from __future__ import annotations

from collections.abc import Iterable

from cowkit.diff.qcow2.layout import image_size
from cowkit.disk.extent import Extent


def extents_to_json(extents: Iterable[Extent]) -> list[dict[str, object]]:
    """Extents as each report in JSON has them."""
    return [{"offset": offset, "length": length, "kind": str(kind)} for offset, length, kind in extents]


def is_resized(size: int, base_size: int | None) -> bool:
    """Whether a disk of ``size`` bytes is of another size than the state before; in sectors, since images have whole ones."""
    return base_size is not None and image_size(size) != image_size(base_size)


def resize_note(size: int, base_size: int | None) -> str:
    """The same in words, for what is of another size."""
    was = base_size or 0
    return f"the size changed: {size} bytes, {abs(size - was)} {'more' if size > was else 'less'} than before ({was})"
