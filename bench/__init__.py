"""Benchmarks and the kernel report; run from a checkout, not installed."""
