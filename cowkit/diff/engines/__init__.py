"""Engines that have QEMU's own programs write the image. They know no server: what they read is served for them."""
