"""fused.SyncBatchNorm: the numbers of one process with the whole batch.

Over real processes; and, on both implementations, in one that does what the processes do.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fused
from fused import backend, sync_batch_norm
from fused.operators import sync_batch_norm as operators
from tests import processes
from tests.exactness import same_bits


def worker(rank: int, folder: str) -> None:
    """What each process runs: its share of the batch, forward and backward."""
    sizes, data, options = torch.load(f"{folder}/case.pt")
    with_residual = options.pop("residual", False)
    begin = sum(sizes[:rank])
    rows = slice(begin, begin + sizes[rank])
    calls = processes.counted("all_gather", "all_reduce")
    norm = fused.SyncBatchNorm(data["x"].shape[1], **options)
    parallel = nn.parallel.DistributedDataParallel(norm)
    results = step(norm, data, rows, with_residual, parallel)
    torch.save(results | {"calls": calls}, f"{folder}/{rank}.pt")


CASES: dict[str, tuple[list[int], tuple[int, ...], dict[str, Any]]] = {
    "two unequal": ([3, 6], (9, 4), {}),
    "three with images": (
        [2, 1, 4],
        (7, 3, 5, 2),
        {"activation": "relu", "correction": 1, "residual": True},
    ),
    "one is empty": ([4, 0], (4, 3, 6), {"momentum": None, "residual": True, "activation": "silu"}),
}


def example(shape: tuple[int, ...], device: torch.device | str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    data = {n: torch.randn(shape, generator=generator) for n in ("x", "residual", "upstream")}
    data |= {n: torch.randn(shape[1], generator=generator) + 1 for n in ("weight", "bias")}
    return {name: tensor.to(device) for name, tensor in data.items()}


def step(
    norm: Any,
    data: dict[str, Tensor],
    rows: slice,
    with_residual: bool,
    parallel: nn.Module | None = None,
    again: bool = True,
) -> dict[str, Any]:
    """Forward and backward of some rows, through `parallel` where it wraps the norm: then a
    gradient to be differentiated `again` is refused first."""
    call = norm if parallel is None else parallel
    norm.to(data["x"].device)
    with torch.no_grad():
        norm.weight.copy_(data["weight"])
        norm.bias.copy_(data["bias"])
    x, residual = (data[name][rows].clone().requires_grad_() for name in ("x", "residual"))
    y = call(x, residual) if with_residual else call(x)
    if parallel is not None and again:
        with pytest.raises(RuntimeError, match="expected create_graph=False"):
            torch.autograd.grad(y, x, data["upstream"][rows], create_graph=True)
    y.backward(data["upstream"][rows])
    results = {"y": y.detach(), "dx": x.grad, "dw": norm.weight.grad, "db": norm.bias.grad}
    return results | {"dresidual": residual.grad, "buffers": dict(norm.named_buffers())}


def check_equal_to_the_whole_batch(
    results: list[dict[str, Any]], data: dict[str, Tensor], options: dict[str, Any]
) -> None:
    options = dict(options)
    module = fused.BatchNorm2d if data["x"].dim() == 4 else fused.BatchNorm1d
    with_residual = options.pop("residual", False)
    whole = step(module(data["x"].shape[1], **options), data, slice(None), with_residual)
    close = {"rtol": 1e-5, "atol": 1e-5}
    for name in ("y", "dx", "dresidual"):
        if whole[name] is not None and name in results[0]:
            parts = torch.cat([r[name] for r in results])
            torch.testing.assert_close(parts, whole[name], **close)
    # Parameter gradients are each process's own share.
    torch.testing.assert_close(sum(r["dw"] for r in results), whole["dw"], **close)
    torch.testing.assert_close(sum(r["db"] for r in results), whole["db"], **close)
    for result in results:
        for name, buffer in whole["buffers"].items():
            torch.testing.assert_close(result["buffers"][name], buffer, **close)
            same = results[0]["buffers"][name]
            torch.testing.assert_close(result["buffers"][name], same, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process_with_the_whole_batch(case, tmp_path) -> None:
    sizes, shape, options = CASES[case]
    data = example(shape, "cpu")
    torch.save((sizes, data, options), tmp_path / "case.pt")
    processes.run(worker, len(sizes), tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(sizes))]
    for result in results:
        assert result["calls"] == ["all_gather", "all_reduce"]
    # DistributedDataParallel made the mean of parameter gradients in all processes.
    check_equal_to_the_whole_batch(results, data, options)


def worker_of_few_rows(rank: int, folder: str) -> None:
    outcome: list[Any] = []
    for sizes in ((1, 0), (0, 0)):
        for kernels in ("eager", "triton"):
            norm = fused.SyncBatchNorm(3, momentum=0.5)
            try:
                with backend.use(kernels):
                    norm(torch.ones(sizes[rank], 3)).sum().backward()
                numbers = (norm.running_mean, norm.running_var, norm.weight.grad, norm.bias.grad)
                outcome.append([t.tolist() for t in numbers])
            except ValueError as error:
                outcome.append(str(error))
    with backend.use("eager"):
        outcome.append(list(fused.SyncBatchNorm(0)(torch.ones(2, 0)).shape))
    torch.save(outcome, f"{folder}/{rank}.pt")


def test_fewer_than_two_rows_in_all_processes(tmp_path) -> None:
    """One is an error everywhere; none leaves the running statistics as they are, and has gradients
    of 0."""
    processes.run(worker_of_few_rows, 2, tmp_path)
    for rank in range(2):
        *one, eager, triton, no_channels = torch.load(tmp_path / f"{rank}.pt")
        assert all("expected more than 1 value per channel" in outcome for outcome in one)
        assert eager == triton == [[0.0] * 3, [1.0] * 3, [0.0] * 3, [0.0] * 3]
        assert no_channels == [2, 0]


def compiled_worker(rank: int, folder: str) -> None:
    """As `worker`, of a module that is compiled without a break."""
    sizes, data, options = torch.load(f"{folder}/case.pt")
    begin = sum(sizes[:rank])
    norm = fused.SyncBatchNorm(data["x"].shape[1], **options)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    results = step(norm, data, slice(begin, begin + sizes[rank]), True, compiled, again=False)
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("activation", ["relu", None])
def test_compiled_equals_one_process_with_the_whole_batch(activation, tmp_path) -> None:
    sizes, options = [3, 4], {"activation": activation, "correction": 1}
    data = example((7, 3, 5, 2), "cpu")
    torch.save((sizes, data, options), tmp_path / "case.pt")
    processes.run(compiled_worker, len(sizes), tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(sizes))]
    check_equal_to_the_whole_batch(results, data, options | {"residual": True})


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine, residual", [(True, True), (False, False)])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", None])
def test_compiled_without_a_break_and_with_the_bits_of_eager(
    activation, affine, residual, momentum, half_a_group, implementation, device
) -> None:
    """Whatever the shape, which is a variable of the graph; the other process has the same rows."""
    torch.compiler.reset()
    norms = [
        fused.SyncBatchNorm(
            3, momentum=momentum, affine=affine, activation=activation, correction=1
        )
        for _ in range(2)
    ]
    eager, ours = (norm.to(device) for norm in norms)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((4, 3, 5, 2), (3, 3, 2, 7)):
        results = []
        for norm, call in ((eager, eager), (ours, compiled)):
            data = example(shape, device)
            x = data["x"].contiguous(memory_format=torch.channels_last)
            leaves = [x.requires_grad_(), *norm.parameters()]
            if residual:
                leaves.append(data["residual"].requires_grad_())
            y = call(x, leaves[-1] if residual else None)
            gradients = torch.autograd.grad(y, leaves, data["upstream"])
            results.append((y, *gradients, *norm.buffers()))
        torch.testing.assert_close(*results, **same_bits(device))
    assert ours.num_batches_tracked == 2


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_among_half_of_the_processes(device) -> None:
    """All have the same rows: running_var shows how many there were."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        half = dist.new_group([0, 1])
        norms = [fused.SyncBatchNorm(3, process_group=half, device=device) for _ in range(2)]
        compiled = torch.compile(norms[1], fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 3, device=device)
        torch.testing.assert_close(norms[0](x), compiled(x), **same_bits(device))
        torch.testing.assert_close(*(norm.running_var for norm in norms), **same_bits(device))
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_opcheck(activation, half_a_group, implementation, device) -> None:
    data = example((4, 3, 5, 2), device)
    x = data["x"].contiguous(memory_format=torch.channels_last).requires_grad_()
    parameters = [data[name].requires_grad_() for name in ("weight", "bias", "residual")]
    running = (torch.zeros(3, device=device), torch.ones(3, device=device))
    group = torch.distributed.group.WORLD.group_name
    arguments = (x, *parameters, *running, None, group, True, 0.1, 1e-5, 1, activation, False)
    torch.library.opcheck(torch.ops.fused.sync_batch_norm_fwd.default, arguments)
    with torch.no_grad():
        y, mean, rstd, signs, _, _, count = torch.ops.fused.sync_batch_norm_fwd(*arguments)
    kept = {"relu": signs, "silu": parameters[2].detach(), None: None}[activation]
    tensors = [t.detach() for t in (y, x, *parameters[:2])]
    backward = (*tensors, kept, mean, rstd, count, group, 1, activation, activation is not None)
    torch.library.opcheck(torch.ops.fused.sync_batch_norm_bwd.default, backward)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_opcheck_of_another_order_of_dimensions(half_a_group, implementation, device) -> None:
    """Neither contiguous nor channels_last: results have the strides that were promised."""
    data = example((3, 2, 4, 3), device)
    x, residual = (data[name].mT.contiguous().mT for name in ("x", "residual"))
    running = (torch.zeros(2, device=device), torch.ones(2, device=device))
    group = torch.distributed.group.WORLD.group_name
    tensors = (x, data["weight"], data["bias"], residual)
    arguments = (*tensors, *running, None, group, True, 0.1, 1e-5, 1, "silu", False)
    operators = torch.ops.fused.sync_batch_norm_fwd, torch.ops.fused.sync_batch_norm_bwd
    torch.library.opcheck(operators[0].default, arguments, test_utils="test_faketensor")
    y, mean, rstd, *_, count = operators[0](*arguments)
    backward = (y, *tensors, mean, rstd, count, group, 1, "silu", True)
    torch.library.opcheck(operators[1].default, backward, test_utils="test_faketensor")


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_opcheck_of_narrow_statistics(half_a_group, implementation, device) -> None:
    """The new ones have the dtype that was promised."""
    data = {k: v.bfloat16() for k, v in example((4, 3, 5), device).items()}
    running = (torch.zeros_like(data["bias"]), torch.ones_like(data["bias"]))
    group = torch.distributed.group.WORLD.group_name
    tensors = (data["x"], data["weight"], data["bias"], None)
    arguments = (*tensors, *running, None, group, True, 0.1, 1e-5, 1, None, False)
    operator = torch.ops.fused.sync_batch_norm_fwd.default
    torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_functional_transforms_are_refused_in_words(transform, half_a_group) -> None:
    norm, x = fused.SyncBatchNorm(3), torch.randn(2, 4, 3)
    calls = {
        "grad": lambda: torch.func.grad(lambda x: norm(x).sum())(x),
        "vmap": lambda: torch.func.vmap(norm)(x),
        "jvp": lambda: torch.func.jvp(norm, (x,), (x,)),
    }
    with pytest.raises(RuntimeError, match="SyncBatchNorm: expected no transform of torch.func"):
        calls[transform]()


