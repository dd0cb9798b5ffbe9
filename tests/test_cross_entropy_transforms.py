"""Derivatives of every kind, torch.compile, and PyTorch's own samples for cross-entropy."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fused
from fused.cross_entropy_arguments import loss_dtype_of
from tests.test_cross_entropy import DTYPES, REDUCTIONS, check_against_torch, example, small_chunks  # noqa: F401

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "extras": {"z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.7},
}


def differentiable(kind: str, device: torch.device) -> tuple[list[Tensor], Any]:
    """Float64 leaves, and cross_entropy as a function of them and its options."""
    logits, target, weight = example((2, 3, 2), torch.float64, device, kind, weighted=True)
    assert weight is not None
    function: Any
    if kind == "indices":
        leaves = [logits]
        function = lambda x, **o: fused.cross_entropy(x, target, weight, **o)  # noqa: E731
    else:
        leaves = [logits, target, weight]
        function = fused.cross_entropy
    return [t.requires_grad_() for t in leaves], function


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_and_gradgradcheck(reduction, kind, options, implementation, device) -> None:
    leaves, function = differentiable(kind, device)
    call = lambda *t: function(*t, reduction=reduction, **OPTIONS[options])  # noqa: E731
    torch.autograd.gradcheck(call, leaves)
    # Second derivatives are torch's own operations on both; one case shows that Triton gets there.
    if implementation == "eager" or (reduction, kind, options) == ("mean", "indices", "plain"):
        torch.autograd.gradgradcheck(call, leaves)


def test_hessian_is_torchs(implementation, device) -> None:
    logits, target, _ = example((2, 5), torch.float64, device, ignored=0)
    ours = torch.autograd.functional.hessian(lambda x: fused.cross_entropy(x, target), logits)
    theirs = torch.autograd.functional.hessian(lambda x: F.cross_entropy(x, target), logits)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_functional_derivatives(kind, options, implementation, device) -> None:
    """torch.func.grad, vmap and jacrev agree with autograd's gradients, row by row."""
    logits, target, weight = example((5, 9), torch.float64, device, kind, weighted=True, ignored=0)
    chosen = OPTIONS[options]

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return fused.cross_entropy(x, t, weight, reduction="sum", **chosen)

    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, target), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(logits, target), expected)
    by_row = torch.func.vmap(torch.func.grad(loss))(logits, target)
    torch.testing.assert_close(by_row, expected)
    rows = lambda x: fused.cross_entropy(x, target, weight, reduction="none", **chosen)  # noqa: E731
    jacobian = torch.func.jacrev(rows)(logits)
    torch.testing.assert_close(jacobian.sum(0), expected)
    losses = torch.func.vmap(loss)(logits, target)
    torch.testing.assert_close(losses, rows(logits))


