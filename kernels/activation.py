"""Device functions: activations that neither the interpreter nor Triton itself has in this form."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh(x) = sign(x) * (1 - e) / (1 + e), e = exp(-2|x|); its Taylor series near 0

    (there 1 - e would cancel). Both are good to a few units in the last place of float32.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    near = x + x * x2 * (
        -1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))
    )
    return tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0.0, -far, far))