GROUP = "some processes"


class OneAfterTheOther:
    """torch.distributed for processes that run in turn: what the others send, they sent before."""

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, 0
        self.sent: dict[tuple[str, int], Tensor] = {}

    def take_over(self, patch: pytest.MonkeyPatch) -> None:
        for module in (sync_batch_norm, operators):
            patch.setattr(module, "dist", self)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self, group: Any) -> int:
        assert group == GROUP
        return self.size

    def _everyones(self, what: str, own: Tensor, group: Any) -> list[Tensor]:
        assert group == GROUP
        self.sent[what, self.rank] = own.clone()
        return [self.sent.get((what, rank), own) for rank in range(self.size)]

    def all_gather(self, everyone: list[Tensor], own: Tensor, group: Any) -> None:
        for tensor, sent in zip(everyone, self._everyones("gather", own, group), strict=True):
            tensor.copy_(sent)

    def all_reduce(self, own: Tensor, group: Any) -> None:
        own.copy_(torch.stack(self._everyones("reduce", own, group)).sum(0))


# As above, and with more rows than a program of the kernels has.
MANY = ([1, 2], (3, 1, 20, 35), {"activation": "tanh", "residual": True})
IN_TURN = CASES | {"many rows": MANY, "channels_last": ([2, 1], (3, 5, 4, 6), MANY[2])}


