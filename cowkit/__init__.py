"""Writable, throwaway disks for tests: a copy-on-write view of a read-only base, served over NBD."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which is what `cowkit diff` would spend most of its start on
if TYPE_CHECKING:
    from cowkit.cow_disk import CowDisk
    from cowkit.disk import Checkpoint, Extent, Kind
    from cowkit.errors import CowkitError
    from cowkit.keeping.foreign import diff_images

__version__ = "0.1.0"

__all__ = ["Checkpoint", "CowDisk", "CowkitError", "Extent", "Kind", "__version__", "diff_images"]


def __getattr__(name: str) -> object:
    # `cowkit diff`, `cowkit ls` and pytest's start-up import this package without needing the engine.
    if name == "CowDisk":
        from cowkit.cow_disk import CowDisk

        return CowDisk
    if name == "CowkitError":
        from cowkit.errors import CowkitError

        return CowkitError
    if name in ("Checkpoint", "Extent", "Kind"):
        import cowkit.disk

        return getattr(cowkit.disk, name)
    if name == "diff_images":
        from cowkit.keeping.foreign import diff_images

        return diff_images
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
