"""Arguments that name files, which shells complete."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    import argparse

COMPLETES_FILES = "cowkit_completes_files"
"""The attribute of such an argument."""


def file_argument(action: argparse.Action) -> None:
    """Have file names complete ``action``."""
    setattr(action, COMPLETES_FILES, True)
