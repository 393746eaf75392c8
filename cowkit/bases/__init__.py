"""Bases of every kind: raw, compressed, another image format, behind an NBD URI, and windows of them."""

from cowkit.bases.opening import open_base

__all__ = ["open_base"]
