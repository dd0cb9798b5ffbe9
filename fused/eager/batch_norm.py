"""Batch normalisation in plain PyTorch, with the functions of fused.kernels.batch_norm.

The mathematics is written there. Tensors are walked over in chunks that stay in a processor's cache
between the few operations on each, and every operation writes into memory that is there already: on
a CPU a new tensor costs more, in page faults, than the arithmetic on it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused.eager.activation import IN_PLACE, NEW, activation_backward, tanh_by_sigmoid_
from fused.eager.batch_norm_native import (
    Native,
    computed_in,
    native_bwd,
    native_moments,
    root_of_bessel,
    to_biased,
)
from fused.eager.layout import View, sized, split, step

_CHUNK = 2**19  # elements: 2 MB of float32. Of 2^15 to 2^21, 2^19 took the least time.


def batch_norm_fwd(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    correction: int,
    activation: str | None,
    skip_nonfinite: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Normalises x (N, C, *S) with the statistics of the batch; updates the running ones in place.

    tracked, if given, is counted up, and then a momentum of None is 1 / tracked. Returns
    (y, mean, rstd, kept): y in x's dtype and memory format, mean and rstd (C,) in float32, or
    float64 for float64, and what backward takes besides if `keep`: y, the residual, or None.
    """
    n = x.numel() // max(1, x.shape[1])
    if n == 0:
        if tracked is not None:
            tracked.add_(1)
        mean, m2 = batch_norm_moments(x)
        return torch.empty_like(x), mean, m2, None
    native, is_native = None, _is_native(x)
    if is_native and residual is None and activation in (None, "relu"):
        native = Native.of(x, _to_float32(gamma), _to_float32(beta), eps, correction)
    if native is not None:
        mean, rstd = native.mean, native.rstd
        update_running(running_mean, running_var, tracked, momentum, mean, native.var, False)
        if correction:
            rstd = rstd * root_of_bessel(n)
        y = native.y.relu_() if activation else native.y
        return y, mean, rstd, _kept(activation, y, None, keep)
    form, scratch = _Form.of(x), _Scratch(computed_in(x))
    moments = native_moments(x) if is_native else None
    exact_mean, m2 = moments or _moments(form.view(x), form, scratch)
    mean = exact_mean.to(scratch.dtype)
    # The running variance is the unbiased one, whatever the correction: as torch.nn.BatchNorm's.
    update_running(running_mean, running_var, tracked, momentum, mean, m2 / (n - 1), skip_nonfinite)
    rstd = (m2 / (n - correction)).add_(eps).rsqrt_().to(mean.dtype)
    scale = rstd if gamma is None else rstd * gamma
    shift = (mean - exact_mean).to(mean.dtype).mul_(scale)  # what rounding took from the mean
    if beta is not None:
        shift += beta
    y = _normalised(x, form, mean, scale, shift, residual, activation, scratch)
    return y, mean, rstd, _kept(activation, y, residual, keep)


