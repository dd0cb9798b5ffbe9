"""Batch normalisation: the checked function, its backward pass and its modules."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused import backend
from fused.eager import batch_norm as eager
from fused.eager.batch_norm_small import batch_norm_small, is_small
from fused.module_repr import with_options
from fused.operators import batch_norm as operators
from fused.second_order import batch_norm_gradients
from fused.transforms import (
    as_leaf,
    is_composed,
    is_recorded,
    is_symbolic,
    is_transformed,
    may_be_overridden,
    outlives_the_call,
    refuse_script,
    saves_elsewhere,
)

ACTIVATIONS = (None, "tanh", "relu", "gelu", "silu")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Options(NamedTuple):
    """How a call normalises, besides its tensors."""

    batch_statistics: bool
    momentum: float | None
    eps: float
    correction: int
    activation: str | None
    skip_nonfinite: bool


def will_differentiate(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class BatchNormFunction(torch.autograd.Function):
    """dx = gamma*rstd/n * (n*dz - sum(dz) - n/(n-correction) * xhat * sum(dz*xhat))

    and, with frozen statistics, dx = gamma*rstd*dz; dz = dy * f'(z) behind an activation f.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        tracked: Tensor | None,
        options: _Options,
        keep: bool,
    ) -> Tensor:
        kernels = backend.implementation("batch_norm", input)
        o = options
        if o.batch_statistics:
            y, mean, rstd, kept = kernels.batch_norm_fwd(
                input, weight, bias, residual, running_mean, running_var, tracked,
                o.momentum, o.eps, o.correction, o.activation, o.skip_nonfinite, keep,
            )  # fmt: skip
            # A kernel's write is not seen by autograd.
            increment_version([t for t in (running_mean, running_var, tracked) if t is not None])
        else:
            y, mean, rstd, kept = kernels.batch_norm_eval(
                input, weight, bias, residual, running_mean, running_var, o.eps, o.activation, keep
            )
        ctx.kernels, ctx.options, ctx.kept_residual = kernels, options, kept is residual
        if o.activation is None or not ctx.kept_residual:
            bias = operators.of_dtype_alone(bias)
        # Frozen statistics are copied: the backward must not follow a later update of them.
        ctx.save_for_backward(input, weight, bias, kept, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, kept, mean, rstd = ctx.saved_tensors
        wants = ctx.needs_input_grad[:4]
        none = (None,) * 5
        o = ctx.options
        if is_composed(dy):
            frozen = (None, None) if o.batch_statistics else (mean, rstd)
            gradients = batch_norm_gradients(
                dy, input, weight, bias, kept, ctx.kept_residual, frozen, o.eps, o.correction,
                o.activation, wants,
            )  # fmt: skip
            return (*gradients, *none)
        dx, dgamma, dbeta, dresidual = ctx.kernels.batch_norm_bwd(
            dy, input, weight, bias, kept, mean, rstd, o.correction, o.activation,
            o.batch_statistics, wants[3],
        )  # fmt: skip
        return (dx, dgamma if wants[1] else None, dbeta if wants[2] else None, dresidual, *none)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    correction: int = 0,
    activation: str | None = None,
    residual: Tensor | None = None,
    skip_nonfinite: bool = False,
) -> Tensor:
    """Batch normalisation: torch's `F.batch_norm`, with Bessel's correction and what follows it.

    Training normalises each channel with the statistics of the batch and updates the running ones
    in place; evaluation normalises with the running ones. Each has its own backward in closed form.
    Over n rows (n = N * d1 * ... * dk), with c = correction, xhat the normalised input, f the
    activation and y = f(z), z = weight * xhat + bias + residual:

        dz      = dy * f'(z)
        dinput  = weight*rstd/n * (n*dz - sum(dz) - n/(n-c) * xhat * sum(dz*xhat))    training
        dinput  = weight*rstd * dz                                                  evaluation
        dweight = sum(dz*xhat)           dbias = sum(dz)           dresidual = dz

    The kernels never write z to memory; backward recomputes it, or takes f'(z) from its signs
    (relu) or from y (tanh; on the CPU relu as well, where small calls are PyTorch's own kernels).
    Statistics are computed in float32 (float64 for float64), two-pass or merged in a fixed order,
    without float atomics: two runs on one device are equal to the last bit. First and second
    derivatives, `torch.func`, `torch.compile(fullgraph=True)` and CUDA graphs work; derivatives of
    higher order and functional ones take torch's own operations instead of the kernels. (Third
    derivatives of small calls on the CPU are those of `F.batch_norm`, which are wrong.)

    Args:
        input: shape (N, C) or (N, C, d1, ..., dk), float16, bfloat16, float32 or float64, any
            strides; contiguous, channels_last and channels_last_3d are all at home.
        running_mean, running_var: shape (C,), or None (both) in training.
        weight, bias: C numbers, or None for 1 and 0. They and the running statistics are in
            input's dtype, or in float32 for half precision.
        training: whether to normalise with the statistics of the batch.
        momentum: running = (1 - momentum) * running + momentum * batch.
        eps: added to the variance before its square root.
        correction: what the batch's variance divides by: n - correction. 0 is the biased variance,
            which torch normalises with; 1 is Bessel's correction. running_var keeps the unbiased
            variance either way, as torch does.
        activation: "tanh", "relu", "gelu" (with the error function), "silu", or None. On the CPU
            tanh is off by up to 2e-7, which is much of an output near 0.
        residual: added before the activation; shape and dtype of input, any strides. Kept for the
            backward only with gelu, silu, and tanh of half precision.
        skip_nonfinite: leaves the running statistics of a channel alone where the batch has an inf
            or NaN in it; decided on the device. A module counts such a batch as well: the mean of
            all batches, with momentum=None, takes what stood there in its place.

    Returns:
        Shape, dtype and memory format of input.

    Raises:
        ValueError: one row in training (it has no variance), an unknown correction or activation,
            an eps that is not positive (in evaluation: is negative), or only one of the running
            statistics.
        RuntimeError: shapes, dtypes or devices that do not fit, or evaluation without running
            statistics.
        TypeError: a momentum of None, which is the modules' cumulative average.
        NotImplementedError: an input of another dtype.

    Source: Ioffe and Szegedy, "Batch Normalization" (2015); the backward pass is derived in
    docs/derivations.md.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function_variadic(*tensors) and may_be_overridden():
        return handle_torch_function(
            batch_norm, tensors, input, running_mean, running_var, weight=weight, bias=bias,
            training=training, momentum=momentum, eps=eps, correction=correction,
            activation=activation, residual=residual, skip_nonfinite=skip_nonfinite,
        )  # fmt: skip
    if momentum is None:  # as torch; to `run` it means 1 / tracked
        raise TypeError(
            "batch_norm: expected momentum to be a number, got None; only the modules know how "
            "many batches there were, of which None is the average"
        )
    if weight is not None and weight.dim() != 1:  # as torch, which counts its elements
        weight = weight.flatten()
    if bias is not None and bias.dim() != 1:
        bias = bias.flatten()
    options = _Options(training, momentum, eps, correction, activation, skip_nonfinite)
    return run(input, weight, bias, residual, running_mean, running_var, None, options)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the modules share: torch's arguments, parameters and buffers, and our options."""

    # On the class, so that a module of torch's becomes one of ours by its class alone.
    correction: int = 0
    activation: str | None = None
    skip_nonfinite: bool = False
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        correction: int = 0,
        activation: str | None = None,
        skip_nonfinite: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **keywords
        )
        check_options(correction, activation)
        self.correction, self.activation = correction, activation
        self.skip_nonfinite = skip_nonfinite

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_symbolic(input):
            return as_leaf(self, input, residual)
        self._check_input_dim(input)
        return self._normalize(run, input, residual)

    def _normalize(self, call: Any, input: Tensor, residual: Tensor | None) -> Tensor:
        """Calls `call` with the statistics that torch's modules would use, and counts the batch."""
        mean, var, tracked = self.running_mean, self.running_var, self.num_batches_tracked
        if self.training and not self.track_running_stats:
            mean = var = tracked = None
        batch_statistics = self.training or (mean is None and var is None)
        momentum = self.momentum
        if not self.training:
            tracked = None
        if tracked is None:  # else a momentum of None is 1 / tracked, which stays on the device
            momentum = momentum or 0.0
        options = _Options(
            batch_statistics,
            momentum,
            self.eps,
            self.correction,
            self.activation,
            self.skip_nonfinite,
        )
        tensors = (input, self.weight, self.bias, residual, mean, var)
        arguments: Any = (*tensors, tracked, options)
        if has_torch_function_variadic(*tensors) and may_be_overridden():
            # Not `batch_norm`, as torch's modules call F.batch_norm: it would not count the batch.
            return handle_torch_function(call, tensors, *arguments)
        return call(*arguments)

    def extra_repr(self) -> str:
        return with_options(
            super().extra_repr(), self, correction=0, activation=None, skip_nonfinite=False
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on (N, C) or (N, C, L), computed by `fused.batch_norm`.

    Takes what torch's takes, and `correction`, `activation` and `skip_nonfinite` of
    `fused.batch_norm`. Called as `module(input)` or `module(input, residual)`. Parameters, buffers
    and `state_dict` are torch's.
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on (N, C, H, W), by `fused.batch_norm`; see `BatchNorm1d`."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on (N, C, D, H, W), by `fused.batch_norm`; see `BatchNorm1d`."""


def run(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    options: _Options,
) -> Tensor:
    """Checks, chooses, computes."""
    o = options
    check_options(o.correction, o.activation, o.eps, o.batch_statistics)
    if input.dim() < 2 and residual is None and o.activation is None:  # no channels: torch's answer
        return F.batch_norm(
            input, running_mean, running_var, weight, bias, o.batch_statistics, o.momentum or 0.0
        )
    check(input, weight, bias, residual, running_mean, running_var, o.batch_statistics)
    if o.batch_statistics:
        check_rows(input)
    tensors = (input, weight, bias, residual)
    transformed, recorded = is_transformed(*tensors, running_mean, running_var), is_recorded()
    if recorded and not transformed:
        keep = outlives_the_call() or will_differentiate(*tensors)
        return operators.call(*tensors, running_mean, running_var, tracked, keep, **o._asdict())
    small = not transformed and _is_small(input, o)
    if (transformed and not recorded or small) and _may_stop(o, running_mean, tracked):
        with torch.no_grad():
            run(*tensors, running_mean, running_var, tracked, o)
        running_mean = running_var = tracked = None
    if transformed:
        return _functional(*tensors, running_mean, running_var, tracked, o)
    if small:
        assert o.momentum is not None
        found = batch_norm_small(
            *tensors, running_mean, running_var, tracked, o.momentum, o.eps, o.correction,
            o.activation,
        )  # fmt: skip
        if found is not None:
            return found[0]
    keep = will_differentiate(*tensors)
    return BatchNormFunction.apply(*tensors, running_mean, running_var, tracked, o, keep)


def _may_stop(o: _Options, running_mean: Tensor | None, tracked: Tensor | None) -> bool:
    """Whether there are statistics to update before torch's operations save anything: there the
    recomputation of a checkpoint may end."""
    return (
        o.batch_statistics
        and (running_mean is not None or tracked is not None)
        and saves_elsewhere()
        and torch.is_grad_enabled()
    )


def _is_small(input: Tensor, o: _Options) -> bool:
    """Whether torch's own operations may serve as well and are quicker to call."""
    return (
        o.batch_statistics
        and is_small(input)
        and o.momentum is not None
        and not o.skip_nonfinite
        and backend.name_for(input) == "eager"
    )


def _functional(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    o: _Options,
) -> Tensor:
    """Under torch.func: composed of torch's operations."""
    mean = rstd = None
    if not o.batch_statistics:
        assert running_mean is not None and running_var is not None
        mean, rstd = running_mean, (running_var + o.eps).rsqrt()
    y, mean, m2 = eager.batch_norm_composed(
        input, weight, bias, residual, mean, rstd, o.eps, o.correction, o.activation
    )
    if m2 is not None and input.numel() == 0:
        if tracked is not None:
            tracked.add_(1)
    elif m2 is not None:
        var = m2.detach() / (input.numel() // input.shape[1] - 1)
        eager.update_running(
            running_mean, running_var, tracked, o.momentum, mean.detach(), var, o.skip_nonfinite
        )
    return y


def check_options(
    correction: int, activation: str | None, eps: float = 1e-5, batch_statistics: bool = True
) -> None:
    """Refuses what is no option of ours, and an eps that torch refuses."""
    if eps < 0 or eps == 0 and batch_statistics:
        raise ValueError(
            f"batch_norm: eps must be positive{'' if batch_statistics else ' or 0'}, got {eps}"
        )
    if correction not in (0, 1):
        raise ValueError(
            "batch_norm: expected correction 0 (biased variance) or 1 (Bessel's), "
            f"got {correction!r}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"batch_norm: expected activation to be one of {ACTIVATIONS}, got {activation!r}"
        )


def check_rows(input: Tensor) -> None:
    """Refuses a batch of one row, which has no variance."""
    if input.numel() == input.shape[1] and input.shape[0] * input.shape[2:].numel() == 1:
        raise ValueError(
            "batch_norm: expected more than 1 value per channel in training, got input of shape "
            f"{tuple(input.shape)}; one value has no variance"
        )


def check(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch_statistics: bool,
    alone: bool = True,
) -> None:
    """Refuses what torch refuses, with the same kind of error.

    `alone` an empty batch has any dtype, as in torch; several processes exchange numbers of one.
    """
    if input.dtype not in _DTYPES:
        raise NotImplementedError(
            f"batch_norm: expected floating-point input of 16, 32 or 64 bits, got {input.dtype}"
        )
    shape = tuple(input.shape)
    if input.dim() < 2:
        raise RuntimeError(f"batch_norm: expected input of shape (N, C, ...), got {shape}")
    if not batch_statistics and (running_mean is None or running_var is None):
        raise RuntimeError(
            "batch_norm: expected running_mean and running_var in evaluation, got None; "
            "pass them, or training=True"
        )
    if (running_mean is None) != (running_var is None):
        raise ValueError(
            "batch_norm: expected running_mean and running_var, or neither, got only one of them"
        )
    channels = input.shape[1]
    first, dtype = "", None
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if tensor is None:
            continue
        if tensor.shape != (channels,):
            raise RuntimeError(
                f"batch_norm: expected {name} of shape ({channels},) for input of shape {shape}, "
                f"got {tuple(tensor.shape)}"
            )
        if dtype is None:
            first, dtype = name, tensor.dtype
        half = input.dtype.itemsize == 2
        fits = tensor.dtype == dtype and (dtype == input.dtype or half and dtype == torch.float32)
        if not fits and (input.numel() or not alone):
            beside = "" if tensor.dtype == dtype else f" beside {first} of {dtype}"
            raise RuntimeError(
                f"batch_norm: expected weight, bias and running statistics all of dtype "
                f"{input.dtype}, as input{', or all of float32' if half else ''}, "
                f"got {name} of {tensor.dtype}{beside}"
            )
        if tensor.device != input.device:
            raise RuntimeError(
                f"batch_norm: expected {name} on {input.device}, where input is, "
                f"got {tensor.device}"
            )
        if tensor.requires_grad and name.startswith("running") and torch.is_grad_enabled():
            raise RuntimeError(f"batch_norm: expected {name} that does not require grad")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (
        input.shape,
        input.dtype,
        input.device,
    ):
        raise RuntimeError(
            f"batch_norm: expected residual of input's shape {shape} and {input.dtype} on "
            f"{input.device}, got {tuple(residual.shape)}, {residual.dtype} on {residual.device}"
        )
