"""Benchmarks: one runner, one module per claim. Importing this package makes `farspan` importable."""

from benchmarks._bootstrap import ensure_farspan

ensure_farspan()
