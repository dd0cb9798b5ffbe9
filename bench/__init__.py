"""How fast the operations are, against what else there is, and what the compiler made of them.

`python -m bench --help` in the root of a checkout.
"""
