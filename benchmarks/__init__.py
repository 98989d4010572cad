"""Measurements of wanjax: speed, memory, agreement. Run from a clone, e.g. `python -m benchmarks.throughput`.

Nothing in the package imports this folder, and it is not installed.
"""
