"""Training the embedding MLP: many steps of many models in one call.

The network is that of Andrej Karpathy's makemore notebooks: characters in, an embedding each, a
linear layer, batch norm with Bessel's correction, tanh, a linear layer, cross-entropy. A step is
forward, backward in closed form (docs/derivations.md), parameter -= lr * gradient.
"""

import importlib
import importlib.util
import math
import numbers
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused import backend

# Where the loop runs, fastest first. The Triton kernels train all models in the same launches; on
# the CPU they run one after the other, or on threads.
_MODULES = {
    "persistent": "fused.kernels.mlp_train",
    "graph": "fused.kernels.mlp_step",
    "numba": "fused.compiled.mlp_train",
    "eager": "fused.eager.mlp_train",
}


class MLPParameters(NamedTuple):
    """The weights of one network, or of M networks if every tensor has M in front of its shape."""

    C: Tensor  # (V, E) embedding of each character
    W1: Tensor  # (T*E, H)
    b1: Tensor  # (H,), cancelled by the batch norm behind it
    W2: Tensor  # (H, V)
    b2: Tensor  # (V,)
    bngain: Tensor  # (1, H)
    bnbias: Tensor  # (1, H)


def train_mlp(
    parameters: MLPParameters,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    lr: float | Tensor,
    *,
    eps: float = 1e-5,
    method: str = "auto",
    inplace: bool = False,
) -> tuple[MLPParameters, Tensor]:
    """Takes K steps of gradient descent with each of M networks.

    Of a minibatch of B contexts x, (B, T), and next characters y, (B,):

        hprebn = C[x].flatten(1) @ W1 + b1
        h      = tanh(bngain * (hprebn - mean) / sqrt(var + eps) + bnbias)     of the minibatch,
        loss   = cross_entropy(h @ W2 + b2, y)                          var with Bessel's correction

    Args:
        parameters: where to start; seven tensors, in float32 (float64 with method "eager"), of the
            shapes that `MLPParameters` says for one network, or with M in front of each.
        x: contexts of all examples, (N, T), whole numbers in [0, V).
        y: next characters, (N,), whole numbers in [0, V).
        index: the minibatches as rows of x and y, (K, B), for all networks; or (S, K, B) with M a
            multiple of S: network m then takes index[m % S].
        lr: the learning rate, or a tensor (M,) of one for each network.
        eps: what batch norm adds to the variance, above 0.
        method: "persistent", one launch of a Triton kernel in which every network is one program
            (fused/kernels/mlp_train.py), on tensor cores of compute capability 8.0 or later, or of
            AMD's MI100 or later; a driver that ends a launch after some seconds, as where a display
            is attached, wants shorter calls; "graph", four Triton kernels a step in a CUDA graph,
            for networks of any size (fused/kernels/mlp_step.py): every call from 64 steps on
            captures its graph anew, which takes the CPU as long as 64 steps launched one by one,
            so a call should take thousands; "numba", a compiled loop on the CPU, for the optional
            extra `numba`; "eager", PyTorch's operations. "auto" takes the fastest of them that can
            serve these tensors (`train_mlp_method`).
        inplace: write the new parameters into `parameters` instead of new tensors. A graph that
            saved one of them raises when it is differentiated, as with any write in place.

    Returns:
        The parameters after the last step, and the losses (K,) or (M, K), each from before its
        update. They depend neither on how many networks are trained together nor on how steps are
        divided into calls, to the last bit. b1 stays as it is: its gradient is 0. No new tensor has
        a graph or requires grad, whatever `parameters` do.

    Raises:
        TypeError: parameters that are not of one floating dtype; x, y or index that are not whole
            numbers; an lr that is not real.
        ValueError: shapes or devices that do not fit, an eps that is not positive and finite, a
            number lr beyond the parameters' dtype, an unknown method, or one that cannot serve
            parameters of this size, dtype or device.
        RuntimeError: "persistent" or "graph" where there is no Triton for the parameters' device.
        IndexError: on the CPU, a character or row out of range (RuntimeError where torch raises
            that). On a GPU nothing looks at values; "persistent" makes the loss of a target out of
            range NaN.
    """
    parameters = MLPParameters(*parameters)
    if not 0 < eps <= torch.finfo(torch.float32).max:
        raise ValueError(f"train_mlp: expected a positive, finite eps, got {eps}")
    one = parameters.C.dim() == 2
    models = _models(parameters, one)
    lr = _checked(models, x, y, index, lr)
    name = train_mlp_method(parameters, x, index.shape[-1]) if method == "auto" else method
    implementation = _implementation(name, models.C)
    if not inplace:
        copies = (p.detach().clone(memory_format=torch.contiguous_format) for p in models)
        models = MLPParameters(*copies)
    elif not all(p.is_contiguous() for p in models):
        raise ValueError("train_mlp: parameters to be updated in place must be contiguous")
    C, W1, _, W2, b2, bngain, bnbias = (p.detach() for p in models)
    # A compiled loop's write is not seen by autograd; nor is one that an error cuts short.
    increment_version((C, W1, W2, b2, bngain, bnbias))
    # What is gathered lies as they do; numba would compile for other strides anew.
    x, y, index = (t.long().contiguous() for t in (x, y, index))
    losses = implementation.mlp_train(
        C, W1, W2, b2, bngain.squeeze(1), bnbias.squeeze(1), x, y,
        index if index.dim() == 3 else index.unsqueeze(0), lr, eps,
    )  # fmt: skip
    if inplace:
        return parameters, losses[0] if one else losses
    if one:
        return MLPParameters(*(p.squeeze(0) for p in models)), losses[0]
    return models, losses


