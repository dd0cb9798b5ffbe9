"""Batch normalisation with the statistics of all processes: one collective each way."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused import backend
from fused.batch_norm import _BatchNorm, check, check_options, run, will_differentiate
from fused.operators import sync_batch_norm as operators
from fused.operators.batch_norm import of_dtype_alone
from fused.transforms import (
    as_leaf,
    is_composed,
    is_recorded,
    is_symbolic,
    outlives_the_call,
    refuse_transforms,
)


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
        y, mean, rstd, kept, count = operators.forward(
            kernels, input, weight, bias, residual, running_mean, running_var, tracked, group,
            keep, *o[1:],
        )  # fmt: skip
        if o.activation is None:
            bias = of_dtype_alone(bias)
        ctx.save_for_backward(input, weight, bias, kept, mean, rstd, count)
        ctx.kernels, ctx.options, ctx.group = kernels, options, group
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if is_composed(dy):
            raise RuntimeError(
                "SyncBatchNorm: expected create_graph=False and is_grads_batched=False: its "
                "gradient is computed once, and differentiating it would take another collective"
            )
        tensors, wants, o = ctx.saved_tensors, ctx.needs_input_grad, ctx.options
        _, weight, bias, *_ = tensors
        dx, own, dresidual = operators.backward(
            ctx.kernels, ctx.group, o.correction, o.activation, wants[3], dy, *tensors
        )
        # Parameters get the gradient of this process's rows: whoever averages gradients over the
        # processes, as DistributedDataParallel does, averages these as well.
        dweight = own[0].to(weight.dtype) if wants[1] else None
        dbias = own[1].clone().to(bias.dtype) if wants[2] else None  # not in dweight's memory
        return (dx, dweight, dbias, dresidual, *(None,) * 6)


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm`, computed by the operations of `fused.batch_norm`, on CPUs too.

    In training with torch.distributed running, the statistics are those of all processes of
    `process_group` (default: all), whose batches may differ in size, even be empty where another is
    not. One all-gather forward (count, mean and sum of squared deviations, merged in the order of
    the ranks) and one all-reduce backward, even where this process's input wants no gradient, as
    another's may. Otherwise it computes what `BatchNorm1d`, `2d` and `3d` do, for input of any of
    their shapes, (N, C) or (N, C, ...). Takes what torch's takes, and `correction`, `activation`
    and `skip_nonfinite` of `fused.batch_norm`. Among several processes it is differentiable once,
    and not by torch.func; `torch.compile(fullgraph=True)` gives the bits of eager mode. It is no
    subclass of torch's, which DistributedDataParallel refuses on a CPU.
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
        tensors = (input, weight, bias, residual)
        refuse_transforms("SyncBatchNorm", "fused.BatchNorm1d, 2d or 3d", *tensors)
        # One row here is no mistake: there are more elsewhere.
        check(input, weight, bias, residual, running_mean, running_var, True, alone=False)
        buffers, keep = (running_mean, running_var, tracked), will_differentiate(*tensors)
        if is_recorded():
            keep = keep or outlives_the_call()
            return operators.call(*tensors, *buffers, self.process_group, keep, *options[1:])
        return SyncBatchNormFunction.apply(*tensors, *buffers, options, self.process_group, keep)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Makes a SyncBatchNorm of every batch norm in `module`, torch's or ours; returns `module`.

        Used as torch's. The modules stay the same objects: parameters, buffers, hooks, the training
        flag and the options of ours are kept. Raises RuntimeError for a LazyBatchNorm that has not
        seen its first input.
        """
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for child in norms:
            if isinstance(child, nn.modules.lazy.LazyModuleMixin):
                raise RuntimeError(
                    f"SyncBatchNorm: expected modules that know their channels, got a "
                    f"{type(child).__name__}; call the model once, then convert it"
                )
        for child in norms:
            child.__class__ = cls
            child.process_group = process_group
        return module
