"""The first ten minutes: bytes, one kernel, one check."""
