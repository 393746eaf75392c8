"""Keeping a difference: of which two states, on top of which file, written by which engine."""
