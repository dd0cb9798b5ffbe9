"""The check: hand-derived gradients against autograd's, on one minibatch."""

import torch
from torch import Tensor

import fused
from fused import compare
from fused.makemore.data import Dataset
from fused.makemore.model import Settings, initial_parameters
from fused.reference import mlp
from fused.reference.mlp import EPS, Parameters


def run(dataset: Dataset, settings: Settings, device: torch.device) -> int:
    """Prints the tables; returns 1 if a gradient is not approximately equal, else 0."""
    parameters, generator = initial_parameters(settings, len(dataset.vocabulary), device)
    index = torch.randint(0, len(dataset.train), (settings.batch,), generator=generator).to(device)
    Xb, Yb = dataset.train.x[index], dataset.train.y[index]
    leaves = Parameters(*(p.requires_grad_() for p in parameters))

    loss, tensors = mlp.forward(leaves, Xb, Yb)
    for tensor in tensors.values():
        tensor.retain_grad()
    loss.backward()
    autograd = {name: _gradient(tensor) for name, tensor in tensors.items()}
    table = compare.compare(mlp.backward(tensors, Xb, Yb), autograd)
    print(f"loss {loss.item():.4f}; by hand against autograd, {device.type}, float32:\n\n{table}\n")
    print(f"{table.exact} of {len(table)} exact, {table.approximate} approximately equal\n")

    closed = compare.compare(
        _closed_forms(tensors, autograd["hpreact"], Yb),
        {"logits": autograd["logits"], "hprebn": autograd["hprebn"]},
    )
    print(f"the closed forms, fused.cross_entropy and fused.batch_norm:\n\n{closed}\n")

    slopes = _slopes()
    print(f"the local gradients against the slope (f(x + h) - f(x)) / h, float64:\n\n{slopes}")
    everything = (table, closed, slopes)
    return 0 if all(t.approximate == len(t) for t in everything) else 1


def _closed_forms(tensors: dict[str, Tensor], dhpreact: Tensor, Yb: Tensor) -> dict[str, Tensor]:
    """dlogits and dhprebn, each from its fused operation alone."""
    logits = tensors["logits"].detach().requires_grad_()
    fused.cross_entropy(logits, Yb).backward()
    hprebn = tensors["hprebn"].detach().requires_grad_()
    gain, bias = (tensors[name].detach().flatten() for name in ("bngain", "bnbias"))
    hpreact = fused.batch_norm(hprebn, None, None, gain, bias, True, eps=EPS, correction=1)
    hpreact.backward(dhpreact)
    return {"logits": _gradient(logits), "hprebn": _gradient(hprebn)}


def _slopes() -> compare.Table:
    x = torch.linspace(0.25, 2.0, 8, dtype=torch.float64)
    return compare.compare(
        {name: df(x) for name, (_, df) in mlp.LOCAL_GRADIENTS.items()},
        {name: compare.finite_difference(f, x) for name, (f, _) in mlp.LOCAL_GRADIENTS.items()},
        rtol=1e-4,  # a slope is off by h/2 * f''/f', below 1e-5 here
    )


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
