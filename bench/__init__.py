"""How fast the operations are, against what else there is, and what the compiler made of them.

`python -m bench --help` in the root of a checkout.
"""

import os

# JAX would take three quarters of a GPU's memory as soon as it is there.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
