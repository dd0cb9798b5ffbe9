"""Loops compiled by numba: the CPU path where the optional extra `numba` is installed."""