def train_mlp_method(parameters: MLPParameters, x: Tensor, batch: int) -> str:
    """What "auto" is for these parameters, contexts x (N, T) and minibatches of `batch`.

    Where the Triton kernels serve (`fused.backend`): "persistent" if one multiprocessor can hold
    the network, else "graph". Elsewhere "numba" if it is installed and the tensors are float32 on
    the CPU, else "eager".
    """
    C, W1 = parameters[0], parameters[1]
    if C.dtype == torch.float32 and backend.name_for(C) == "triton":
        try:
            _implementation("persistent", C).plan(C, W1, x.shape[1], batch)
            return "persistent"
        except ValueError:
            return "graph"
    if C.dtype == torch.float32 and C.device.type == "cpu" and _numba_installed():
        return "numba"
    return "eager"


def _models(parameters: MLPParameters, one: bool) -> MLPParameters:
    """The parameters with the models in front; checked against each other."""
    C = parameters.C
    models = MLPParameters(*(p.unsqueeze(0) if one else p for p in parameters))
    if models.C.dim() != 3 or models.W1.dim() != 3:
        raise ValueError(
            "train_mlp: expected C of shape (V, E) and W1 of shape (T*E, H), or both with the "
            f"models in front, got {tuple(parameters.C.shape)} and {tuple(parameters.W1.shape)}"
        )
    (M, V, E), (_, TE, H) = models.C.shape, models.W1.shape
    if M == 0:
        raise ValueError("train_mlp: expected parameters of one network or more, got 0")
    shapes: tuple[tuple[int, ...], ...] = (V, E), (TE, H), (H,), (H, V), (V,), (1, H), (1, H)
    for name, tensor, shape in zip(MLPParameters._fields, models, shapes, strict=True):
        if tensor.shape != (M, *shape):
            expected = shape if one else (M, *shape)
            got = tuple(tensor.shape[1:] if one else tensor.shape)
            raise ValueError(f"train_mlp: expected {name} of shape {expected}, got {got}")
        if tensor.dtype != C.dtype or not tensor.is_floating_point():
            raise TypeError(
                f"train_mlp: expected parameters of one floating dtype, got C in {C.dtype} and "
                f"{name} in {tensor.dtype}"
            )
        if tensor.device != C.device:
            raise ValueError(f"train_mlp: expected {name} on {C.device}, as C, got {tensor.device}")
    return models


def _checked(
    models: MLPParameters, x: Tensor, y: Tensor, index: Tensor, lr: float | Tensor
) -> Tensor:
    """Checks the data; returns the learning rates (M,)."""
    (M, _, E), TE = models.C.shape, models.W1.shape[1]
    if x.dim() != 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f"train_mlp: expected x of shape (N, T) and y of shape (N,), got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    if x.shape[1] * E != TE:
        raise ValueError(
            f"train_mlp: {x.shape[1]} characters of context with {E} numbers each need W1 with "
            f"{x.shape[1] * E} rows, got {TE}"
        )
    if index.dim() not in (2, 3) or (index.dim() == 3 and (len(index) == 0 or M % len(index))):
        raise ValueError(
            f"train_mlp: expected index of shape (K, B), or (S, K, B) with {M} models a multiple "
            f"of S, got {tuple(index.shape)}"
        )
    if index.shape[-1] < 2:
        raise ValueError(
            "train_mlp: a minibatch needs at least 2 examples to have a variance, got "
            f"{index.shape[-1]}"
        )
    for name, tensor in (("x", x), ("y", y), ("index", index)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"train_mlp: expected {name} of whole numbers, got {tensor.dtype}")
        if tensor.device != models.C.device:
            raise ValueError(
                f"train_mlp: expected {name} on {models.C.device}, as the parameters, got "
                f"{tensor.device}"
            )
    if not isinstance(lr, Tensor):
        if not isinstance(lr, numbers.Real):
            raise TypeError(f"train_mlp: expected lr to be a number or a tensor, got {lr!r}")
        if torch.finfo(models.C.dtype).max < abs(lr) < math.inf:
            raise ValueError(f"train_mlp: expected lr to be a number of {models.C.dtype}, got {lr}")
        return torch.full((M,), lr, dtype=models.C.dtype, device=models.C.device)
    if lr.is_complex():
        raise TypeError(f"train_mlp: expected a real lr, got {lr.dtype}")
    if lr.shape not in ((), (M,)):
        raise ValueError(f"train_mlp: expected lr of shape ({M},), got {tuple(lr.shape)}")
    return lr.detach().to(models.C.device, models.C.dtype).expand(M).contiguous()


def _implementation(method: str, C: Tensor) -> ModuleType:
    """The module of a method; an error where it cannot serve parameters like C."""
    if method not in _MODULES:
        raise ValueError(
            f"train_mlp: expected method to be one of auto, {', '.join(_MODULES)}, got {method!r}"
        )
    if method != "eager" and C.dtype != torch.float32:
        raise ValueError(f"train_mlp: method {method!r} takes float32, got {C.dtype}; use 'eager'")
    if method in ("persistent", "graph"):
        backend.resolved("triton", C)  # raises where Triton cannot serve C
    if method == "numba" and C.device.type != "cpu":
        raise ValueError(f"train_mlp: method 'numba' needs tensors on the CPU, got {C.device}")
    if method == "numba" and not _numba_installed():
        raise ValueError("train_mlp: method 'numba' needs numba: python -m pip install numba")
    return importlib.import_module(_MODULES[method])


def _numba_installed() -> bool:
    return importlib.util.find_spec("numba") is not None
