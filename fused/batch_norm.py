"""Batch normalisation: the checked function, its backward pass and its module."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from fused import backend


class BatchNormFunction(torch.autograd.Function):
    """dx = gamma*rstd/n * (n*dy - sum(dy) - n/(n-correction) * xhat * sum(dy*xhat))

    and, with frozen statistics, dx = gamma*rstd*dy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        batch_statistics: bool,
        momentum: float,
        eps: float,
        correction: int,
    ) -> torch.Tensor:
        kernels = backend.implementation("batch_norm", input)
        if batch_statistics:
            y, mean, rstd = kernels.batch_norm_fwd(
                input, weight, bias, running_mean, running_var, momentum, eps, correction
            )
            updated = [t for t in (running_mean, running_var) if t is not None]
            increment_version(updated)  # a kernel's write is not seen by autograd
        else:
            y, mean, rstd = kernels.batch_norm_eval(
                input, weight, bias, running_mean, running_var, eps
            )
        ctx.save_for_backward(input, weight, mean, rstd)
        ctx.kernels, ctx.correction, ctx.batch_statistics = kernels, correction, batch_statistics
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, mean, rstd = ctx.saved_tensors
        dx, dgamma, dbeta = ctx.kernels.batch_norm_bwd(
            dy, input, weight, mean, rstd, ctx.correction, ctx.batch_statistics
        )
        dweight = None if weight is None else dgamma.to(weight.dtype)
        dbias = None if ctx.bias_dtype is None else dbeta.to(ctx.bias_dtype)
        return dx, None, None, dweight, dbias, None, None, None, None


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    correction: int = 0,
) -> torch.Tensor:
    """Batch normalisation, as torch's `F.batch_norm`, with Bessel's correction where wanted.

    Training normalises with the statistics of the batch and updates the running ones in place;
    evaluation normalises with the running ones. Each has its own backward in closed form; for the
    batch of n rows, with c = correction and xhat the normalised input,

        dinput = weight*rstd/n * (n*dy - sum(dy) - n/(n-c) * xhat * sum(dy*xhat)).

    Args:
        input: shape (N, C), float16, bfloat16, float32 or float64, any strides.
        running_mean, running_var: shape (C,), or None in training.
        weight, bias: shape (C,), or None for 1 and 0.
        training: whether to normalise with the statistics of the batch.
        momentum: running = (1 - momentum) * running + momentum * batch.
        eps: added to the variance before its square root.
        correction: what the batch's variance divides by: n - correction. 0 is the biased variance,
            which torch normalises with; 1 is Bessel's correction. running_var keeps the unbiased
            variance either way, as torch does.

    Returns:
        Shape (N, C) in input's dtype. Statistics are computed in float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit, one row in training (it has no variance), a correction
            other than 0 and 1, or evaluation without running statistics.
        TypeError: an input that is not floating point.

    Source: Ioffe and Szegedy, "Batch Normalization" (2015); the backward pass is derived in
    docs/derivations.md.
    """
    _check(input, running_mean, running_var, weight, bias, training, correction)
    return BatchNormFunction.apply(
        input, running_mean, running_var, weight, bias, training, momentum, eps, correction
    )


class BatchNorm1d(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on (N, C), computed by `fused.batch_norm`.

    Parameters, buffers and `state_dict` are those of torch's. `correction` is `fused.batch_norm`'s.
    """

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
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        _check_correction(correction)
        self.correction = correction

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
        if self.training and not self.track_running_stats:
            mean = var = count = None
        batch_statistics = self.training or mean is None
        if self.training and count is not None:
            count.add_(1)
        if not self.training or mean is None or var is None or self.momentum is not None:
            return self._normalize(input, mean, var, batch_statistics, self.momentum or 0.0)
        # Cumulative average: momentum is 1 / num_batches_tracked, which stays on the device.
        assert count is not None
        batch_mean, batch_var = torch.zeros_like(mean), torch.zeros_like(var)
        y = self._normalize(input, batch_mean, batch_var, True, 1.0)
        share = count.to(mean.dtype).reciprocal()
        mean.lerp_(batch_mean, share)
        var.lerp_(batch_var, share)
        return y

    def _normalize(
        self,
        input: torch.Tensor,
        mean: torch.Tensor | None,
        var: torch.Tensor | None,
        batch_statistics: bool,
        momentum: float,
    ) -> torch.Tensor:
        return batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            batch_statistics,
            momentum,
            self.eps,
            correction=self.correction,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, correction={self.correction}"


def _check_correction(correction: int) -> None:
    if correction not in (0, 1):
        raise ValueError(
            "batch_norm: expected correction 0 (biased variance) or 1 (Bessel's), "
            f"got {correction!r}"
        )


def _check(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    correction: int,
) -> None:
    _check_correction(correction)
    if input.dim() != 2:
        raise ValueError(f"batch_norm: expected input of shape (N, C), got {tuple(input.shape)}")
    if not input.is_floating_point():
        raise TypeError(f"batch_norm: expected floating-point input, got {input.dtype}")
    n, channels = input.shape
    if training and n == 1:
        raise ValueError(
            "batch_norm: expected more than 1 row per channel in training, got input of shape "
            f"{tuple(input.shape)}; one row has no variance"
        )
    if not training and (running_mean is None or running_var is None):
        raise ValueError(
            "batch_norm: expected running_mean and running_var in evaluation, got None; "
            "pass them, or training=True"
        )
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if tensor is not None and tensor.shape != (channels,):
            raise ValueError(
                f"batch_norm: expected {name} of shape ({channels},) for input of shape "
                f"{tuple(input.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"batch_norm: expected {name} on {input.device}, where input is, "
                f"got {tensor.device}"
            )