def batch_norm_eval(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Normalises x (N, C, *S) with given statistics (C,). Returns the same as above."""
    acc = computed_in(x)
    mean = mean.to(acc, copy=True)  # what backward uses must not follow a later update
    rstd = var.to(acc).add(eps).rsqrt_()
    scale = rstd if gamma is None else rstd * gamma
    shift = torch.zeros_like(mean) if beta is None else beta.to(acc)
    y = _normalised(x, _Form.of(x), mean, scale, shift, residual, activation, _Scratch(acc))
    return y, mean, rstd, _kept(activation, y, residual, keep)


def batch_norm_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, m2) of x (N, C, *S): per-channel mean and sum of squared deviations, (C,) each."""
    if x.numel() == 0:
        zeros = x.new_zeros(x.shape[1], dtype=computed_in(x))
        return zeros, zeros.clone()
    form, scratch = _Form.of(x), _Scratch(computed_in(x))
    mean, m2 = _moments(form.view(x), form, scratch)
    return mean.to(scratch.dtype), m2


def batch_norm_sums(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    kept: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str | None,
    want_dresidual: bool,
) -> tuple[Tensor, Tensor | None]:
    """(sums, dresidual): dgamma and dbeta as one tensor (2, C) in the dtype of mean, and dz, None
    where it is not wanted."""
    passes = _Backward(dy, x, gamma, beta, kept, mean, rstd, activation)
    dz = passes.new_dz() if want_dresidual else None
    return passes.sums(dz), dz


def batch_norm_dx(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    kept: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    sums: Tensor,
    count: Tensor,
    correction: int,
    activation: str | None,
) -> Tensor:
    """dx from dgamma and dbeta, sums (2, C), of all the `count` rows (one number) that were
    normalised together, which may be more than x's."""
    passes = _Backward(dy, x, gamma, beta, kept, mean, rstd, activation)
    dx = passes.form.view.empty_like(x)
    passes.dx(dx, None, sums, count, correction)
    return dx


def batch_norm_bwd(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    kept: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    correction: int,
    activation: str | None,
    batch_statistics: bool,
    want_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients (dx, dgamma, dbeta, dresidual) of batch normalisation.

    dx is in x's dtype; dgamma and dbeta (C,) are in gamma's and beta's, in that of mean where there
    are none; dresidual is None where it is not wanted. `batch_statistics` says whether mean and
    rstd came from x (training) or were frozen. `kept` is the forward's; without an activation,
    None.
    """
    n = x.numel() // max(1, x.shape[1])
    # Another implementation's forward may have kept no output.
    knows_dz = activation is None or (activation == "relu" and kept is not None)
    if batch_statistics and n and knows_dz and _is_native(x):
        dz = _laid_out_as(x, dy)
        if kept is not None:
            dz = torch.ops.aten.threshold_backward(dz, kept, 0)
        bessel = root_of_bessel(n) if correction else 1.0
        biased = to_biased(_to_float32(gamma), x, n, correction)
        dx, dgamma, dbeta = native_bwd(dz, x, biased, mean, rstd / bessel, 0.0)
        dgamma, dbeta = _as(dgamma * bessel, gamma, mean), _as(dbeta, beta, mean)
        return dx, dgamma, dbeta, dz if want_dresidual else None
    passes = _Backward(dy, x, gamma, beta, kept, mean, rstd, activation)
    dresidual = passes.new_dz() if want_dresidual else None
    dx = passes.form.view.empty_like(x)
    reads_dz = activation is not None and _serves_rounded(x, n)
    # Until dx is there, its memory holds dz.
    stored = dx if reads_dz and dresidual is None else dresidual
    sums = passes.sums(stored)
    passes.dx(
        dx, stored if reads_dz else None, sums if batch_statistics and n else None, n, correction
    )
    # No two of them share memory.
    dgamma, dbeta = _as(sums[0], gamma, mean), _as(sums[1].clone(), beta, mean)
    return dx, dgamma, dbeta, dresidual


def _serves_rounded(x: Tensor, n: int) -> bool:
    """Whether dx may come of a dz in x's dtype: of float32, and of bfloat16 unless the n rows are
    so few that dz, rounded, has other sums than dz. float16 may end before dz does."""
    return x.dtype.itemsize > 2 or (x.dtype == torch.bfloat16 and n >= 64)


def _as(gradient: Tensor, parameter: Tensor | None, mean: Tensor) -> Tensor:
    return gradient.to((mean if parameter is None else parameter).dtype)


def keeps(activation: str | None, x: Tensor, residual: Tensor | None) -> str | None:
    """What backward takes besides x: the "output", the "residual", or None."""
    if activation is None:
        return None
    if _from_output(activation, x.dtype):
        return "output"
    return None if residual is None else "residual"


def _is_native(x: Tensor) -> bool:
    """Whether PyTorch's kernels may serve for what they round as we would: half precision, of which
    theirs are a third of our passes. In float32 they are less exact; and where the stride of a size
    of 1 is not the usual one, they take x for one memory format here and for another there."""
    return x.is_cpu and x.dtype.itemsize == 2 and _is_in_usual_format(x)


def _is_in_usual_format(x: Tensor) -> bool:
    """Contiguous or channels_last, strides of sizes of 1 included."""
    dimensions = list(range(x.dim()))
    if x.dim() > 3 and not x.is_contiguous():
        dimensions.append(dimensions.pop(1))
    usual = 1
    for d in reversed(dimensions):
        if x.stride(d) != usual:
            return False
        usual *= x.shape[d]
    return True


def _laid_out_as(x: Tensor, t: Tensor) -> Tensor:
    return t if t.stride() == x.stride() else torch.empty_like(x, dtype=t.dtype).copy_(t)


def _to_float32(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float()


def _kept(activation: str | None, y: Tensor, residual: Tensor | None, keep: bool) -> Tensor | None:
    what = keeps(activation, y, residual) if keep else None
    return {"output": y, "residual": residual, None: None}[what]


def _from_output(activation: str | None, dtype: torch.dtype) -> bool:
    """Whether f'(z) comes of y as well: tanh' not of one that was rounded to half precision."""
    return activation == "relu" or (activation == "tanh" and dtype.itemsize >= 4)


def batch_norm_composed(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    correction: int,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same y from operations that torch can differentiate any number of times.

    mean and rstd (C,) are frozen statistics, or None for the batch's. Returns (y, mean, m2), m2
    being None for frozen statistics. For derivatives of higher order and for torch.func.
    """
    xc, m2 = x.to(computed_in(x)), None
    if mean is None or rstd is None:
        n = x.numel() // max(1, x.shape[1])
        mean = xc.mean(_rows(x))
        m2 = (xc - _per_channel(mean, x)).square().sum(_rows(x))
        rstd = (m2 / (n - correction) + eps).rsqrt()
    z = (xc - _per_channel(mean, x)) * _per_channel(rstd, x)
    if gamma is not None:
        z = z * _per_channel(gamma, x)
    if beta is not None:
        z = z + _per_channel(beta, x)
    if residual is not None:
        z = z + residual
    return (z if activation is None else NEW[activation](z)).to(x.dtype), mean, m2


def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    momentum: float | None,
    mean: Tensor,
    var: Tensor,
    skip_nonfinite: bool | Tensor,
) -> None:
    """running = (1 - momentum) * running + momentum * batch, in place.

    var is the unbiased variance. tracked, if given, is counted up, and then a momentum of None is
    1 / tracked. `skip_nonfinite`, which may be known on the device alone, leaves channels alone
    whose mean or var is inf or NaN.
    """
    if tracked is not None:
        tracked.add_(1)
    if momentum is None:
        assert tracked is not None
        rate: Tensor | float = tracked.to(mean.dtype).reciprocal()
    else:
        rate = momentum
    finite = None
    if skip_nonfinite is not False:
        finite = (mean * 0 + var.to(mean.dtype)).isfinite()
        if isinstance(skip_nonfinite, Tensor):
            finite = finite.logical_or(~skip_nonfinite)
    for running, batch in ((running_mean, mean), (running_var, var)):
        if running is not None:
            new = (1 - rate) * running.to(batch.dtype) + rate * batch
            _set(running, new if finite is None else torch.where(finite, new, running))


def _set(running: Tensor, new: Tensor) -> None:
    """running = new, also where a transform of torch.func captured it.

    Operations may not change it in place there, but PyTorch's batch norm may: to the mean of two
    rows.
    """
    if torch._C._are_functorch_transforms_active():
        rows, other = torch.stack((new, new)).to(running.dtype), torch.zeros_like(running)
        torch.native_batch_norm(rows, None, None, running, other, True, 1.0, 1.0)
    else:
        running.copy_(new)


def _rows(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """vector (C,) in the shape (1, C, 1, ...) that broadcasts over x."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))


class _Form(NamedTuple):
    """How tensors (N, C, *S) are seen: as rows of channels (A, C), or as (A, C, B)."""

    view: View

    @classmethod
    def of(cls, x: Tensor) -> "_Form":
        """The one that x lies in, if there is one."""
        view = View.of(x)
        return cls(View.in_order(x) if view.order is None and x.dim() > 2 else view)

    @property
    def columns(self) -> bool:
        return len(self.view.shape) < 3

    def vector(self, v: Tensor) -> Tensor:
        """v (C,) in the shape that broadcasts over a view."""
        return v if self.columns else v.unsqueeze(1)

    def sum(
        self, view: Tensor, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        """(C,), over all rows"""
        return torch.sum(view, 0 if self.columns else (0, 2), dtype=dtype, out=out)


def _chunks(*views: Tensor | None) -> list[tuple[Tensor, ...]]:
    """The views cut alike, into pieces that stay in cache together."""
    first = views[0]
    assert first is not None
    size = step(first, _CHUNK)
    return list(zip(*(split(v, *size) for v in views), strict=False))  # None stays None


class _Scratch:
    """Memory of a chunk's size, by name, taken once a call; the first chunk is the largest."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, chunk: Tensor) -> Tensor:
        if name not in self._buffers:
            shape, device = chunk.shape, chunk.device
            self._buffers[name] = torch.empty(shape, dtype=self.dtype, device=device)
        return sized(self._buffers[name], chunk)

    def converted(self, name: str, chunk: Tensor) -> Tensor:
        """The chunk itself, if it is of this dtype."""
        return chunk if chunk.dtype == self.dtype else self(name, chunk).copy_(chunk)


def _less(x: Tensor, column: Tensor, out: Tensor) -> Tensor:
    """x - column; of two dtypes torch would convert into new memory"""
    return torch.sub(x, column, out=out) if x.dtype == out.dtype else out.copy_(x).sub_(column)


def _moments(view: Tensor, form: _Form, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """(mean, m2) (C,) in float64, from d = x - (the first chunk's mean)

    sum d^2 is at most 1 + n / n1 times m2, n1 being the rows of the first chunk, which bounds what
    sum d^2 - (sum d)^2 / n cancels, whatever the data (docs/derivations.md).
    """
    chunks, c = _chunks(view), view.shape[1]
    n, (first,) = view.numel() // c, chunks[0]
    about = form.sum(scratch.converted("d", first)).div_(first.numel() // c)
    column = form.vector(about)
    sums = about.new_empty(2, len(chunks), c)
    for (x,), sum_d, sum_d2 in zip(chunks, *(s.unbind() for s in sums), strict=True):
        d = _less(x, column, out=scratch("d", x))
        form.sum(d, out=sum_d)
        form.sum(d.mul_(d), out=sum_d2)
    s, q = sums.double().sum(1)
    s_n = s / n
    mean = s_n + about
    # Deviations near 1e30 have squares that only float64 holds; on the CPU, looking costs nothing.
    if view.device.type == "cpu" and not q.isfinite().all():
        if scratch.dtype != torch.float64:
            return _moments(view, form, _Scratch(torch.float64))
        # What is relative to an inf is NaN, though the mean is inf.
        plain = form.sum(view, dtype=torch.float64) / n
        mean = torch.where(q.isfinite(), mean, plain)
    return mean, q.sub_(s.mul_(s_n)).clamp_(min=0.0)


def _normalised(
    x: Tensor,
    form: _Form,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    activation: str | None,
    scratch: _Scratch,
) -> Tensor:
    """f(scale * (x - mean) + shift + residual) in x's dtype and format"""
    y = form.view.empty_like(x)
    mean, scale, shift = form.vector(mean), form.vector(scale), form.vector(shift)
    views = form.view(x), form.view(y), None if residual is None else form.view(residual)
    for x_, y_, residual_ in _chunks(*views):
        z = y_ if x.dtype == scratch.dtype else scratch("d", x_)
        _less(x_, mean, out=z).mul_(scale).add_(shift)  # addcmul of two broadcast is slower
        if residual_ is not None:
            z.add_(residual_)
        if activation is not None:
            IN_PLACE[activation](z)
        if z is not y_:
            y_.copy_(z)
    return y


class _Backward:
    """The two passes of the backward; dz = dy * f'(z), which is dy where there is no f."""

    def __init__(
        self,
        dy: Tensor,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        kept: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        activation: str | None,
    ) -> None:
        self.form = form = _Form.of(x)
        y, residual = (kept, None) if _from_output(activation, x.dtype) else (None, kept)
        views = x, dy, y, residual
        self.x_dy_y_residual = tuple(None if v is None else form.view(v) for v in views)
        self.x, self.dy, self.mean, self.rstd, self.beta = x, dy, mean, rstd, beta
        self.scale = rstd if gamma is None else rstd * gamma
        self.activation, self.scratch = activation, _Scratch(mean.dtype)

    def new_dz(self) -> Tensor:
        """dz in x's dtype: memory for it, or dy."""
        if self.activation is None:
            return self.dy.to(self.x.dtype)
        return self.form.view.empty_like(self.x)

    def sums(self, dz: Tensor | None) -> Tensor:
        """dgamma and dbeta, (2, C); writes dz."""
        form = self.form
        dz = None if dz is None or self.activation is None else form.view(dz)
        chunks = _chunks(*self.x_dy_y_residual, dz)
        sums = self.mean.new_empty(2, len(chunks), self.mean.shape[0])
        for chunk, sum_d, sum_dz in zip(chunks, *(s.unbind() for s in sums), strict=True):
            d, own_dz = self._d_and_dz(*chunk)
            form.sum(own_dz, out=sum_dz)
            form.sum(d.mul_(own_dz), out=sum_d)
        total = sums.double().sum(1)
        if self.x.numel():  # else rstd may be NaN, of no rows anywhere
            total[0] *= self.rstd
        return total.to(self.mean.dtype)

    def dx(
        self,
        dx: Tensor,
        dz: Tensor | None,
        sums: Tensor | None,
        n: Tensor | int,
        correction: int,
    ) -> None:
        """dx = scale * (dz - dbeta/n - xhat * dgamma/(n - correction)), or scale * dz where there
        are no sums; dz is what `sums` wrote, if it did, and may be dx."""
        form, acc = self.form, self.mean.dtype
        scale = form.vector(self.scale)
        if sums is not None:
            along = form.vector(-self.scale * self.rstd * (sums[0] / (n - correction)))
            shift = form.vector(-self.scale * (sums[1] / n))
        known = None if dz is None else form.view(dz)
        for *chunk, dz_, dx_ in _chunks(*self.x_dy_y_residual, known, form.view(dx)):
            if dz_ is None:
                d, dz_ = self._d_and_dz(*chunk, None)
            else:
                dz_ = self.scratch.converted("dz", dz_)
                if sums is not None:
                    d = self._d(chunk[0])
            out = dx_ if dx_.dtype == acc else self.scratch("d", dx_)
            if sums is None:
                torch.mul(dz_, scale, out=out)
            else:
                torch.addcmul(d.mul_(along).add_(shift), dz_, scale, out=out)
            if out is not dx_:
                dx_.copy_(out)

    def _d(self, x: Tensor) -> Tensor:
        """x - mean of a chunk"""
        return _less(x, self.form.vector(self.mean), out=self.scratch("d", x))

    def _d_and_dz(
        self,
        x: Tensor,
        dy: Tensor,
        y: Tensor | None,
        residual: Tensor | None,
        dz: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """x - mean and dz of a chunk, in the dtype computed in; dz is written to `dz`, if given."""
        form, scratch, f = self.form, self.scratch, self.activation
        d = self._d(x)
        if f is None:
            return d, scratch.converted("dz", dy)
        if y is None:
            z = torch.mul(d, form.vector(self.scale), out=scratch("z", d))
            if self.beta is not None:
                z.add_(form.vector(self.beta))
            if residual is not None:
                z.add_(residual)
            y = tanh_by_sigmoid_(z) if f == "tanh" else z
        out = dz if dz is not None and dz.dtype == scratch.dtype else scratch("dz", d)
        activation_backward(f, scratch.converted("dz", dy), scratch.converted("z", y), out)
        if dz is not None and dz is not out:
            dz.copy_(out)
        return d, out
