"""`__torch_function__` and TorchFunctionMode, which our functions ask as PyTorch's do."""

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fused
from fused import CrossEntropyOutput

torch.manual_seed(0)
X, W = torch.randn(6, 4), torch.randn(4, 4)
Y, OF_CLASSES = torch.randint(4, (6,)), torch.rand(4)
LINEAR = {"input": X, "linear_weight": W, "target": Y, "linear_bias": W[0], "weight": OF_CLASSES}
NORM = {"input": X, "running_mean": W[0], "running_var": OF_CLASSES, "weight": W[1], "bias": W[2]}

# Each with all the tensors that it takes.
FUNCTIONS: dict[Callable[..., Any], dict[str, Tensor]] = {
    fused.cross_entropy: {"input": X, "target": Y, "weight": OF_CLASSES},
    fused.cross_entropy_with_stats: {"input": X, "target": Y, "weight": OF_CLASSES},
    fused.linear_cross_entropy: LINEAR,
    fused.linear_cross_entropy_with_stats: LINEAR,
    fused.batch_norm: NORM | {"residual": X.cos()},
    fused.vocab_parallel_cross_entropy: {"input": X, "target": Y},
}
ARGUMENTS = [(function, name) for function, tensors in FUNCTIONS.items() for name in tensors]
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


class Stranger:
    """No tensor, but asked all the same."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func, types, args, kwargs


class Refusing:
    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        return NotImplemented


class Subclass(Tensor):
    pass


class Logged(Subclass):
    """That says what it is asked for, and has PyTorch compute it."""

    asked: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.asked.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Log(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked.append(func)
        return func(*args, **(kwargs or {}))


def tensors_of(function: Callable[..., Any], device: torch.device) -> dict[str, Tensor]:
    # New ones: batch norm writes to its statistics.
    return {name: tensor.to(device, copy=True) for name, tensor in FUNCTIONS[function].items()}


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output


@pytest.mark.parametrize(
    "function, name", ARGUMENTS, ids=[f"{f.__name__}-{name}" for f, name in ARGUMENTS]
)
def test_any_tensor_is_asked_with_all_arguments(function, name) -> None:
    """None is forgotten, and those without a default stand first, as in a call of torch's."""
    stranger, parameters = Stranger(), inspect.signature(function).parameters
    given = {name: object() for name in parameters} | {name: stranger}
    asked, types, positional, named = function(**given)
    assert asked is function and types == (Stranger,)
    required = [p.name for p in parameters.values() if p.default is p.empty]
    assert dict(zip(required, positional, strict=True)) | named == given


@functions
def test_what_nobody_implements(function) -> None:
    with pytest.raises(TypeError, match=f"no implementation found for 'fused.*{function.__name__}"):
        function(**FUNCTIONS[function] | {"input": Refusing()})


@pytest.mark.parametrize(
    "function, name", ARGUMENTS, ids=[f"{f.__name__}-{name}" for f, name in ARGUMENTS]
)
def test_subclasses(function, name, implementation, device) -> None:
    """The results are of the subclass, which is asked once, and is not in the way of the bits."""
    tensors = tensors_of(function, device)
    plain = as_tuple(function(**tensors))
    tensors = tensors_of(function, device)
    tensors[name] = tensors[name].as_subclass(Logged)
    Logged.asked.clear()
    output = function(**tensors)
    assert Logged.asked == [function]
    assert isinstance(output, CrossEntropyOutput) == (len(plain) > 1)
    for found, expected in zip(as_tuple(output), plain, strict=True):
        assert type(found) is Logged
        assert torch.equal(found.as_subclass(Tensor), expected)


@functions
def test_gradients_of_subclasses(function, implementation, device) -> None:
    """The bits of plain tensors; what is within is not asked for, in the backward neither."""
    gradients: list[Tensor] = []
    Logged.asked.clear()
    for cls in (Tensor, Logged):
        tensors = tensors_of(function, device)
        leaf = tensors["input"].requires_grad_()
        (output, *_) = as_tuple(function(**tensors | {"input": leaf.as_subclass(cls)}))
        upstream = X.cos().to(device) if function is fused.batch_norm else None
        gradients += torch.autograd.grad(output, leaf, upstream)
    assert Logged.asked == [function, torch.autograd.grad]
    assert torch.equal(*gradients)


