"""The JSON Schema of reports: of differences that were written, and of answers about them."""

from __future__ import annotations

from importlib.resources import files


def schema_text() -> str:
    """The schema (draft 2020-12), as text."""
    return files("cowkit.diff.answers").joinpath("schema.json").read_text(encoding="utf-8")
