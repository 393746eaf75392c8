"""What the report of an image and the report of changes tell in the same way."""

from __future__ import annotations

from collections.abc import Iterable

from cowkit.disk.extent import Extent


def extents_to_json(extents: Iterable[Extent]) -> list[dict[str, object]]:
    """Extents as each report in JSON has them."""
    return [{"offset": offset, "length": length, "kind": str(kind)} for offset, length, kind in extents]


def resize_note(size: int, base_size: int | None) -> str:
    """That a disk of ``size`` bytes had another size before, in words."""
    was = base_size or 0
    return f"the size changed: {size} bytes, {abs(size - was)} {'more' if size > was else 'less'} than before ({was})"
