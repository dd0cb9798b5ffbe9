"""What goes through the operations of a call, of every operation: many gradients at once,
forward-mode differentiation, torch.func under torch.compile, and graphs that are recorded."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import fused

# The compiler's and the tracer's own.
pytestmark = pytest.mark.filterwarnings("ignore")

Function = Callable[[Tensor], Tensor]


def batch_norms(training: bool) -> tuple[Function, Function, Tensor]:
    weight, mean, var = torch.rand(3, 3, dtype=torch.float64)
    arguments: Any = (None, None, weight, None, True) if training else (mean, var, weight)

    def ours(x: Tensor) -> Tensor:
        return fused.batch_norm(x, *arguments, activation="silu")

    def theirs(x: Tensor) -> Tensor:
        return F.silu(F.batch_norm(x, *arguments))

    return ours, theirs, torch.randn(4, 3, 2, dtype=torch.float64)


def cross_entropies(reduction: str) -> tuple[Function, Function, Tensor]:
    target = torch.tensor([0, 2, -100, 1])
    options: Any = {"label_smoothing": 0.1, "reduction": reduction}

    def ours(x: Tensor) -> Tensor:
        return fused.cross_entropy(x, target, **options)

    def theirs(x: Tensor) -> Tensor:
        return F.cross_entropy(x, target, **options)

    return ours, theirs, torch.randn(4, 3, dtype=torch.float64)


def linear_cross_entropies(reduction: str) -> tuple[Function, Function, Tensor]:
    target, w = torch.tensor([0, 2, -100, 1]), torch.randn(3, 5, dtype=torch.float64)

    def ours(x: Tensor) -> Tensor:
        return fused.linear_cross_entropy(x, w, target, reduction=reduction)

    def theirs(x: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.T, target, reduction=reduction)

    return ours, theirs, torch.randn(4, 5, dtype=torch.float64)


CASES: dict[str, tuple[Callable[..., tuple[Function, Function, Tensor]], Any]] = {
    "batch norm in training": (batch_norms, True),
    "batch norm in evaluation": (batch_norms, False),
    "cross-entropy": (cross_entropies, "mean"),
    "cross-entropy of rows": (cross_entropies, "none"),
    "linear cross-entropy": (linear_cross_entropies, "mean"),
    "linear cross-entropy of rows": (linear_cross_entropies, "none"),
}
REDUCED = [name for name in CASES if "rows" not in name]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, device: torch.device) -> tuple[Function, Function, Tensor]:
    torch.manual_seed(0)
    make, argument = CASES[request.param]
    with device:
        ours, theirs, x = make(argument)
    return ours, theirs, x


def test_many_gradients_at_once(case, implementation) -> None:
    """is_grads_batched=True, as torch.autograd.functional.jacobian(vectorize=True) asks."""
    gradients = []
    for function in case[:2]:
        x = case[2].clone().requires_grad_()
        y = function(x)
        upstream = torch.arange(1.0, 1 + 3 * y.numel(), device=y.device).view(3, *y.shape)
        gradients += torch.autograd.grad(y, x, upstream.to(y.dtype).cos(), is_grads_batched=True)
    torch.testing.assert_close(*gradients)


def test_gradients_under_vmap(case, implementation) -> None:
    """torch.func.vmap over torch.autograd.grad, another way to the same Jacobian."""
    gradients = []
    for function in case[:2]:
        x = case[2].clone().requires_grad_()
        y = function(x)
        upstream = torch.arange(1.0, 1 + 3 * y.numel(), device=y.device).view(3, *y.shape)

        def pulled_back(v: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            return torch.autograd.grad(y, x, v, retain_graph=True)[0]

        gradients.append(torch.func.vmap(pulled_back)(upstream.to(y.dtype).cos()))
    torch.testing.assert_close(*gradients)
    assert not gradients[0].requires_grad


def dependent(ours: bool, device: torch.device) -> dict[str, Function]:
    """Functions of one tensor, (4, 5), that is several arguments of one operation, in part by way
    of others; large enough, or with options, for PyTorch not to serve them on the CPU."""
    loss: Any = fused.cross_entropy if ours else F.cross_entropy
    norm: Any = fused.batch_norm if ours else F.batch_norm
    y = torch.arange(4, device=device)
    weight = torch.rand(5, dtype=torch.float64, device=device) + 0.5

    def linear(x: Tensor, w: Tensor) -> Tensor:
        return fused.linear_cross_entropy(x, w, y) if ours else F.cross_entropy(x @ w.T, y)

    return {
        "a target made of the logits": lambda x: loss(x, x.softmax(1), reduction="none"),
        "the same tensor twice": lambda x: loss(x, x, label_smoothing=0.1),
        "weights made of the logits": lambda x: loss(x, x.softmax(1), x.mean(0).exp()),
        "hooks alone": lambda x: loss(x, y, weight, label_smoothing=0.1),
        "tied weights": lambda x: linear(x.cos() @ x.T @ x, x),
        "a gain made of the input": lambda x: norm(x, None, None, x.mean(0), x.var(0), True),
    }


@pytest.mark.parametrize("name", dependent(True, torch.device("cpu")))
def test_second_derivatives_of_arguments_made_of_each_other(name, implementation, device) -> None:
    """With hooks, which are run once a pass, and gradients that are retained."""
    torch.manual_seed(0)
    start = torch.randn(4, 5, dtype=torch.float64, device=device)
    found: list[list[Any]] = []
    for ours in (True, False):
        torch.manual_seed(1)
        function = dependent(ours, device)[name]
        x = start.clone().requires_grad_()
        passes: list[int] = []
        x.register_hook(lambda g, passes=passes: passes.append(1) or 2 * g)
        z = x * 1
        z.retain_grad()
        loss = function(z).square().sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
        once = len(passes)
        loss.backward(create_graph=True)
        assert z.grad is not None and x.grad is not None
        found.append([first, second, z.grad.detach(), x.grad.detach(), once])
        z.grad = x.grad = None  # they hold each other
    torch.testing.assert_close(found[0], found[1])


def test_forward_mode(case) -> None:
    ours, theirs, x = case
    tangents = []
    for function in (ours, theirs):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x.cos())
            tangents.append(forward_ad.unpack_dual(function(dual)).tangent)
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
@pytest.mark.parametrize("case", REDUCED, indirect=True)
def test_functional_derivatives_compiled(case, transform) -> None:
    ours, theirs, x = case

    def transformed(function: Function) -> Function:
        if transform == "grad":
            return torch.func.grad(lambda x: function(x).square().sum())
        return lambda x: torch.func.jvp(function, (x,), (x.cos(),))[1]

    torch.compiler.reset()
    compiled = torch.compile(transformed(ours), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), transformed(theirs)(x))


def differentiated(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y.square().sum(), x)[0]


def traced(function: Function, x: Tensor) -> Function:
    return torch.jit.trace(function, x)


def symbolic(function: Function, x: Tensor) -> Function:
    return make_fx(function)(x)


def exported(function: Function, x: Tensor) -> Function:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return torch.export.export(Model(), (x,)).module()


@pytest.mark.parametrize("record", [traced, symbolic, exported], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", REDUCED, indirect=True)
def test_recorded_graphs(case, record, implementation) -> None:
    """Recorded of one input, run and differentiated with another."""
    ours, _, x = case
    graph = record(ours, x.clone().requires_grad_())
    torch.testing.assert_close(differentiated(graph, x.cos()), differentiated(ours, x.cos()))


def linear_with(namespace: Any, x: Tensor, w: Tensor) -> Tensor:
    target = torch.arange(9, device=x.device) % 7
    if namespace is fused:
        return fused.linear_cross_entropy(x, w, target)
    return F.cross_entropy(x @ w.T, target)


# The shape of what is frozen, and a function of x (9, 5) and it.
FROZEN: dict[str, tuple[tuple[int, ...], Callable[[Any, Tensor, Tensor], Tensor]]] = {
    "weight": ((5,), lambda m, x, w: m.batch_norm(x, None, None, w, training=True)),
    "probabilities": ((9, 5), lambda m, x, w: m.cross_entropy(x, w)),
    "linear layer": ((7, 5), linear_with),
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_since_the_forward(frozen, implementation, device) -> None:
    """As a critic is before the penalty of its gradient."""
    shape, function = FROZEN[frozen]
    x, w = (torch.rand(s, dtype=torch.float64, device=device) for s in ((9, 5), shape))
    found = []
    for namespace in (fused, F):
        y = function(namespace, x.requires_grad_(), w.requires_grad_()).square().sum()
        w.requires_grad_(False)
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), x)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("record", [traced, symbolic, exported], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", [name for name in CASES if "linear" not in name], indirect=True)
def test_second_derivatives_of_recorded_graphs(case, record, implementation) -> None:
    ours, _, x = case
    graph = record(ours, x.clone().requires_grad_())
    found = []
    for function in (graph, ours):
        z = x.cos().requires_grad_()
        (first,) = torch.autograd.grad(function(z).square().sum(), z, create_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), z)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_second_derivatives_of_an_exported_activation(
    activation, with_residual, implementation, device
) -> None:
    x, v = torch.randn(2, 6, 3, 4, dtype=torch.float64, device=device)

    def function(x: Tensor) -> Tensor:
        residual = x.sin() if with_residual else None
        norm = fused.batch_norm(x, None, None, None, None, True, activation=activation,
                                residual=residual)  # fmt: skip
        return (norm * v).sum(0)

    found = []
    for f in (exported(function, x.clone().requires_grad_()), function):
        z = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(z).square().sum(), z, create_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), z)])
    torch.testing.assert_close(*found)


def test_a_recorded_backward_is_differentiated_no_further(case, implementation) -> None:
    """It runs on what requires a gradient; that of its result would be 0, in silence."""
    ours, _, x = case

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(ours(x).square().sum(), x)[0]

    graph = make_fx(gradient)(x.clone().requires_grad_())
    found = graph(z := x.cos().requires_grad_())
    torch.testing.assert_close(found, gradient(z))
    with pytest.raises(RuntimeError, match="expected no derivative of a gradient"):
        found.square().sum().backward()


@pytest.mark.parametrize("record", [traced, symbolic, exported], ids=lambda f: f.__name__)
def test_recorded_graphs_refuse_forward_mode(case, record, implementation) -> None:
    """Their tangents would be 0, in silence."""
    ours, _, x = case
    graph = record(ours, x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="expected no forward-mode derivative"):
        torch.func.jvp(graph, (x,), (x.cos(),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="expected no forward-mode"):
        graph(forward_ad.make_dual(x, x.cos()))


@pytest.mark.parametrize("name", ["small", "large", "rows", "float16", "linear rows", "norm"])
@pytest.mark.parametrize("forward, backward", [("eager", "triton"), ("triton", "eager")])
def test_compiled_forward_and_backward_served_by_different_implementations(
    forward, backward, name, device
) -> None:
    """As where `use` ends in between."""
    torch.manual_seed(0)
    y = torch.tensor([3, -100, 0, 8, 1], device=device)
    w = torch.rand(9, device=device)
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "weight": w}
    functions: dict[str, Function] = {
        "small": lambda x: fused.cross_entropy(x, y, grad_in_forward=False),
        "large": lambda x: fused.cross_entropy(x, y, **options, grad_in_forward=False),
        "rows": lambda x: fused.cross_entropy(x, y, **options, reduction="none", softcap=2.0),
        "float16": lambda x: fused.cross_entropy(x.half(), x.detach().softmax(1), **options),
        "linear rows": lambda x: fused.linear_cross_entropy(x, x.T @ x, y, reduction="none"),
        "norm": lambda x: fused.batch_norm(x, None, None, w, w, True, activation="relu",
                                           residual=x.cos()),
    }  # fmt: skip
    function = functions[name]
    torch.compiler.reset()
    gradients: list[Tensor] = []
    for f in (torch.compile(function, backend="aot_eager", fullgraph=True), function):
        x = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)).to(device)
        with fused.backend.use(forward):
            loss = f(x.requires_grad_()).square().sum()
        with fused.backend.use(backward):
            gradients += torch.autograd.grad(loss, x)
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if name == "float16" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("record", [traced, symbolic, exported], ids=lambda f: f.__name__)
def test_batch_norm_recorded_without_gradients_has_them(record, implementation, device) -> None:
    """The signs that relu's backward takes are part of the graph all the same."""
    norm = fused.BatchNorm1d(3, activation="relu", device=device).eval().requires_grad_(False)
    x = torch.randn(4, 3, 5, device=device)
    with torch.no_grad():
        graph = record(lambda x: norm(x, x), x)
    torch.testing.assert_close(differentiated(graph, x), differentiated(lambda x: norm(x, x), x))


