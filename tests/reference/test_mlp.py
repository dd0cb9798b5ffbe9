"""The 26 gradients by hand against autograd: bit for bit in float32, to 1e-15 in float64."""

import platform

import pytest
import torch

from fused.compare import compare
from fused.makemore.model import Settings, initial_parameters
from fused.reference import mlp
from fused.reference.mlp import Parameters


def gradients(dtype: torch.dtype, hidden: int = 64, vocabulary: int = 27, n: int = 32):
    """(by hand, by autograd) at the notebook's shape."""
    settings = Settings(hidden=hidden)
    parameters, generator = initial_parameters(settings, vocabulary, torch.device("cpu"))
    Xb = torch.randint(0, vocabulary, (n, settings.context), generator=generator)
    Yb = torch.randint(0, vocabulary, (n,), generator=generator)
    loss, tensors = mlp.forward(
        Parameters(*(p.to(dtype).requires_grad_() for p in parameters)), Xb, Yb
    )
    for tensor in tensors.values():
        tensor.retain_grad()
    loss.backward()
    return mlp.backward(tensors, Xb, Yb), {name: t.grad for name, t in tensors.items()}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="rounding of this CPU")
@pytest.mark.parametrize("hidden, n", [(64, 32), (200, 32), (64, 48)])
def test_float32_is_bit_exact(hidden, n) -> None:
    table = compare(*gradients(torch.float32, hidden=hidden, n=n))
    assert len(table) == 26
    assert [row.name for row in table if not row.exact] == []


def test_float64_within_1e_15() -> None:
    table = compare(*gradients(torch.float64))
    assert max(row.maxdiff for row in table) <= 1e-15


def test_backward_builds_no_graph() -> None:
    by_hand, _ = gradients(torch.float32)
    assert not any(g.requires_grad for g in by_hand.values())


def test_names_and_order_are_the_notebooks() -> None:
    by_hand, _ = gradients(torch.float32)
    assert list(by_hand) == mlp.TENSORS
    assert mlp.TENSORS[0] == "logprobs" and mlp.TENSORS[-1] == "C"


@pytest.mark.parametrize("name", mlp.LOCAL_GRADIENTS)
def test_local_gradients(name) -> None:
    f, df = mlp.LOCAL_GRADIENTS[name]
    x = torch.linspace(0.25, 2.0, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(f(x).sum(), x)
    torch.testing.assert_close(df(x), expected)
