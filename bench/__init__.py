"""Benchmarks: ``fisherkern bench <family>``, see bench/README.md."""

from fisherkern.bench.cli import main

__all__ = ["main"]
