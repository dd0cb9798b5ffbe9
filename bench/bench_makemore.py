"""The training loop of the notebook's network: seconds a step, of every engine.

pytest-benchmark: python -m pytest bench/bench_makemore.py
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Contender, Phase, Unavailable, generator, require
from fused.makemore.engines import ENGINES, AutogradEngine, Engine, start, torch_loss
from fused.makemore.errors import InputError
from fused.makemore.model import EPS, Settings, initial_parameters
from fused.mlp_train import MLPParameters as Parameters

OPERATION = "makemore"
BYTES = {"step": "no bound by bytes: the parameters (49 KB) could stay on the chip"}
_LR = 0.1


def cases(suite: str) -> list[Case]:
    """Batch, context, vocabulary: the notebook's network, whose other sizes are the defaults."""
    return [Case(OPERATION, (32, 3, 27), torch.float32, headline=True)]


def kernel_cases() -> list[Case]:
    return []


def traffic_case(case: Case) -> Case:
    return case


def least_bytes(case: Case) -> dict[str, int]:
    return {}


def launch(case: Case, device: torch.device) -> None:
    raise NotImplementedError("no kernel of its own")


def contenders(case: Case, device: torch.device) -> dict[str, Callable[[], Contender]]:
    batch, context, vocabulary = case.shape
    settings = Settings(batch=batch, context=context)
    initial, _ = initial_parameters(settings, vocabulary, device)

    def minibatches(steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Examples, contexts and next characters, and the rows of them that are minibatches."""
        numbers, n = generator(device), steps * batch
        x = torch.randint(0, vocabulary, (n, context), device=device, generator=numbers)
        y = torch.randint(0, vocabulary, (n,), device=device, generator=numbers)
        return x, y, torch.arange(n, device=device).view(steps, batch)

    def trained(make: Callable[[Parameters], Engine], steps: int = 200) -> Contender:
        def outputs() -> dict[str, Tensor]:
            parameters = Parameters(*(p.clone() for p in initial))
            make(parameters).run(*minibatches(10), _LR)
            # b1 is cancelled by batch norm: its gradient is rounding.
            return {k: p for k, p in parameters._asdict().items() if k != "b1"}

        engine = make(Parameters(*(p.clone() for p in initial)))
        data = minibatches(steps)
        return Contender(outputs, {"step": Phase(lambda _: engine.run(*data, _LR), units=steps)})

    def torch_compiled() -> Contender:
        torch._dynamo.reset()
        mode = "reduce-overhead" if device.type == "cuda" else None
        loss = torch.compile(torch_loss, mode=mode, dynamic=False)
        return trained(lambda parameters: AutogradEngine(parameters, loss))

    def started(name: str, parameters: Parameters) -> Engine:
        try:
            return start(name, parameters, *minibatches(1)[:2], batch)
        except InputError as error:
            raise Unavailable(str(error)) from None

    def engine(name: str) -> Callable[[], Contender]:
        return lambda: trained(lambda parameters: started(name, parameters))

    builders = {"torch": engine("autograd")}
    builders |= {name: engine(name) for name in ENGINES if name != "autograd"}
    return builders | {"compile": torch_compiled, "jax": lambda: trained(_JaxEngine)}


class _JaxEngine:
    """lax.scan over the minibatches, compiled as a whole."""

    def __init__(self, parameters: Parameters) -> None:
        require("jax")
        import jax
        import jax.numpy as jnp

        def loss(p: Any, x: Any, y: Any) -> Any:
            hprebn = p.C[x].reshape(x.shape[0], -1) @ p.W1 + p.b1
            mean, var = hprebn.mean(0, keepdims=True), hprebn.var(0, keepdims=True, ddof=1)
            hpreact = p.bngain * (hprebn - mean) * jax.lax.rsqrt(var + EPS) + p.bnbias
            logits = jnp.tanh(hpreact) @ p.W2 + p.b2
            picked = jnp.take_along_axis(logits, y[:, None], 1)[:, 0]
            return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)

        def step(p: Any, batch: Any) -> Any:
            value, gradients = jax.value_and_grad(loss)(p, *batch)
            return jax.tree.map(lambda a, g: a - _LR * g, p, gradients), value

        self._run = jax.jit(lambda p, X, Y: jax.lax.scan(step, p, (X, Y)))
        self._parameters = parameters

    def run(self, x: Tensor, y: Tensor, index: Tensor, lr: float) -> Tensor:
        import jax

        take = jax.dlpack.from_dlpack
        p = Parameters(*(take(t.detach()) for t in self._parameters))
        p, losses = self._run(p, take(x[index].int()), take(y[index].int()))
        for mine, new in zip(self._parameters, p, strict=True):
            mine.copy_(torch.from_dlpack(new))
        return torch.from_dlpack(losses)


def test_makemore(benchmark: Any, phase: Phase) -> None:
    benchmark.pedantic(phase.run, setup=lambda: ((phase.prepare(),), {}), rounds=5)
