"""Registrations with torch.library, one file an operation: what torch.compile calls.

Operators are opaque to the compiler and run whatever implementation serves the tensor, so that a
compiled graph gives the bits of eager mode; but the compiler lays upstream gradients out as it
expected them, and sums over other strides may be added up in another order. The override of
`fused.backend.use` is looked at when the graph runs, forward and backward each. What an
implementation does not return is an empty tensor.
"""

import torch

library = torch.library.Library("fused", "FRAGMENT")
