"""Merging a difference into a copy of its base, or into the base itself."""