@pytest.mark.parametrize("record", [traced, symbolic, exported], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_graphs_recorded_of_what_requires_no_gradient_have_one(
    case, record, implementation
) -> None:
    ours, _, x = case
    graph = record(ours, x.clone())
    torch.testing.assert_close(differentiated(graph, x.cos()), differentiated(ours, x.cos()))


@pytest.mark.parametrize("record", [traced, symbolic, exported], ids=lambda f: f.__name__)
def test_recorded_graphs_in_another_s_forward_mode(case, record, implementation) -> None:
    """Without a tangent of their own they are constants, as they say."""
    ours, _, x = case
    graph = record(ours, x.clone())
    with forward_ad.dual_level():
        torch.testing.assert_close(graph(x), ours(x))


def test_linear_cross_entropy_exported_without_gradients_has_them(implementation, device) -> None:
    module = fused.LinearCrossEntropyLoss(5, 3, device=device)
    x, y = torch.randn(4, 5, device=device), torch.randint(3, (4,), device=device)
    with torch.no_grad():
        graph = torch.export.export(module, (x, y)).module()
    gradients = [torch.autograd.grad(m(x, y), [*m.parameters()]) for m in (graph, module)]
    torch.testing.assert_close(*gradients)


def test_tensors_made_of_others(case, implementation) -> None:
    """As DTensor is; they see torch's operations, and have no memory that a kernel could read."""
    ours, _, x = case
    pair = TwoTensor(x, x.cos()).requires_grad_()
    y = ours(pair)
    assert type(y) is TwoTensor
    (dx,) = torch.autograd.grad(y.square().sum(), pair)
    for half, part in (("a", x), ("b", x.cos())):
        found = getattr(y, half).detach(), getattr(dx, half)
        torch.testing.assert_close(found, differentiated(ours, part))


@pytest.mark.parametrize("name", ["target", "weight", "linear_weight", "residual", "gain", "mean"])
def test_tensors_made_of_others_beside_plain_ones(name, implementation, device) -> None:
    """A kernel would read memory that they have not."""
    x, w = torch.rand(6, 4, device=device), torch.rand(4, 4, device=device)
    target = torch.arange(6, device=device) % 4
    functions: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "target": (lambda t: fused.cross_entropy(x, t, z_loss=0.1), target),
        "weight": (lambda t: fused.cross_entropy(x, target, t), w[0]),
        "linear_weight": (lambda t: fused.linear_cross_entropy(x, t, target), w),
        "residual": (lambda t: fused.batch_norm(x, None, None, training=True, residual=t), x.cos()),
        "gain": (lambda t: fused.batch_norm(x, w[0], w[1], t, activation="silu"), w[2]),
        "mean": (lambda t: fused.batch_norm(x, t, w[1]), w[0]),
    }
    function, tensor = functions[name]
    pair: Any = function(TwoTensor(tensor.clone(), tensor.flip(0)))
    torch.testing.assert_close((pair.a, pair.b), (function(tensor), function(tensor.flip(0))))


