"""Checks before a run starts: whether it fits into memory, and whether everything that it needs is present."""
