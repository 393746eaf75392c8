"""Differences: dirty extents become changed extents, and those a qcow2 image on top of the base."""

from cowkit.diff.native import backing_name, check_output, write_diff
from cowkit.diff.options import Compression, ImageChoice, ImageOptions
from cowkit.diff.qcow2.reader import Qcow2Image
from cowkit.diff.report import DiffReport

__all__ = [
    "Compression",
    "DiffReport",
    "ImageChoice",
    "ImageOptions",
    "Qcow2Image",
    "backing_name",
    "check_output",
    "write_diff",
]