def test_symbolic_trace(device) -> None:
    """torch.fx takes our modules for leaves, as torch's."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = fused.BatchNorm1d(5, activation="relu")
            self.sync = fused.SyncBatchNorm(5)
            self.losses = nn.ModuleList(
                (fused.CrossEntropyLoss(), fused.LinearCrossEntropyLoss(5, 5))
            )

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = self.norm(x, self.sync(x))
            return self.losses[0](z, y) + self.losses[1](z, target=y)

    model = Model().to(device)
    x, y = torch.randn(9, 5, device=device), torch.randint(5, (9,), device=device)
    graph = torch.fx.symbolic_trace(model)
    leaves = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert leaves == {"norm", "sync", "losses.0", "losses.1"}
    torch.testing.assert_close(graph(x, y), model(x, y))


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_symbolic_trace_refuses_hooks_that_would_run_twice(hook) -> None:
    model = nn.Sequential(fused.BatchNorm1d(5), nn.Tanh())
    everywhere = getattr(nn.modules.module, hook.replace("register_", "register_module_"))
    for register in (getattr(model[0], hook), everywhere):
        handle = register(lambda *_: None)
        with pytest.raises(NotImplementedError, match="no hooks on a fused.BatchNorm1d"):
            torch.fx.symbolic_trace(model)
        handle.remove()
    torch.fx.symbolic_trace(model)


@pytest.mark.parametrize("rows", ["by index", "by mask"])
@pytest.mark.parametrize("record", ["compile", "export"])
def test_rows_that_data_select(case, rows, record, implementation) -> None:
    """How many there are only the graph's run tells; of the mask x and target tell it apart."""
    ours, _, x = case
    wanted = torch.arange(8, device=x.device) % 2 == 0  # of twice as many
    chosen = torch.stack((x, -x), dim=1).flatten(0, 1)

    class Selected(nn.Module):
        def forward(self, x: Tensor, wanted: Tensor) -> Tensor:
            kept = wanted if rows == "by mask" else wanted.nonzero().squeeze(1)
            return ours(x[kept])

    selected: Any = Selected()
    if record == "export":
        selected = torch.export.export(selected, (chosen, wanted)).module()
    else:
        torch.compiler.reset()
        selected = torch.compile(selected, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.testing.assert_close(selected(chosen, wanted), ours(x))


def test_a_dropped_output_takes_its_graph_along(case, implementation) -> None:
    """Without the garbage collector, which may come late, or never."""
    ours, _, x = case
    gc.disable()
    try:
        for backward in (False, True):
            leaf = x.clone().requires_grad_()
            hidden = leaf * 2
            y = ours(hidden)
            if backward:
                y.sum().backward()
            seen = [weakref.ref(t) for t in (y, hidden, y.grad_fn)]
            del y, hidden
            assert [t() for t in seen] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "module",
    [
        fused.BatchNorm1d(3),
        fused.SyncBatchNorm(3),
        fused.CrossEntropyLoss(),
        fused.LinearCrossEntropyLoss(3, 3),
    ],
    ids=lambda module: type(module).__name__,
)
def test_scripts_are_refused_in_words(module) -> None:
    with pytest.raises(NotImplementedError, match=f"fused.{type(module).__name__} cannot be"):
        torch.jit.script(nn.Sequential(nn.Linear(3, 3), module))


@pytest.mark.parametrize("linear", [False, True])
def test_stats_of_fake_tensors_have_no_gradient(linear, implementation) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x, w = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5)
        target = torch.zeros(4, dtype=torch.int64)
        if linear:
            stats = fused.linear_cross_entropy_with_stats(x, w, target)
        else:
            stats = fused.cross_entropy_with_stats(x @ w.T, target)
    assert [t.requires_grad for t in stats] == [True, False, False, False, False]


def test_fake_tensors(case, implementation) -> None:
    """Shapes without memory, as tools that plan memory make them."""
    from torch._subclasses import FakeTensorMode

    ours, _, x = case
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(x).detach().requires_grad_()
    with mode:
        y = ours(fake)
        (dx,) = torch.autograd.grad(y.sum(), fake)
    assert y.shape == ours(x).shape and dx.shape == x.shape
    assert y.dtype == dx.dtype == x.dtype
