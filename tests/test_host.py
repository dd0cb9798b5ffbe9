"""The host never looks at a tensor's values: on the meta device there are none to look at.

Every .item(), nonzero() or comparison of values raises there, so what passes cannot stall a GPU.
"""

import pytest
import torch

import fused
from tests.test_backend import python
from tests.test_package import ROOT


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_cross_entropy_of_the_closed_form(kind, reduction) -> None:
    x = torch.zeros(6, 9, 2, device="meta", requires_grad=True)
    weight = torch.zeros(9, device="meta")
    target = (
        torch.zeros(6, 2, dtype=torch.int64, device="meta") if kind == "indices" else x.detach()
    )
    with fused.backend.use("eager"):
        output = fused.cross_entropy_with_stats(
            x, target, weight, reduction=reduction, label_smoothing=0.1, z_loss=0.1, softcap=3.0
        )
        (dx,) = torch.autograd.grad(output.loss, x, torch.ones_like(output.loss))
    assert dx.shape == x.shape


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_the_closed_form(training, momentum) -> None:
    norm = fused.BatchNorm2d(
        3, momentum=momentum, activation="relu", skip_nonfinite=True, device="meta"
    ).train(training)
    x = torch.zeros(2, 3, 4, 4, device="meta", requires_grad=True)
    with fused.backend.use("eager"):
        (dx,) = torch.autograd.grad(norm(x, x.detach()).sum(), x)
    assert dx.shape == x.shape


# The launchers themselves run, on tensors without values; the launches are caught, and come from
# where their tensors' device was made the current one.
LAUNCHERS = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from bench import kernels
from bench.runner import operations
from fused.kernels import batch_norm, device, mlp_step, mlp_train

guard = device.on_its_device(print).__code__
def noted(kernel, *arguments):
    frame = sys._getframe()
    while frame is not None and frame.f_code is not guard:
        frame = frame.f_back
    assert frame is not None, f"launched on whatever device is the current one: {{kernel.__name__}}"
    return Launch(kernel, *arguments)
Launch, kernels.Launch = kernels.Launch, noted

caught = []
for op in operations().values():
    for case in op.kernel_cases():
        caught += kernels.caught(op, case)
