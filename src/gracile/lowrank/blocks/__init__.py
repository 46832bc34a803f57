"""Blocks that take the place of layers: one file each."""