@functions
def test_modes(function, implementation, device) -> None:
    """Each in turn, and once."""
    plain = as_tuple(function(**tensors_of(function, device)))
    tensors = tensors_of(function, device)
    with Log() as outer, Log() as inner:
        output = as_tuple(function(**tensors))
    assert outer.asked == inner.asked == [function]
    assert all(torch.equal(a, b) for a, b in zip(output, plain, strict=True))


@functions
def test_symbolic_trace_records_one_call(function, implementation, device) -> None:
    def step(x: Tensor) -> Any:
        output = function(**tensors_of(function, device) | {"input": x.exp()})
        return (output.loss, output.correct) if function.__name__.endswith("stats") else output

    graph = torch.fx.symbolic_trace(step)
    (node,) = (node for node in graph.graph.nodes if node.target is function)
    assert node.op == "call_function"
    x = X.to(device)
    for again in (graph, pickle.loads(pickle.dumps(graph))):
        torch.testing.assert_close(again(x), step(x), rtol=0, atol=0)


def test_symbolic_trace_of_a_module_that_calls_functions(device) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gain = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
            self.register_buffer("of_classes", OF_CLASSES.clone())

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = fused.batch_norm(self.linear(x), None, None, self.gain, training=True)
            return fused.cross_entropy(z, y, self.of_classes, label_smoothing=0.1)

    model = Model().to(device)
    graph = torch.fx.symbolic_trace(model)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called == [fused.batch_norm, fused.cross_entropy]
    gradients = []
    for module in (graph, model):
        loss = module(X.to(device), Y.to(device))
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    assert all(map(torch.equal, *gradients))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@functions
def test_torch_compile_takes_subclasses(function, implementation, device) -> None:
    """It cannot follow `__torch_function__` of functions that are not PyTorch's; nor need it."""
    torch.compiler.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    tensors = tensors_of(function, device)
    output = as_tuple(compiled(**tensors | {"input": tensors["input"].as_subclass(Subclass)}))
    plain = as_tuple(function(**tensors_of(function, device)))
    assert all(type(found) is Subclass for found in output)
    assert all(torch.equal(a.as_subclass(Tensor), b) for a, b in zip(output, plain, strict=True))


def test_output_of_an_iterable() -> None:
    """As torch.return_types; beside what a NamedTuple is."""
    fields: Any = tuple(torch.arange(5.0))
    make: Any = CrossEntropyOutput
    output = make(*fields)
    assert output == make(iter(fields)) == make(**output._asdict())
    assert pickle.loads(pickle.dumps(output)) == output._replace(lse=fields[2]) == output
    assert [*inspect.signature(make).parameters] == [*CrossEntropyOutput._fields]
    with pytest.raises(TypeError, match="missing 3 required"):
        make(*fields[:2])
    with pytest.raises(TypeError, match="Expected 5 arguments, got 2"):
        make(fields[:2])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [fused.BatchNorm1d, fused.SyncBatchNorm])
def test_batch_norm_modules(cls, training, momentum, implementation, device) -> None:
    """What is within is not asked for, and the batch is counted all the same."""
    modules = [cls(4, momentum=momentum, activation="tanh").to(device) for _ in range(3)]
    x, residual = X.to(device), X.cos().to(device)
    outputs, asked = [], []
    with Log() as log:
        outputs.append(modules[0].train(training)(x, residual))
    asked.append(log.asked)
    Logged.asked.clear()
    outputs.append(modules[1].train(training)(x.as_subclass(Logged), residual))
    asked.append(Logged.asked)
    assert all([f.__name__ for f in functions] == ["dim", "run"] for functions in asked)
    assert type(outputs[1]) is Logged
    plain = modules[2].train(training)(x, residual)
    assert all(torch.equal(output.as_subclass(Tensor), plain) for output in outputs)
    states = [module.state_dict() for module in modules]
    for name, tensor in states[2].items():
        assert torch.equal(states[0][name], tensor) and torch.equal(states[1][name], tensor)


def test_synchronised_batch_norm(half_a_group, implementation, device) -> None:
    """Nor of what talks to other processes."""
    norm, x = fused.SyncBatchNorm(4, device=device), X.to(device)
    with Log() as log:
        norm(x)
    assert [f.__name__ for f in log.asked] == ["dim", "_run"]


def test_losses_call_the_function(device) -> None:
    x, y = X.to(device), Y.to(device)
    with Log() as log:
        fused.CrossEntropyLoss(OF_CLASSES.to(device))(x, y)
        fused.LinearCrossEntropyLoss(4, 4, device=device)(x, y)
    ours = [function for function in log.asked if function in FUNCTIONS]
    assert ours == [fused.cross_entropy, fused.linear_cross_entropy]
