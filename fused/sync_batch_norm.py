"""Batch normalisation with the statistics of all processes: one collective each way."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused import backend
from fused.batch_norm import _BatchNorm, check, check_options, run, will_differentiate
from fused.eager.batch_norm import update_running
from fused.transforms import as_leaf, is_symbolic


class SyncBatchNormFunction(torch.autograd.Function):
    """`BatchNormFunction` over the rows of every process: sums are sums over all of them."""

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
        options: Any,
        group: Any,
        keep: bool,
    ) -> Tensor:
        kernels, o = backend.implementation("batch_norm", input), options
        mean, m2 = kernels.batch_norm_moments(input)
        mean, m2, count = _merged(mean, m2, input.numel() // input.shape[1], group)
        update_running(
            running_mean, running_var, tracked, o.momentum, mean, m2 / (count - 1), o.skip_nonfinite
        )
        var = m2 / (count - o.correction)
        y, mean, rstd, kept = kernels.batch_norm_eval(
            input, weight, bias, residual, mean, var, o.eps, o.activation, keep
        )
        ctx.save_for_backward(input, weight, bias, kept, mean, rstd, count)
        ctx.kernels, ctx.options, ctx.group = kernels, options, group
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "SyncBatchNorm: expected create_graph=False: its gradient cannot be differentiated "
                "again, which would take another collective"
            )
        *tensors, count = ctx.saved_tensors
        _, weight, bias, *_ = tensors
        wants, o = ctx.needs_input_grad, ctx.options
        own, dresidual = ctx.kernels.batch_norm_sums(dy, *tensors, o.activation, wants[3])
        total = own.clone()
        dist.all_reduce(total, group=ctx.group)
        activation = o.activation
        if dresidual is not None:  # it is dz
            dy, activation = dresidual, None
        dx = ctx.kernels.batch_norm_dx(dy, *tensors, total, count, o.correction, activation)
        # Parameters get the gradient of this process's rows: whoever averages gradients over the
        # processes, as DistributedDataParallel does, averages these as well.
        dweight = own[0].to(weight.dtype) if wants[1] else None
        dbias = own[1].to(bias.dtype) if wants[2] else None
        return (dx, dweight, dbias, dresidual, *(None,) * 6)


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm`, computed by the operations of `fused.batch_norm`, on CPUs too.

    In training with torch.distributed running, the statistics are those of all processes of
    `process_group` (default: all), whose batches may differ in size, even be empty. One all-gather
    forward (count, mean and sum of squared deviations, merged in the order of the ranks) and one
    all-reduce backward. Otherwise it is `BatchNorm`. Takes what torch's takes, and `correction`,
    `activation` and `skip_nonfinite` of `fused.batch_norm`; the backward is differentiable once.
    It is no subclass of torch's, which DistributedDataParallel refuses on a CPU.
    """

    process_group: Any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **keywords
        )
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"SyncBatchNorm: expected input of shape (N, C, ...), got {tuple(input.shape)}"
            )

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_symbolic(input):
            return as_leaf(self, input, residual)
        self._check_input_dim(input)
        synchronised = (
            self.training
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) > 1
        )
        return self._normalize(self._run if synchronised else run, input, residual)

    def _run(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        tracked: Tensor | None,
        options: Any,
    ) -> Tensor:
        check_options(options.correction, options.activation, options.eps)
        # One row here is no mistake: there are more elsewhere.
        check(input, weight, bias, residual, running_mean, running_var, True)
        return SyncBatchNormFunction.apply(
            input, weight, bias, residual, running_mean, running_var, tracked, options,
            self.process_group, will_differentiate(input, weight, bias, residual),
        )  # fmt: skip

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Makes a SyncBatchNorm of every batch norm in `module`, torch's or ours; returns `module`.

        Used as torch's. The modules stay the same objects: parameters, buffers, hooks, the training
        flag and the options of ours are kept.
        """
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, cls):
                child.__class__ = cls
                child.process_group = process_group
        return module


def _merged(mean: Tensor, m2: Tensor, rows: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, m2, count) of all processes' rows, from this one's; the same bits in each."""
    own = torch.cat((mean, m2.to(mean.dtype), torch.full_like(mean[:1], rows)))
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    channels = mean.numel()
    means, m2s, counts = torch.stack(everyone).split((channels, channels, 1), dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    return mean, m2s.sum(0) + (counts * (means - mean).square()).sum(0), count
