"""Measurements side by side, from the root of a checkout: `python -m benchmarks`."""
