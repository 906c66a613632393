"""Families of constrained problems with IPOPT beside the library: ``python -m tests.families``."""
