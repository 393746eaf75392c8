"""The qcow2 format: its layout, headers and bitmaps, a strict reader, and the writers."""
