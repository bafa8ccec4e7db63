"""Measurements, one command each: ``python -m benchmarks.NAME``.  Each prints what it compares."""
