"""Batch normalisation of x (N, C, L) over its n = N * L rows, each channel by itself.

    mu   = mean_i x_i              var = sum_i (x_i - mu)^2 / (n - k),  k the correction: 0 or 1
    rstd = (var + eps)^-1/2        xhat_i = (x_i - mu) * rstd
    z_i  = gamma * xhat_i + beta + residual_i                           y_i = f(z_i)

    dz_i = dy_i * f'(z_i)          dgamma = sum_i dz_i * xhat_i         dbeta = sum_i dz_i
    dx_i = gamma * rstd / n * (n dz_i - dbeta - n/(n-k) * xhat_i * dgamma)     batch statistics
    dx_i = gamma * rstd * dz_i                                                 frozen statistics

and dresidual = dz. f is an activation or the identity; its z is never written to memory. Backward
recomputes it from x, which it reads anyway: unrounded, where a half-precision y is not, but for
what the mean loses to its own rounding, of which the forward knows. With a residual it takes what
costs least: relu the signs of z, which the forward pass writes down in bits; tanh y, where y is
float32 or float64 and so is tanh(z) itself; all else the residual. The derivation is in
docs/derivations.md.

With S the bytes of x, forward and backward move 2S and 3S where one program has all rows of its
channels, on chip or in cache (tuning.batch_norm says when), 3S and 5S elsewhere: there the first
launch leaves partial results, which every program of the second merges in the same order. A
residual costs S more forward and, behind an activation, 2S backward: its gradient written, itself
or y read. With relu it is S/16 more forward and S + S/16 backward.

Rows that begin at odd addresses are seen as longer ones that do not (tuning.Pack).
"""

from typing import NamedTuple

import torch

from fused.kernels import layout, tuning
from fused.kernels.batch_norm_backward import _batch_norm_bwd_kernel, _batch_norm_sums_kernel
from fused.kernels.batch_norm_forward import _batch_norm_fwd_kernel, _batch_norm_moments_kernel
from fused.kernels.batch_norm_layout import View, by_channel, signs_shape, unpack_signs
from fused.kernels.device import on_its_device


@on_its_device
def batch_norm_fwd(
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    tracked: torch.Tensor | None,
    momentum: float | None,
    eps: float,
    correction: int,
    activation: str | None,
    skip_nonfinite: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Normalises x (N, C, *S) with the statistics of the batch; updates the running ones in place.

    tracked, if given, is counted up, and then a momentum of None is 1 / tracked. Returns
    (y, mean, rstd, kept): y in x's dtype and memory format, mean and rstd (C,), and what backward
    takes besides where there is a residual behind an activation and `keep`: the signs of z (uint8),
    y, or the residual; else None.

    Bytes: reads x and the residual once and writes y and, at a sixteenth of its bytes, the signs
    once, in one launch, the least possible, 2S without a residual. So it is from memory where a
    program reads its channels twice from cache. Larger ones are read twice, 3S: in one launch where
    there are channels enough for a program each, else in two.
    """
    if x.numel() == 0 and tracked is not None:
        tracked.add_(1)
    return _normalise(
        x, gamma, beta, residual, running_mean, running_var, tracked, momentum, eps, correction,
        activation, skip_nonfinite, keep, frozen=False,
    )  # fmt: skip


@on_its_device
def batch_norm_eval(
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    activation: str | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Normalises x (N, C, *S) with given statistics (C,). Returns (y, mean, rstd, kept) as above.

    Bytes: reads x and the residual once and writes y and the signs once, in one launch: the least
    possible.
    """
    return _normalise(
        x, gamma, beta, residual, mean, var, None, 0.0, eps, 0, activation, False, keep, frozen=True
    )


@on_its_device
def batch_norm_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, m2) of x (N, C, *S): per-channel mean and sum of squared deviations, (C,) each.

    Bytes: reads x once; one launch, and operations of the size of the result.
    """
    x3 = layout.inner(x)
    if x.numel() == 0:
        zeros = torch.zeros(x.shape[1], dtype=_accumulator(x), device=x.device)
        return zeros, zeros.clone()
    view = View.of(x3, signs=False)
    partial = _launch_moments(x3, view, view.plan(x, tensors=0))
    counts, means, m2s = partial.unbind(1)
    mean = (counts * means).sum(0) / counts.sum(0)
    m2 = m2s.sum(0) + (counts * (means - mean).square()).sum(0)
    # Where the first row is not finite the kernel's is 0: its mean is no more finite than this sum.
    return x3[0, :, 0] + mean, m2


@on_its_device
def batch_norm_sums(
    dy: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    kept: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    activation: str | None,
    want_dresidual: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(sums, dresidual): dgamma and dbeta as one tensor (2, C) in the dtype of mean, and dz, which
    batch_norm_dx takes in dy's place; None where it is not wanted.

    Bytes: reads dy, x and what was kept once and writes dresidual once; one launch, and a sum of
    partial results.
    """
    dz, dz3 = _empty_like(x) if want_dresidual and activation else (None, None)
    dresidual = (dz if activation else dy) if want_dresidual else None
    if x.numel() == 0:
        return mean.new_zeros(2, x.shape[1]), dresidual
    step = _Backward.of(x, dy, gamma, beta, kept, mean, rstd, activation, None, dz3)
    return step.sums(step.plan(reduced=False)).sum(0), dresidual


