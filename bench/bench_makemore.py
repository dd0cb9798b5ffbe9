"""The training loop of the notebook's network: steps a second of every engine, and of many models.

pytest-benchmark: python -m pytest bench/bench_makemore.py
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fused
from bench.cases import Case, Contender, Phase, Unavailable, generator, require
from fused.makemore.engines import ENGINES, METHODS, AutogradEngine, Engine, torch_loss
from fused.makemore.model import EPS, Settings, initial_parameters
from fused.makemore.processes import Processes
from fused.mlp_train import MLPParameters

OPERATION = "makemore"
BYTES = {"step": "no bound by bytes: the parameters (49 KB) could stay on the chip"}
_LR = 0.1
_EXAMPLES = 1000


def cases(suite: str) -> list[Case]:
    """Batch, context, vocabulary of the notebook's network, whose other sizes are the defaults; and
    many models at once, a step of one model being the unit."""
    shape = (32, 3, 27)
    return [
        Case(OPERATION, shape, torch.float32, headline=True),
        Case(OPERATION, shape, torch.float32, "64models" if suite == "quick" else "128models"),
    ]


def kernel_cases() -> list[Case]:
    return [Case(OPERATION, (32, 3, 27), torch.float32)]


def traffic_case(case: Case) -> Case:
    return case


def least_bytes(case: Case) -> dict[str, int]:
    return {}


def launch(case: Case, device: torch.device) -> None:
    parameters, x, y, index = _problem(case, device, steps=1)
    for method in ("persistent", "graph"):
        fused.train_mlp(parameters, x, y, index, _LR, eps=EPS, method=method)


def contenders(case: Case, device: torch.device) -> dict[str, Callable[[], Contender]]:
    if case.variant:
        return _many_models(case, device)

    def engine(name: str) -> Callable[[], Contender]:
        # What a call sets up or captures, training does once in the steps of 0.2 seconds.
        steps = 200 if name not in METHODS else 6400 if device.type == "cuda" else 2000
        return lambda: _trained(case, device, ENGINES[name], steps)

    builders = {"torch": engine("autograd")}
    builders |= {name: engine(name) for name in ENGINES if name != "autograd"}
    return builders | {
        "compile": lambda: _trained(case, device, _compiled(device), 200),
        "jax": lambda: _trained(case, device, _JaxEngine, 2000),
    }


def _trained(
    case: Case, device: torch.device, make: Callable[[MLPParameters], Engine], steps: int
) -> Contender:
    """One model that an engine trains, `steps` steps a call."""

    def outputs() -> dict[str, Tensor]:
        parameters, x, y, index = _problem(case, device, steps=10)
        make(parameters).run(x, y, index, _LR)
        return _compared(parameters)

    parameters, x, y, index = _problem(case, device, steps)
    engine = make(parameters)
    return Contender(outputs, {"step": Phase(lambda _: engine.run(x, y, index, _LR), units=steps)})


def _compiled(device: torch.device) -> Callable[[MLPParameters], Engine]:
    """The notebook's loop with `torch.compile` of its loss"""
    mode = "reduce-overhead" if device.type == "cuda" else None
    loss = torch.compile(torch_loss, mode=mode, dynamic=False)
    return lambda parameters: AutogradEngine(parameters, loss)


