"""Derivatives of every kind, torch.compile, and PyTorch's own samples for linear cross-entropy."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fused
from tests.test_cross_entropy import REDUCTIONS
from tests.test_cross_entropy_transforms import compiler as compiler
from tests.test_linear_cross_entropy import EXTRAS, example, needs_torchs_own, unfused


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_gradcheck_and_gradgradcheck(kind, reduction, implementation, device) -> None:
    """Target probabilities and class weights that require a gradient have one too."""
    x, w, b, target = example(3, (4,), torch.float64, device, kind, ignored=0, features=2)
    leaves = [x, w, b]
    weight = torch.linspace(0.5, 1.5, 4, dtype=torch.float64, device=device)
    call: Any
    if kind == "probabilities":
        leaves += [target, weight]
        call = lambda x, w, b, t, weight: fused.linear_cross_entropy(  # noqa: E731
            x, w, t, linear_bias=b, weight=weight, reduction=reduction, **EXTRAS
        )
    else:
        call = lambda x, w, b: fused.linear_cross_entropy(  # noqa: E731
            x, w, target, linear_bias=b, reduction=reduction, memory_budget_bytes=64, **EXTRAS
        )
    leaves = [t.requires_grad_() for t in leaves]
    torch.autograd.gradcheck(call, leaves)
    if implementation == "eager":  # second derivatives are torch's own operations on both
        torch.autograd.gradgradcheck(call, leaves)


def test_functional_derivatives(implementation, device) -> None:
    x, w, b, target = example(5, (9,), torch.float64, device)

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fused.linear_cross_entropy(x, w, target, linear_bias=b, **EXTRAS)

    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2))(x, w, b), expected)
    models = torch.func.vmap(loss, (None, 0, None))(x, torch.stack([w, 2 * w]), b)
    torch.testing.assert_close(models, torch.stack([loss(x, w, b), loss(x, 2 * w, b)]))


def test_compiled_for_no_rows_that_count(implementation, device) -> None:
    """Their NaN from upstream does not reach a weight."""
    x, w, _, target = example(5, (9,), torch.float32, device, ignored=2.0)
    leaves = [t.requires_grad_() for t in (x, w)]
    torch.compiler.reset()

    def function(x: Tensor, w: Tensor) -> Tensor:
        return fused.linear_cross_entropy(x, w, target)

    loss = torch.compile(function, backend="aot_eager", fullgraph=True)(x, w)
    assert loss.isnan()
    assert not any(g.any() for g in torch.autograd.grad(loss.exp(), leaves))


COMPILED: dict[str, dict[str, Any]] = {
    "mean": {},
    "several chunks": {"memory_budget_bytes": 3 * 27 * 4},
    "none": {"reduction": "none", "memory_budget_bytes": 3 * 27 * 4},
    "everything": {**EXTRAS, "label_smoothing": 0.1, "reduction": "sum"},
}


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_without_a_break_and_with_the_bits_of_eager(
    case, compiler, implementation, device
) -> None:
    x, w, b, target = example(9, (27,), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fused.linear_cross_entropy(x, w, target, linear_bias=b, **COMPILED[case])

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(*leaves)
        gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.3))
        results.append((loss, *gradients))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_few_rows_are_left_of_several_chunks() -> None:
    """On the CPU ignored rows take no part, and none but one chunk may be left: the gradients have
    the dtypes that the compiler was promised none the less. Inductor would read others as those."""
    x, w, b, target = example(64, (27,), torch.bfloat16, "cpu", ignored=0)
    target[2:] = -100
    for reduction in ("mean", "sum"):
        numbers = (-100, reduction, 0.0, 0.0, 0.0, 1.0, torch.bfloat16, 3 * 27 * 2)
        arguments = (x, w, b, target, None, *numbers, True, True, True, False)
        operator = torch.ops.fused.linear_cross_entropy_fwd
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


@pytest.mark.filterwarnings("ignore")  # the recorders' own
@pytest.mark.parametrize("record", ["trace", "make_fx", "compile"])
def test_a_graph_of_few_rows_run_with_many(record, compiler) -> None:
    """Over several chunks dW of half precision is summed in float32, though the graph was recorded
    of one chunk."""

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return fused.linear_cross_entropy(x, w, y, memory_budget_bytes=8192)

    def dw(x: Tensor, w: Tensor, y: Tensor, loss: Any = loss) -> Tensor:
        return torch.autograd.grad(loss(x, w, y), w)[0]

    def arguments(n: int) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        x, w = torch.randn(n, 32, generator=g), torch.randn(64, 32, generator=g)
        return x.bfloat16(), w.bfloat16().requires_grad_(), torch.randint(64, (n,), generator=g)

    graph: Any
    if record == "make_fx":
        graph = make_fx(lambda x, w, y: dw(x, w, y))(*arguments(16))
    else:
        recorded: Any = torch.compile(loss, backend="aot_eager", dynamic=True)
        if record == "trace":
            recorded = torch.jit.trace(loss, arguments(16), check_trace=False)
        graph = functools.partial(dw, loss=recorded)
        graph(*arguments(16))
    many = arguments(8192)
    torch.testing.assert_close(graph(*many), dw(*many), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_exported_for_any_number_of_rows(reduction, compiler) -> None:
    """In evaluation nothing depends on how many chunks they are."""

    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
            return fused.linear_cross_entropy(
                x, w, y, reduction=reduction, memory_budget_bytes=1000
            )

    def arguments(n: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(n, 8).bfloat16(), torch.ones(50, 8).bfloat16(), torch.arange(n) % 50

    n = torch.export.Dim("n", min=2, max=100_000)
    shapes = ({0: n}, None, {0: n})
    graph = torch.export.export(Loss(), arguments(8), dynamic_shapes=shapes).module()
    for rows in (3, 700):
        torch.testing.assert_close(graph(*arguments(rows)), Loss()(*arguments(rows)))


def recorded(function: Any, *tensors: Tensor) -> Any:
    return make_fx(function)(*tensors)


def compiled(function: Any, *_: Tensor) -> Any:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("graph", [compiled, recorded])
@pytest.mark.parametrize("of", [(0,), (1,), (2,)], ids=["x", "w", "b"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_graph_has_no_second_derivative(
    reduction, of, graph, compiler, implementation, device
) -> None:
    """It refuses; the gradients of "mean" and "sum", which the forward formed, would be taken for
    constants."""
    x, w, b, target = example(8, (27,), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fused.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)

    loss = graph(step, *leaves)(*leaves)
    wanted = [leaves[i] for i in of]
    gradients = torch.autograd.grad(loss.sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward|no derivative of a gradient"):
        torch.autograd.grad(loss.sum() + sum(g.pow(2).sum() for g in gradients), wanted)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction, dtype, implementation, device) -> None:
    x, w, b, target = example(5, (4, 3), dtype, device)
    numbers = (-100, reduction, 0.1, 0.1, 3.0, 0.7, dtype, 2 * 12 * dtype.itemsize)
    x.requires_grad_()
    arguments = (x, w, b, target, None, *numbers, True, True, True)
    torch.library.opcheck(torch.ops.fused.linear_cross_entropy_fwd, (*arguments, True))
    if reduction == "none":
        x = x.detach()
        with torch.no_grad():
            outputs = torch.ops.fused.linear_cross_entropy_fwd(*arguments, True)
        backward = (outputs[0], outputs[5], x, *arguments[1:])
        torch.library.opcheck(torch.ops.fused.linear_cross_entropy_bwd, backward)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("transposed", ["x", "w"])
def test_strides_of_gradients_are_those_promised(
    transposed, ignored, dtype, implementation, device
) -> None:
    """Whether or not rows are left out, which a graph cannot know."""
    x, w, b, target = example(5, (4, 3), dtype, device, ignored=ignored)
    if transposed == "x":
        x = x.T.contiguous().T
    else:
        w = w.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    operators = torch.ops.fused
    for reduction in ("mean", "none"):
        numbers = (-100, reduction, 0.0, 0.0, 0.0, 1.0, dtype, 2 * 12 * dtype.itemsize)
        arguments = (x, w, b, target, None, *numbers, True, True, True)
        forward = (*arguments, False)
        torch.library.opcheck(
            operators.linear_cross_entropy_fwd, forward, test_utils="test_faketensor"
        )
    outputs = operators.linear_cross_entropy_fwd(*forward)
    backward = (outputs[0], outputs[5], *arguments)
    torch.library.opcheck(
        operators.linear_cross_entropy_bwd, backward, test_utils="test_faketensor"
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_that_of_the_pair(dtype, reduction, implementation, device) -> None:
    """Also of activations that came in half precision."""
    x, w, b, target = example(8, (27,), torch.float32, device)
    x = x.to(dtype)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    results = []
    for function in (fused.linear_cross_entropy, None):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            if function is None:
                loss = unfused(x, w, b, target, reduction=reduction)
            else:
                loss = function(x, w, target, linear_bias=b, reduction=reduction)
        gradients = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
        results.append((loss, *gradients))
    with torch.autocast(device.type, dtype=torch.bfloat16):  # which leaves float64 alone
        wide = fused.linear_cross_entropy(x.double(), w.double(), target, reduction=reduction)
    assert (results[0][0].dtype, wide.dtype) == (torch.float32, torch.float64)
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())


def samples_of_torch(variant: str, dtype: torch.dtype, device: torch.device) -> Iterator[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (
        op
        for op in op_db
        if op.name == "nn.functional.linear_cross_entropy" and op.variant_test_name == variant
    )
    yield from info.sample_inputs(device, dtype, requires_grad=True)


@needs_torchs_own
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.float64, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "variant",
    # The second has the same calls as the first, but for the options that ours does not take.
    ["", pytest.param("chunked", marks=pytest.mark.slow), "chunked_none"],
)
def test_pytorchs_own_samples(variant, dtype, implementation, device) -> None:
    count = 0
    for sample in samples_of_torch(variant, dtype, device):
        leaves = [
            t for t in (sample.input, *sample.args, *sample.kwargs.values())
            if isinstance(t, Tensor) and t.requires_grad
        ]  # fmt: skip
        options = {k: v for k, v in sample.kwargs.items() if k != "options"}
        results = []
        for function in (fused.linear_cross_entropy, F.linear_cross_entropy):
            loss = function(sample.input, *sample.args, **options)
            gradients = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
            results.append((loss, *gradients))
        for ours, theirs in zip(*results, strict=True):
            # Of magnitude 9 and more: bfloat16 logits differ by their last bit.
            tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
            size = tolerance * max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=size)
        count += 1
    assert count >= 50


@needs_torchs_own
@pytest.mark.filterwarnings("ignore")
def test_pytorchs_own_error_inputs(device) -> None:
    from torch.testing._internal.common_methods_invocations import op_db

    info = next(op for op in op_db if op.name == "nn.functional.linear_cross_entropy")
    cases = list(info.error_inputs_func(info, device))
    assert len(cases) >= 6
    for case in cases:
        sample = case.sample_input
        with pytest.raises(case.error_type):
            fused.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