@on_its_device
def batch_norm_dx(
    dy: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    kept: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    sums: torch.Tensor,
    count: torch.Tensor,
    correction: int,
    activation: str | None,
) -> torch.Tensor:
    """dx from dgamma and dbeta, sums (2, C), of all the `count` rows (one number) that were
    normalised together, which may be more than x's.

    Bytes: reads dy, x and what was kept once and writes dx once; one launch.
    """
    dx, dx3 = _empty_like(x)
    if x.numel():
        step = _Backward.of(x, dy, gamma, beta, kept, mean, rstd, activation, dx3, None)
        plan = step.plan(reduced=False)
        step.gradients(plan, "partial", sums.unsqueeze(0), count, correction, True)
    return dx


@on_its_device
def batch_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    kept: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    correction: int,
    activation: str | None,
    batch_statistics: bool,
    want_dresidual: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients (dx, dgamma, dbeta, dresidual) of batch normalisation.

    dx is in x's dtype and memory format; dgamma and dbeta (C,) are in gamma's and beta's dtypes, in
    that of mean where there are none; dresidual is None where it is not wanted. `batch_statistics`
    says whether mean and rstd came from x (training) or were frozen. `kept` is the forward's, or
    None where there was no residual.

    Bytes: reads dy, x and what was kept (signs are a sixteenth of x) once and writes dx and, with
    an activation, dresidual once, in one launch, the least possible, 3S without a residual. So it
    is from memory where a program reads its channels twice from cache; where there are channels
    enough for a program each, but larger than that, one launch reads them twice: 5S. Where programs
    share channels: with frozen statistics 3S, in one launch, and a small sum and two copies; else
    two launches that read dy, x and what was kept twice, 5S, unless dresidual is wanted, which then
    serves the second in the place of dy and what was kept. A dy that does not lie as x does is
    copied first.
    """
    dx, dx3 = _empty_like(x)
    # Without an activation dz is dy: there is nothing to write.
    dz, dz3 = _empty_like(x) if want_dresidual and activation else (None, None)
    dresidual = (dz if activation else dy) if want_dresidual else None
    if x.numel() == 0:
        return dx, _for(gamma, mean).zero_(), _for(beta, mean).zero_(), dresidual
    step = _Backward.of(x, dy, gamma, beta, kept, mean, rstd, activation, dx3, dz3)
    plan, partial = step.plan(reduced=True), None
    reduction = plan.reduction
    if reduction == "partial" and not batch_statistics:  # dx does not wait for the sums
        sums = step.sums(plan).sum(0)  # in their own dtype: a narrower `out` would round each first
        dgamma, dbeta = _for(gamma, mean).copy_(sums[0]), _for(beta, mean).copy_(sums[1])
        return dx, dgamma, dbeta, dresidual
    if reduction == "partial":
        partial = step._replace(dx=None).sums(plan)
        if dz is not None:
            step = _Backward.of(x, dz, gamma, beta, None, mean, rstd, None, dx3, None)
            plan = step.plan(reduced=False)
    dgamma, dbeta = step.gradients(plan, reduction, partial, None, correction, batch_statistics)
    return dx, dgamma, dbeta, dresidual


def _for(parameter: torch.Tensor | None, mean: torch.Tensor) -> torch.Tensor:
    """An output for the gradient of a parameter; mean's dtype where there is none."""
    return torch.empty_like(mean, dtype=None if parameter is None else parameter.dtype)


def keeps(activation: str | None, x: torch.Tensor, residual: torch.Tensor | None) -> str | None:
    """What backward takes besides x: the "signs" of z, the "output", the "residual", or None."""
    if activation is None or residual is None:
        return None
    return "signs" if activation == "relu" else _kind(activation, residual)


