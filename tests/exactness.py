"""The rule for every approximate comparison: as exact as torch, measured against float64."""

import torch
from torch import Tensor


def assert_as_exact_as(
    ours: Tensor,
    theirs: Tensor,
    exact: Tensor,
    *,
    ulps: float = 2.0,
    scale: float | None = None,
    what: str = "result",
) -> None:
    """Our error against `exact` (float64) is at most torch's own error in the same dtype, plus
    `ulps` units in the last place at `scale`: the magnitude of the largest element, or, where the
    result is a difference of larger terms, of the largest term.

    NaN and infinities must be where torch has them.
    """
    assert ours.dtype == theirs.dtype, f"{what}: dtype {ours.dtype}, torch gives {theirs.dtype}"
    assert ours.shape == theirs.shape, f"{what}: shape {ours.shape}, torch gives {theirs.shape}"
    finite = theirs.isfinite()
    torch.testing.assert_close(
        ours[~finite],
        theirs[~finite],
        equal_nan=True,
        msg=lambda m: f"{what}: not finite in other places than torch's\n{m}",
    )
    if not finite.any():
        return
    eps = torch.finfo(ours.dtype).eps
    ours, theirs, exact = (t.detach().double()[finite] for t in (ours, theirs, exact))
    if scale is None:
        scale = exact.abs().max().item()
    bound = (theirs - exact).abs().max().item() + ulps * eps * scale
    error = (ours - exact).abs().max()
    assert error <= bound, f"{what}: error {error:.3g}, expected at most {bound:.3g}"


def ulps_for(dtype: torch.dtype, implementation: str) -> float:
    """2 ulps: one rounding in the result and one in the arithmetic before it.

    float64 is measured against float64, whose own error counts too: 8. In Triton's interpreter (on
    the CPU) a store of bfloat16 truncates instead of rounding: one more there, and only there.
    """
    if dtype == torch.float64:
        return 8.0
    truncates = implementation == "triton" and not torch.cuda.is_available()
    return 3.0 if truncates and dtype == torch.bfloat16 else 2.0