with torch.device("meta"), kernels.catch_launches() as launches:
    x = torch.zeros(9, 3, 2)
    mean, m2 = batch_norm.batch_norm_moments(x)
    sums, _ = batch_norm.batch_norm_sums(x, x, None, None, None, mean, m2, None, False)
    batch_norm.batch_norm_dx(x, x, None, None, None, mean, m2, sums, mean[0], 0, None)
    p = [torch.zeros(1, *shape) for shape in ((3, 2), (2, 5), (5, 3), (3,), (5,), (5,))]
    examples = torch.zeros(9, 1, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    for module in (mlp_train, mlp_step):
        module.mlp_train(*p, *examples, examples[0].view(1, 1, 9), torch.ones(1), 1e-5)
caught += launches
print(len(caught), *sorted({{launch.kernel.__name__ for launch in caught}}))
"""


def test_launchers() -> None:
    pytest.importorskip("triton")
    from tests.test_compiled import kernels as launched_kernels

    result = python(LAUNCHERS)
    assert result.returncode == 0, result.stderr
    count, *names = result.stdout.split()
    assert int(count) > 50
    assert set(names) == launched_kernels()


# Whole steps, of which the launchers are a part: every tensor in them is on the device.
STEPS = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import itertools
import torch
import fused
from bench import kernels
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

class OnDevice(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {{}}))
        for t in tree_leaves((args, kwargs, outputs)):
            assert not isinstance(t, torch.Tensor) or t.is_meta, f"on the host: {{function}}"
        return outputs

def floats(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

def indices(*shape):
    return torch.empty(shape, dtype=torch.int64, device="meta")

def step(call, *inputs):
    with OnDevice():
        y = call(*inputs)
        for _ in range(2):  # the second forms again what the first gave away
            torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True)

every = dict(label_smoothing=0.1, z_loss=0.1, softcap=3.0, logit_scale=0.7)
halves = torch.float16, torch.bfloat16, torch.float32
with fused.backend.use("triton"), kernels.catch_launches() as launches:
    for reduction, options in itertools.product(("mean", "none"), ({{}}, every)):
        options = options | {{"reduction": reduction}}
        for shape, dtype in itertools.product(((9, 27), (9000, 27), (3, 5, 4), (2, 8201)), halves):
            x, p = floats(*shape, dtype=dtype), floats(*shape, dtype=dtype)
            y, weight = indices(shape[0], *shape[2:]), p.detach()[0].flatten()[:shape[1]]
            step(lambda x: fused.cross_entropy(x, y, weight, **options), x)
            step(lambda x: fused.cross_entropy_with_stats(x, y, **options).loss, x)
            step(lambda x, p: fused.cross_entropy(x, p, **options), x, p)
        for classes, dtype, rows in itertools.product(((27,), (5, 3)), halves, (40, 7)):
            x, w, b = (floats(*s, dtype=dtype) for s in ((40, 8), (*classes, 8), classes))
            y, weight = indices(40, *classes[1:]), w.detach().flatten()[:classes[0]]
            budget = rows * b.numel() * dtype.itemsize
            step(lambda x, w, b: fused.linear_cross_entropy(
                x, w, y, linear_bias=b, weight=weight, memory_budget_bytes=budget, **options
            ), x, w, b)
    for shape, activation, momentum, training in itertools.product(
        ((9, 37, 2, 2), (64, 16, 56, 56)), ("relu", "gelu", None), (0.1, None), (True, False)
    ):
        norm = fused.BatchNorm2d(shape[1], momentum=momentum, activation=activation, device="meta")
        for x in (floats(*shape), floats(*shape).to(memory_format=torch.channels_last)):
            step(norm.train(training), x, floats(*shape))
print(*sorted({{launch.kernel.__name__ for launch in launches}}))
"""


def test_steps() -> None:
    """A capture refuses what lies on the host: it is copied from memory that is not pinned."""
    pytest.importorskip("triton")
    result = python(STEPS)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 9, result.stdout


# Of small calls, each way: the launches, PyTorch's operations, and how often arguments are checked.
SMALL_CALLS = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
import fused
from bench import kernels
from torch.utils._python_dispatch import TorchDispatchMode

class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        print("operation", function.overloadpacket.__name__)
        return function(*args, **(kwargs or {{}}))

module = sys.modules["fused.cross_entropy"]
check = module.check
module.check = lambda *arguments: print("check") or check(*arguments)
with torch.device("meta"), fused.backend.use("triton"), kernels.catch_launches() as launches:
    def step(call, *inputs):
        with Seen():
            y = call(*inputs)
        print("forward", *(launch.kernel.__name__ for launch in launches))
        launches.clear()
        upstream = torch.ones_like(y)
        with Seen():
            torch.autograd.grad(y, inputs, upstream)
        print("backward", *(launch.kernel.__name__ for launch in launches))
        launches.clear()

    rows, target = torch.zeros(32, 27, requires_grad=True), torch.zeros(32, dtype=torch.int64)
    step(lambda x: fused.cross_entropy(x, target), rows)
    for channels in (64, 200):
        x, residual = torch.zeros(2, 32, channels, requires_grad=True).unbind()
        step(fused.BatchNorm1d(channels, activation="tanh"), x, residual)
"""
FREE = {"empty", "empty_like", "unsqueeze", "detach", "view"}


def test_a_small_call_is_one_launch_and_nothing_else_each_way() -> None:
    """PyTorch's operations only allocate and look at memory in another way."""
    pytest.importorskip("triton")
    result = python(SMALL_CALLS)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    operations = {line.split()[1] for line in lines if line.startswith("operation")}
    assert operations <= FREE
    assert lines.count("check") == 1
    norm = ["forward _batch_norm_fwd_kernel", "backward _batch_norm_bwd_kernel"]
    expected = ["forward _cross_entropy_fwd_kernel", "backward _cross_entropy_scale_kernel"]
    assert [line for line in lines if line.split()[0] in ("forward", "backward")] == [
        *expected, *norm, *norm
    ]  # fmt: skip


# What is compiled for batches of several sizes.
SIZES = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
import fused
from bench import kernels

with torch.device("meta"), fused.backend.use("triton"), kernels.catch_launches() as launches:
    for n in (9000, 9001, 10000, 16384):
        for classes in (27, 1000, 50257):
            x, y = torch.empty(n, classes, requires_grad=True), torch.zeros(n, dtype=torch.int64)
            fused.cross_entropy(x, y).backward()
            fused.cross_entropy(x, y, ignore_index=n % 16, reduction="sum").backward()
        x = torch.empty(n, 64, requires_grad=True)
        fused.batch_norm(x, None, None, training=True).sum().backward()
sources = [(l.kernel.__name__, *l.specialised(kernels.TARGETS["sm_90"])) for l in launches]
found = {{(name, source.hash(), str(options)) for name, source, options in sources}}
print(*sorted(name for name, *_ in found))
"""


def test_a_batch_of_another_size_compiles_nothing() -> None:
    pytest.importorskip("triton")
    result = python(SIZES)
    assert result.returncode == 0, result.stderr
    names = result.stdout.split()
    counts = {name.strip("_").removesuffix("_kernel"): names.count(name) for name in names}
    assert counts == {
        "cross_entropy_fwd": 6,  # three numbers of classes, mean and sum
        "cross_entropy_count": 1,
        "cross_entropy_sum": 2,
        "cross_entropy_scale": 2,  # whether 16 divides the number of logits
        "batch_norm_moments": 1,
        "batch_norm_fwd": 1,
        "batch_norm_sums": 1,
        "batch_norm_bwd": 1,
    }


# The launch gets a copy of it; writing that back is what has no meaning here.
COUNTER_ON_THE_HOST = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
import fused
from bench import kernels

norm = fused.BatchNorm1d(3, device="meta")
norm.num_batches_tracked = torch.tensor(0)
with fused.backend.use("triton"), kernels.catch_launches() as launches:
    try:
        norm(torch.empty(9, 3, device="meta"))
    except NotImplementedError as error:
        print(error)
print(*(launch.arguments["tracked_ptr"].device for launch in launches))
"""


def test_a_kernel_gets_no_memory_of_the_host() -> None:
    pytest.importorskip("triton")
    result = python(COUNTER_ON_THE_HOST)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["Cannot copy out of meta tensor; no data!", "meta"]