def _kind(activation: str | None, kept: torch.Tensor | None) -> str | None:
    """Which of these `kept` is. Half precision rounds tanh(z), and 1 - y^2 has lost what counts."""
    if activation is None or kept is None:
        return None
    if kept.dtype == torch.uint8:
        return "signs"
    exact = activation == "relu" or (activation == "tanh" and kept.dtype.itemsize >= 4)
    return "output" if exact else "residual"


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty_like(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An output in x's memory format, and its (N, C, L) view."""
    y = torch.empty_like(x)
    y3 = layout.inner(y)
    if y3.data_ptr() != y.data_ptr():  # x's strides have no such view
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        y3 = layout.inner(y)
    return y, y3


def _launch_moments(x3: torch.Tensor, view: View, plan: tuning.BatchNormPlan) -> torch.Tensor:
    """(n_programs, 3, C): each program's count of rows, mean (from the first row) and m2"""
    grid = plan.grid(view.c)
    partial = torch.empty((plan.n_programs, 3, view.c), dtype=_accumulator(x3), device=x3.device)
    view = view.packed(plan)
    _batch_norm_moments_kernel[grid](
        x3,
        partial,
        view.n,
        view.c,
        view.length,
        view.strides[0],
        plan.n_tiles,
        plan.tiles_per_program,
        BLOCK_N=plan.BLOCK_N,
        BLOCK_L=plan.BLOCK_L,
        BLOCK_C=plan.BLOCK_C,
        ALIGN=view.align(),
        STAGES=plan.stages(x3),
        PACK=plan.pack,
        num_warps=plan.num_warps,
        enable_fp_fusion=False,
    )
    return partial


def _normalise(
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    tracked: torch.Tensor | None,
    momentum: float | None,
    eps: float,
    correction: int,
    activation: str | None,
    skip_nonfinite: bool,
    keep: bool,
    frozen: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    y, y3 = _empty_like(x)
    what, signs = keeps(activation, x, residual) if keep else None, None
    if what == "signs":
        signs = torch.empty(signs_shape(x), dtype=torch.uint8, device=x.device)
    kept = {"signs": signs, "output": y, "residual": residual, None: None}[what]
    mean = torch.empty(x.shape[1], dtype=_accumulator(x), device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_(), kept
    x3, residual3 = layout.inner(x), None if residual is None else layout.inner(residual)
    view = View.of(x3, residual3, y3, signs=signs is not None)
    plan = view.plan(x, tensors=0 if frozen else 1)
    statistics = "running" if frozen else plan.reduction
    partial = _launch_moments(x3, view, plan) if statistics == "partial" else None
    running = layout.vector(running_mean), layout.vector(running_var)
    # What the kernel counts in.
    counter = None if tracked is None else tracked.to(x.device, torch.int64)
    grid, view = plan.grid(view.c), view.packed(plan)
    _batch_norm_fwd_kernel[grid](
        x3,
        layout.vector(gamma),
        layout.vector(beta),
        residual3,
        *running,
        counter,
        partial,
        y3,
        signs,
        mean,
        rstd,
        view.n,
        view.c,
        view.length,
        *view.strides,
        plan.n_tiles,
        plan.tiles_per_program,
        plan.n_programs,
        float(momentum or 0.0),
        eps=eps,
        correction=correction,
        STATISTICS=statistics,
        CUMULATIVE=momentum is None,
        SKIP_NONFINITE=skip_nonfinite,
        ACTIVATION=activation,
        GROUP=view.group(plan, x.dtype),
        COLUMNS=view.columns,
        BLOCK_N=plan.BLOCK_N,
        BLOCK_L=plan.BLOCK_L,
        BLOCK_C=plan.BLOCK_C,
        ALIGN=view.align(),
        STAGES=plan.stages(x3, residual3),
        PACK=plan.pack,
        BLOCK_P=plan.partials(plan.n_programs),
        num_warps=plan.num_warps,
        enable_fp_fusion=False,
    )
    if not frozen:
        layout.copy_back(running_mean, running[0])
        layout.copy_back(running_var, running[1])
        layout.copy_back(tracked, counter)
    return y, mean, rstd, kept


class _Backward(NamedTuple):
    """What the backward launches read and write; tensors of x's shape are (N, C, L)."""

    view: View  # of x, dy, kept, dx and dz
    x: torch.Tensor
    dy: torch.Tensor
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    kept: torch.Tensor | None
    mean: torch.Tensor
    rstd: torch.Tensor
    activation: str | None
    kind: str | None  # of what was kept
    dx: torch.Tensor | None
    dz: torch.Tensor | None

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        dy: torch.Tensor,
        gamma: torch.Tensor | None,
        beta: torch.Tensor | None,
        kept: torch.Tensor | None,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        activation: str | None,
        dx: torch.Tensor | None,
        dz: torch.Tensor | None,
    ) -> "_Backward":
        kind = _kind(activation, kept)
        if kind == "signs":
            assert kept is not None
            if (kept.dim() == 2) != by_channel(layout.inner(x)):
                # x is not as the forward pass saw it: somebody kept a copy of it for us.
                kept, kind = unpack_signs(kept, x).to(x.dtype), "output"
        x3, dy = layout.inner(x), layout.inner(dy)
        if not layout.lies_as(dy, x3 if dx is None else dx):
            # So its neighbours are x's, and what is summed in which order is said by x alone.
            dy = layout.inner(torch.empty_like(x)).copy_(dy)
        x = x3
        gamma, beta = layout.vector(gamma), layout.vector(beta)
        if kept is not None and kind != "signs":
            kept = layout.inner(kept)
        shaped = None if kind == "signs" else kept
        view = View.of(x, dy, shaped, dx, dz, signs=kind == "signs")
        return cls(view, x, dy, gamma, beta, kept, mean, rstd, activation, kind, dx, dz)

    def plan(self, reduced: bool) -> tuning.BatchNormPlan:
        return self.view.plan(self.x, tensors=2 if reduced else 0)

    def sums(self, plan: tuning.BatchNormPlan) -> torch.Tensor:
        """(n_programs, 2, C): dgamma and dbeta of each program's rows; writes dz, and dx = slope *
        dz, where there is one"""
        partial = self.mean.new_empty(plan.n_programs, 2, self.view.c)
        view = self.view.packed(plan)
        _batch_norm_sums_kernel[plan.grid(self.view.c)](
            self.dy,
            self.x,
            self.gamma,
            self.beta,
            self.kept,
            self.mean,
            self.rstd,
            self.dx,
            self.dz,
            partial,
            view.n,
            view.c,
            view.length,
            *self.strides(view),
            plan.n_tiles,
            plan.tiles_per_program,
            ACTIVATION=self.activation,
            KEPT=self.kind,
            GROUP=view.group(plan, self.x.dtype),
            COLUMNS=view.columns,
            BLOCK_N=plan.BLOCK_N,
            BLOCK_L=plan.BLOCK_L,
            BLOCK_C=plan.BLOCK_C,
            ALIGN=view.align(),
            STAGES=self.stages(plan),
            PACK=plan.pack,
            num_warps=plan.num_warps,
            enable_fp_fusion=False,
        )
        return partial

    def gradients(
        self,
        plan: tuning.BatchNormPlan,
        reduction: str,
        partial: torch.Tensor | None,
        count: torch.Tensor | None,
        correction: int,
        batch_statistics: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dgamma and dbeta (C,); writes dx, and dz where there is one"""
        dgamma, dbeta = _for(self.gamma, self.mean), _for(self.beta, self.mean)
        n_partials = 1 if partial is None else partial.shape[0]
        view = self.view.packed(plan)
        _batch_norm_bwd_kernel[plan.grid(self.view.c)](
            self.dy,
            self.x,
            self.gamma,
            self.beta,
            self.kept,
            self.mean,
            self.rstd,
            partial,
            count,
            self.dx,
            self.dz,
            dgamma,
            dbeta,
            view.n,
            view.c,
            view.length,
            *self.strides(view),
            plan.n_tiles,
            plan.tiles_per_program,
            n_partials,
            correction=correction,
            SUMS=reduction,
            BATCH_STATISTICS=batch_statistics,
            ACTIVATION=self.activation,
            KEPT=self.kind,
            GROUP=view.group(plan, self.x.dtype),
            COLUMNS=view.columns,
            BLOCK_N=plan.BLOCK_N,
            BLOCK_L=plan.BLOCK_L,
            BLOCK_C=plan.BLOCK_C,
            ALIGN=view.align(),
            STAGES=self.stages(plan),
            PACK=plan.pack,
            BLOCK_P=plan.partials(n_partials),
            num_warps=plan.num_warps,
            enable_fp_fusion=False,
        )
        return dgamma, dbeta

    @staticmethod
    def strides(view: View) -> tuple[tuple[int, int, int], ...]:
        """Of dy, x, kept, dx and dz"""
        x, dy, *rest = view.strides
        return (dy, x, *rest)

    def stages(self, plan: tuning.BatchNormPlan) -> int:
        """Of the loop over tiles"""
        if self.kind != "signs":
            return plan.stages(self.x, self.dy, self.kept)
        # Signs, too few bytes a thread to go to shared memory, are read ahead into registers: a
        # stage fewer, or these spilled. Of two one would read nothing ahead, and none spilled.
        return max(2, plan.stages(self.x, self.dy) - 1)
