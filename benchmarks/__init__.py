"""Benchmarks: ``python -m benchmarks.NAME`` from a clone. Rows go to ``benchmarks/results/``, a folder a device."""