@pytest.mark.parametrize("case", IN_TURN)
def test_equals_the_whole_batch_in_turn(case, implementation, monkeypatch, device) -> None:
    sizes, shape, options = IN_TURN[case]
    data = example(shape, device)
    if case == "channels_last":
        for name in ("x", "residual"):
            data[name] = data[name].contiguous(memory_format=torch.channels_last)
    turns = OneAfterTheOther(len(sizes))
    own = {name: value for name, value in options.items() if name != "residual"}
    # The first turn is for moments, which the second's sums take; the third has both.
    for _ in range(3):
        results = []
        with monkeypatch.context() as patch:
            turns.take_over(patch)
            for turns.rank, size in enumerate(sizes):
                begin = sum(sizes[: turns.rank])
                norm = fused.SyncBatchNorm(shape[1], process_group=GROUP, **own)
                rows = slice(begin, begin + size)
                results.append(step(norm, data, rows, options.get("residual", False)))
    check_equal_to_the_whole_batch(results, data, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_gradient_of_few_rows_beside_a_residuals(
    activation, dtype, implementation, monkeypatch, device
) -> None:
    """Two rows' gradients almost cancel: dresidual, which is dz but for its rounding, does not
    serve for the input's."""
    data = example((2, 3), device)
    data = {name: t.to(dtype) for name, t in data.items()}
    rounding = torch.finfo(dtype).eps / 2
    turns = OneAfterTheOther(2)
    with monkeypatch.context() as patch:
        turns.take_over(patch)
        for _ in range(3):
            results = []
            for turns.rank in range(2):
                norm = fused.SyncBatchNorm(3, activation=activation, process_group=GROUP)
                results.append(step(norm, data, slice(turns.rank, turns.rank + 1), True))
    wide = {name: t.double() for name, t in data.items()}
    whole = step(fused.BatchNorm1d(3, activation=activation).double(), wide, slice(None), True)
    dx = torch.cat([r["dx"] for r in results]).double()
    # A second rounding is the output's, from which relu knows its sign.
    torch.testing.assert_close(dx, whole["dx"], rtol=4 * rounding, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("compiled", [False, True])
def test_parameters_gradients_have_memory_of_their_own(
    compiled, half_a_group, implementation, device
) -> None:
    """Whoever frees or resizes one keeps the other."""
    norm = fused.SyncBatchNorm(3, device=device)
    torch.compiler.reset()
    call = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm
    call(torch.randn(4, 3, device=device)).square().sum().backward()
    storages = {p.grad.untyped_storage().data_ptr() for p in norm.parameters()}
    assert len(storages) == 2


def test_moments_of_a_batch_with_an_inf(implementation, device) -> None:
    """Also in the first row, which others are subtracted from: as torch's mean and variance are."""
    x = torch.randn(9, 3, 2, device=device)
    x[0, 1, 0] = float("inf")
    mean, m2 = backend.implementation("batch_norm", x).batch_norm_moments(x)
    expected = x.mean((0, 2))
    if implementation == "eager" and not x.is_cpu:  # where nobody may look, inf - inf
        expected[1] = float("nan")
    torch.testing.assert_close(mean, expected, equal_nan=True)
    torch.testing.assert_close(m2.float(), x.var((0, 2)) * 17, equal_nan=True)


@pytest.mark.parametrize("shape", [(33, 15), (3, 4, 15)], ids=str)
def test_moments_and_sums_of_a_part_of_wider_memory(shape, implementation, device) -> None:
    """Runs of 15 begin where 16 neighbours do; nothing is written that is shaped like them."""
    x = torch.randn(*shape[:-1], 16, device=device)[..., :15]
    kernels = backend.implementation("batch_norm", x)
    results: list[tuple[Tensor, ...]] = []
    for tensor in (x, x.contiguous()):
        mean, m2 = kernels.batch_norm_moments(tensor)
        sums, _ = kernels.batch_norm_sums(
            tensor, tensor, None, None, None, mean, m2.rsqrt(), None, False
        )
        results.append((mean, m2, sums))
    torch.testing.assert_close(*results)


def test_evaluation_and_mistakes_among_several_processes(monkeypatch) -> None:
    """Evaluation is each process's own; what is refused, is before anything is sent."""
    turns, x = OneAfterTheOther(2), torch.randn(4, 3)
    turns.take_over(monkeypatch)
    ours, theirs = fused.SyncBatchNorm(3, process_group=GROUP), nn.BatchNorm1d(3)
    for norm in (ours, theirs):
        norm.running_mean.fill_(0.5)
        torch.testing.assert_close(norm.eval()(x), (x - 0.5) / (1 + 1e-5) ** 0.5)
    ours.train()
    with pytest.raises(ValueError, match=r"expected input of shape \(N, C, ...\), got \(3,\)"):
        ours(x[0])
    with pytest.raises(RuntimeError, match="all of dtype torch.float64"):
        ours(x.double())
    with pytest.raises(RuntimeError, match="all of dtype torch.float64"):
        ours(x[:0].double())
    ours.eps = 0.0
    with pytest.raises(ValueError, match="eps must be positive"):
        ours(x)
    assert not turns.sent


OPTIONS: dict[str, dict[str, Any]] = {
    "no parameters": {"affine": False},
    "half precision": {"dtype": torch.bfloat16},
    "no buffers": {"track_running_stats": False},
    "infinity": {"skip_nonfinite": True},
    "infinity that is kept": {},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_among_several_processes(case, monkeypatch) -> None:
    """The other process has the same rows."""
    options = OPTIONS[case]
    x = torch.randn(4, 3, dtype=options.get("dtype"))
    if case.startswith("infinity"):
        x[1, 2] = torch.inf
    whole = fused.BatchNorm1d(3, **options)
    expected = whole(torch.cat((x, x)))
    turns = OneAfterTheOther(2)
    turns.take_over(monkeypatch)
    ours = fused.SyncBatchNorm(3, process_group=GROUP, **options)
    leaf = x.clone().requires_grad_()
    y = ours(leaf)
    torch.testing.assert_close(y, expected[:4], equal_nan=True)
    for a, b in zip(ours.buffers(), whole.buffers(), strict=True):
        assert b.isfinite().all() or case == "infinity that is kept"
        torch.testing.assert_close(a, b, equal_nan=True)
    y.float().square().sum().backward()
    if whole.affine:
        expected.float().square().sum().backward()
    assert leaf.grad.dtype == x.dtype
    for p, q in zip(ours.parameters(), whole.parameters(), strict=True):
        own, both = p.grad, q.grad
        assert own is not None
        torch.testing.assert_close(2 * own, both, equal_nan=True)  # each its own share


def test_alone_nothing_is_sent(monkeypatch) -> None:
    turns = OneAfterTheOther(1)
    turns.take_over(monkeypatch)
    fused.SyncBatchNorm(3, process_group=GROUP)(torch.randn(4, 3))
    assert not turns.sent


def test_alone_it_is_batch_norm(implementation, device) -> None:
    ours, theirs = fused.SyncBatchNorm(3, device=device), nn.BatchNorm2d(3, device=device)
    assert isinstance(ours, nn.modules.batchnorm._BatchNorm)
    x = torch.randn(4, 3, 5, 2, device=device)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_convert_sync_batchnorm_before_channels_are_known() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    with pytest.raises(RuntimeError, match="got a LazyBatchNorm1d; call the model once"):
        fused.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d
    model(torch.randn(4, 3))
    fused.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is fused.SyncBatchNorm


def test_convert_sync_batchnorm() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.Sequential(fused.BatchNorm2d(4, activation="relu")), nn.Linear(2, 2)
    )
    assert repr(fused.SyncBatchNorm(4, 1e-4, 0.2, True, True, None, "cpu", torch.float64)) == (
        repr(nn.SyncBatchNorm(4, 1e-4, 0.2))
    )
    parameters = list(model.parameters())
    converted = fused.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    assert type(model[0]) is fused.SyncBatchNorm and type(model[1][0]) is fused.SyncBatchNorm
    assert model[0].process_group is None and model[1][0].activation == "relu"
    fused.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(model, other := nn.BatchNorm1d(3)), 7)
    assert model[0].process_group == 7 and other.process_group == 7  # as torch
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert type(fused.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm3d(2))) is (
        fused.SyncBatchNorm
    )
