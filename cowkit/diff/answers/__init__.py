"""Answers about a difference that is not, or not yet, written: how much changed, where, in which files, how large it would be."""

from cowkit.diff.answers.report import ChangesReport

__all__ = ["ChangesReport"]