def _many_models(case: Case, device: torch.device) -> dict[str, Callable[[], Contender]]:
    """Every method of `fused.train_mlp` with many models, the processes of a sweep, and
    `jax.vmap` of JAX's loop, against one model in torch at a time."""
    models = int(case.variant.removesuffix("models"))

    def jax_together() -> Contender:
        def started(steps: int) -> tuple[MLPParameters, Callable[[], Tensor]]:
            parameters, x, y, index = _problem(case, device, steps)
            stacked = MLPParameters(*(torch.stack([p] * models) for p in parameters))
            engine = _JaxEngine(stacked)
            return stacked, lambda: engine.run(x, y, index, _LR)

        def outputs() -> dict[str, Tensor]:
            stacked, run = started(10)
            run()
            return _compared(MLPParameters(*(p[-1] for p in stacked)))

        steps = 1000 if device.type == "cuda" else 50
        _, run = started(steps)
        return Contender(outputs, {"step": Phase(lambda _: run(), units=steps * models)})

    def together(method: str) -> Contender:
        def started(steps: int) -> Callable[[], MLPParameters]:
            parameters, x, y, index = _problem(case, device, steps)
            stacked = MLPParameters(*(torch.stack([p] * models) for p in parameters))

            def run() -> MLPParameters:
                done, _ = fused.train_mlp(stacked, x, y, index, _LR, eps=EPS, method=method)
                return done

            return run

        def outputs() -> dict[str, Tensor]:
            return _compared(MLPParameters(*(p[-1] for p in started(10)())))

        # In these all models are in the same launches; "eager" takes one model after the other.
        steps = 6400 if device.type == "cuda" and method in ("persistent", "graph") else 50
        run = started(steps)
        return Contender(outputs, {"step": Phase(lambda _: run(), units=steps * models)})

    def divided() -> Contender:
        count = torch.get_num_threads()
        if device.type != "cpu" or count == 1:
            raise Unavailable("needs several threads of a CPU, to make a process of each")
        start, x, y, index = _problem(case, device, steps=50)
        stacked = MLPParameters(*(torch.stack([p] * models) for p in start))
        processes = Processes("eager", stacked, x, y, count)  # they end with this one
        lr = torch.full((models,), _LR)

        def run(steps: int) -> MLPParameters:
            for mine, p in zip(stacked, start, strict=True):
                mine.copy_(p)
            processes.train(index[None, :steps], lr)
            return MLPParameters(*(p[-1] for p in stacked))

        return Contender(
            lambda: _compared(run(10)), {"step": Phase(lambda _: run(50), units=50 * models)}
        )

    def builder(method: str) -> Callable[[], Contender]:
        return lambda: together(method)

    builders = {"torch": lambda: _trained(case, device, ENGINES["autograd"], 100)}
    builders |= {name: builder(method) for name, method in METHODS.items()}
    return builders | {
        "manual divided": divided,
        "compile": lambda: _trained(case, device, _compiled(device), 100),
        "jax": jax_together,
    }


def _problem(
    case: Case, device: torch.device, steps: int
) -> tuple[MLPParameters, Tensor, Tensor, Tensor]:
    """Parameters of the notebook's start, and random contexts, targets and minibatches."""
    batch, context, vocabulary = case.shape
    parameters, _ = initial_parameters(Settings(batch=batch, context=context), vocabulary, device)
    if device.type == "meta":
        x = torch.zeros(_EXAMPLES, context, dtype=torch.int64, device=device)
        index = torch.zeros(steps, batch, dtype=torch.int64, device=device)
        return parameters, x, x[:, 0], index
    numbers = generator(device)

    def draw(end: int, *shape: int) -> Tensor:
        return torch.randint(0, end, shape, device=device, generator=numbers)

    x, y = draw(vocabulary, _EXAMPLES, context), draw(vocabulary, _EXAMPLES)
    return parameters, x, y, draw(_EXAMPLES, steps, batch)


def _compared(parameters: MLPParameters) -> dict[str, Tensor]:
    """All but b1, which batch norm cancels: its gradient is rounding."""
    return {name: p for name, p in parameters._asdict().items() if name != "b1"}


class _JaxEngine:
    """lax.scan over the minibatches, compiled as a whole; of many models under `jax.vmap`."""

    def __init__(self, parameters: MLPParameters) -> None:
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

        def run(p: Any, x: Any, y: Any) -> Any:
            return jax.lax.scan(step, p, (x, y))

        many = parameters.C.dim() == 3
        self._run = jax.jit(jax.vmap(run, in_axes=(0, None, None)) if many else run)
        self._parameters = parameters

    def run(self, x: Tensor, y: Tensor, index: Tensor, lr: float) -> Tensor:
        import jax

        take = jax.dlpack.from_dlpack
        p = MLPParameters(*(take(t.detach()) for t in self._parameters))
        # As the others: JAX would multiply in TF32 on a GPU.
        with jax.default_matmul_precision("highest"):
            p, losses = self._run(p, take(x[index].int()), take(y[index].int()))
        for mine, new in zip(self._parameters, p, strict=True):
            mine.copy_(torch.from_dlpack(new))
        return torch.from_dlpack(losses)


def test_makemore(benchmark: Any, phase: Phase) -> None:
    benchmark.pedantic(phase.run, setup=lambda: ((phase.prepare(),), {}), rounds=5)
