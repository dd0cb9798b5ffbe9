"""The specification: the network of the notebook, unfused, forward and backward by hand.

Slow on purpose, on any device and dtype. It imports nothing else of this package.
"""