def test_functional_stats(implementation, device) -> None:
    """Only the loss has a gradient."""
    logits, target, _ = example((5, 9), torch.float64, device)

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        output = fused.cross_entropy_with_stats(x, target)
        return output.loss + output.row_loss.sum() + output.lse.sum(), output.correct

    gradient, correct = torch.func.grad(loss, has_aux=True)(logits)
    assert correct == fused.cross_entropy_with_stats(logits, target).correct
    expected = torch.func.grad(fused.cross_entropy)(logits, target)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functional_stats_are_those_of_autograd(dtype, kind, reduction, device) -> None:
    """Their dtypes as well; and of rows that are ignored, though they predict that very class."""
    logits, target, _ = example((5, 9), dtype, device, kind, ignored=0)
    options: dict[str, Any] = {"reduction": reduction, "z_loss": 0.1}
    if kind == "indices":
        target[:2] = options["ignore_index"] = 3
        logits[:2, 3] = 20.0

    def stats(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, *others = fused.cross_entropy_with_stats(x, target, **options)
        return loss, tuple(others)

    with fused.backend.use("eager"):
        found = torch.func.vjp(stats, logits, has_aux=True)
        expected = stats(logits)
    torch.testing.assert_close((found[0], found[-1]), expected)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A compiler without a past, in memory or on disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


COMPILED: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("indices", {}),
    "mean, in the backward": ("indices", {"grad_in_forward": False}),
    "none": ("indices", {"reduction": "none", "ignore_index": 3}),
    "everything": ("probabilities", {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}),
    "smoothing": ("indices", {"label_smoothing": 0.1}),
    "sum": ("probabilities", {"label_smoothing": 0.1, "reduction": "sum"}),
}


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("upstream", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_without_a_break_and_with_the_bits_of_eager(
    case, small, dtype, upstream, compiler, monkeypatch, implementation, device
) -> None:
    """Also of a gradient that eager mode forms in the forward, and of a call it leaves to torch."""
    if small:
        monkeypatch.undo()
    kind, options = COMPILED[case]
    weighted = kind == "probabilities"
    tensors = example((9, 1000), dtype, device, kind, weighted, ignored=0)
    leaves = [t.requires_grad_() for t in tensors if t is not None and t.is_floating_point()]

    def step(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return fused.cross_entropy(logits, target, weight, **options)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(*tensors)
        gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))
        results.append((loss, *gradients))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_for_any_size_with_the_bits_of_eager(compiler, monkeypatch, device) -> None:
    """The compiler takes even the default options for symbols then; eager mode leaves the call to
    PyTorch, which rounds in its own way."""
    monkeypatch.undo()
    function = torch.compile(fused.cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (10, 12):
        logits, target, _ = example((n, 11), torch.bfloat16, device)
        logits.requires_grad_()
        found = []
        for f in (fused.cross_entropy, function):
            loss = f(logits, target)
            found.append((loss, *torch.autograd.grad(loss, logits, torch.full_like(loss, 1.7))))
        torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
def test_compiled_names_an_index_that_is_no_class(small, compiler, monkeypatch) -> None:
    if small:
        monkeypatch.undo()
    logits, target, _ = example((9, 27), torch.float32, "cpu")
    target[4] = 31
    function = torch.compile(fused.cross_entropy, fullgraph=True, backend="aot_eager")
    with fused.backend.use("eager"), pytest.raises(IndexError, match="got 31 at row 4"):
        function(logits, target)


SIZES = {"small": (40, 16), "large": (600, 1000)}


@pytest.mark.parametrize("size", SIZES)
def test_behind_a_selective_checkpoint(size, device) -> None:
    """Which stops the computation by an error, at which no operation may be called."""
    x = torch.randn(SIZES[size], device=device, requires_grad=True)
    y = torch.randint(16, (len(x),), device=device)
    of = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    found = [
        torch.autograd.grad(
            checkpoint(lambda x, f=f: f(x * 2, y), x, use_reentrant=False, context_fn=of), x
        )
        for f in (fused.cross_entropy, F.cross_entropy)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("shape", [(0, 27), (0, 27, 3), (2, 27, 0)], ids=str)
def test_compiled_for_an_empty_batch(shape, compiler, implementation, device) -> None:
    logits, target, weight = example(shape, torch.float32, device, weighted=True)
    function = torch.compile(fused.cross_entropy, fullgraph=True, backend="aot_eager")
    loss = function(logits.requires_grad_(), target, weight)
    assert loss.isnan()
    assert torch.autograd.grad(loss, logits)[0].shape == shape


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_for_numbers_that_change(compiler, implementation, device) -> None:
    """From the second one on they are symbols to the compiler."""
    logits, target, weight = example((9, 27), torch.float32, device, weighted=True, ignored=0)

    def loss(ignore_index: int, number: float) -> Tensor:
        numbers = {"softcap": number, "z_loss": number, "logit_scale": number}
        return fused.cross_entropy(logits, target, weight, ignore_index, **numbers)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ignore_index, number in ((-100, 0.5), (3, 1.5), (5, 2.5), (7, 1.0)):
        torch.testing.assert_close(
            compiled(ignore_index, number), loss(ignore_index, number), rtol=0, atol=0
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_by_inductor_with_dynamic_shapes(compiler, implementation, device) -> None:
    def step(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return tuple(fused.cross_entropy_with_stats(logits * 2, target))

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (4, 9, 17):
        logits, target, _ = example((n, 27), torch.float32, device)
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        outputs, expected = compiled(ours, target), step(theirs, target)
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
        outputs[0].backward()
        expected[0].backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("want_extras, other", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_opcheck(kind, reduction, want_extras, other, implementation, device) -> None:
    """Also with other dtypes, on which those of the extras depend: two, or half precision."""
    soft = kind == "probabilities"
    dtype = torch.bfloat16 if other and not soft else torch.float32
    logits, target, weight = example((3, 5, 2), dtype, device, kind, weighted=True)
    logits = logits.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    if other and soft:
        target = target.double()
    numbers = (-100, reduction, 0.1, 0.1, 3.0, 0.7)
    loss_dtype = loss_dtype_of(logits, target, weight)
    arguments = (logits, target, weight, *numbers, loss_dtype, want_extras, False, False)
    torch.library.opcheck(torch.ops.fused.cross_entropy_fwd, arguments)
    with torch.no_grad():
        loss, stats, scale, *_ = torch.ops.fused.cross_entropy_fwd(*arguments)
    logits = logits.detach()
    backward = (loss, logits, target, weight, stats, scale, *numbers)
    torch.library.opcheck(
        torch.ops.fused.cross_entropy_bwd, (*backward, False, False, True, soft, soft)
    )


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("early, plain", [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_of_what_eager_mode_does_otherwise(
    reduction, early, plain, monkeypatch, implementation, device
) -> None:
    """A gradient in the forward; a call left to torch, also of logits that are not contiguous."""
    monkeypatch.undo()
    early = early and reduction != "none"
    logits, target, _ = example((3, 5, 2), torch.bfloat16, device)
    logits = logits.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    options = (-100, reduction, 0.0, 0.0, 0.0, 1.0)
    arguments = (logits, target, None, *options, torch.bfloat16, False, early, plain)
    torch.library.opcheck(torch.ops.fused.cross_entropy_fwd, arguments)
    with torch.no_grad():
        loss, stats, scale, *_ = torch.ops.fused.cross_entropy_fwd(*arguments)
    backward = (loss, logits.detach(), target, None, stats, scale, *options, early, plain)
    torch.library.opcheck(torch.ops.fused.cross_entropy_bwd, (*backward, True, False, False))


def samples_of_torch(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """(input, target, keywords) of PyTorch's own test samples, functional and module."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    (info,) = (op for op in op_db if op.name == "nn.functional.cross_entropy")
    for sample in info.sample_inputs(device, dtype, requires_grad=True):
        yield sample.input, *sample.args, sample.kwargs
    (module,) = (m for m in module_db if m.module_cls is torch.nn.CrossEntropyLoss)
    for case in module.module_inputs_func(module, device, dtype, requires_grad=True, training=True):
        assert not case.constructor_input.args and not case.forward_input.kwargs
        yield *case.forward_input.args, case.constructor_input.kwargs


# Ignored: what torch warns of when its test tools are imported.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1::2]),
    ],
    ids=str,
)
def test_pytorchs_own_samples(dtype, implementation, device) -> None:
    count = 0
    for input, target, keywords in samples_of_torch(dtype, device):
        if implementation == "eager":  # the module calls the function, whatever serves it
            module = fused.CrossEntropyLoss(**keywords)
            loss = fused.cross_entropy(input, target, **keywords)
            torch.testing.assert_close(module(input, target), loss, rtol=0, atol=0, equal_nan=True)
        options = {name: value for name, value in keywords.items() if name != "weight"}
        weight = keywords.get("weight")
        check_against_torch(input.detach(), target.detach(), weight, implementation, **options)
        count += 1
    assert count >= 100


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES[1::2], ids=str)
def test_pytorchs_own_samples_on_the_cpu(dtype) -> None:
    """The same, without the interpreter, which takes long."""
    with fused.backend.use("eager"):
        test_pytorchs_own_samples(dtype, "eager", torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")
def test_pytorchs_own_error_inputs(implementation, device) -> None:
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

    (info,) = (op for op in op_db if op.name == "nn.functional.cross_entropy")
    assert info.error_inputs_func is None, "PyTorch has error inputs now: try them here"
    (module,) = (m for m in module_db if m.module_cls is torch.nn.CrossEntropyLoss)
    if module.module_error_inputs_func is None:
        pytest.skip("this PyTorch has no error inputs for cross-entropy")
    errors = module.module_error_inputs_func(
        module, device, torch.float32, requires_grad=False, training=True
    )
    count = 0
    for case in errors:
        count += 1
        inputs = case.module_error_input
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type):
                fused.CrossEntropyLoss(*inputs.constructor_input.args)
            continue
        loss = fused.CrossEntropyLoss(
            *inputs.constructor_input.args, **inputs.constructor_input.kwargs
        )
        with pytest.raises(case.error_type):
            loss(*inputs.forward_input.args, **inputs.forward_input.kwargs)
    assert count > 0
