"""The rule for every approximate comparison: as exact as torch, measured against float64; and what
tests that need a GPU share."""

from pathlib import Path

import pytest
import torch
from hypothesis import Phase
from torch import Tensor

# Of a property's failing example smaller ones are looked for, which a GPU compiles kernels for.
PHASES = [p for p in Phase if p != Phase.shrink or not torch.cuda.is_available()]


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


def same_bits(device: torch.device) -> dict[str, float]:
    """Tolerances of one kernel on tensors with other strides: none where nothing is compiled. By
    the strides a compiler chooses who adds up what: there assert_close's own."""
    return {} if device.type == "cuda" else {"rtol": 0, "atol": 0}


def ulps_for(dtype: torch.dtype, implementation: str) -> float:
    """2 ulps: one rounding in the result and one in the arithmetic before it.

    float64 is measured against float64, whose own error counts too: 8. In Triton's interpreter (on
    the CPU) a store of bfloat16 truncates instead of rounding: one more there, and only there. On a
    GPU float32's exp2, division and rsqrt are each good to 2 units, not to half of one: 4 there.
    """
    if dtype == torch.float64:
        return 8.0
    if implementation != "triton":
        return 2.0
    if torch.cuda.is_available():
        return 4.0 if dtype == torch.float32 else 2.0
    return 3.0 if dtype == torch.bfloat16 else 2.0


def negated(t: Tensor) -> Tensor:
    """The same values as the imaginary part of a conjugate: in its memory they have the other sign,
    and only a flag of the tensor says so."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg()
    return view


def skip_without_memory(gigabytes: int, device: torch.device) -> None:
    """Skips the test where the device has less: a smaller one, or one that others are using."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()  # slow tests run on Linux
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        free = int(available) << 10
    if free < gigabytes << 30:
        pytest.skip(f"{gigabytes} GB of memory are not to be had")
