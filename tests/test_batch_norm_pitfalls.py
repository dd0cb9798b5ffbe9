"""Where widely used batch norms were found wrong: one test, or a few, for each failure."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fused
from fused.eager import batch_norm as eager
from tests.exactness import negated, same_bits, skip_without_memory
from tests.graphs import check_replay
from tests.test_batch_norm import (
    ACTIVATIONS,
    check_against_torch,
    directly,
    example,
    run,
    small_chunks,  # noqa: F401
    torchs,
)


def test_one_value_per_channel_is_refused(implementation, device) -> None:
    """A clear error in training, not NaN; evaluation takes it."""
    for shape in ((1, 3), (1, 3, 1, 1)):
        t = example(shape, torch.float32, device)
        with pytest.raises(ValueError, match="one value has no variance"):
            fused.batch_norm(**t, training=True)
        assert fused.batch_norm(**t, training=False).isfinite().all()
    t = example((1, 3, 2), torch.float32, device)
    assert fused.batch_norm(**t, training=True).isfinite().all()


@pytest.mark.parametrize("shape", [(2000, 3), (9000, 2), (2, 3, 96, 100)], ids=str)
@pytest.mark.parametrize("correction", [0, 1])
def test_large_offset(correction, shape, implementation, device) -> None:
    """Mean 1e4, standard deviation 1, float32: the variance is right to 1e-3 and no worse than
    torch's (E[x^2] - E[x]^2 would be off by all of it)."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    x = x.to(device, torch.float32)
    dims = [0, *range(2, len(shape))]
    exact = x.double().var(dims)
    errors = []
    for function in (fused.batch_norm, F.batch_norm):
        mean, var = torch.zeros(2, shape[1], device=device).unbind()
        extra = {"correction": correction} if function is fused.batch_norm else {}
        y = function(x, mean, var, training=True, momentum=1.0, **extra)
        errors.append(((var.double() - exact) / exact).abs().max().item())
        if function is fused.batch_norm:
            expected = x.double() - x.double().mean(dims, keepdim=True)
            expected /= x.double().var(dims, correction=correction, keepdim=True).sqrt()
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=5e-5)
    assert errors[0] <= 1e-3
    assert errors[0] <= errors[1] + 1e-6


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_offset_of_a_small_batch(offset, implementation, device) -> None:
    """Where PyTorch's own operations may serve: their mean is off by 7e-3 here."""
    x = (torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) + offset).to(device)
    y = fused.batch_norm(x, None, None, training=True)
    exact = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=5e-5)


@pytest.mark.parametrize("shape, offset", [((2000, 3), 1000.0), ((2**19, 1), 12.0)], ids=str)
@pytest.mark.parametrize("correction", [0, 1])
def test_large_offset_in_half_precision(correction, shape, offset, device) -> None:
    """Sums of float32 lose what is far from 0, or of very many: nothing of it shows on the CPU,
    where PyTorch's own kernel may serve."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) + offset).to(device, torch.float16)
    exact_var, exact_mean = torch.var_mean(x.double(), 0)
    mean, var = torch.zeros(2, shape[1], device=device).unbind()
    with fused.backend.use("eager"):
        y = fused.batch_norm(x, mean, var, training=True, momentum=1.0, correction=correction)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)
    std = torch.std(x.double(), 0, correction=correction)
    expected = ((x.double() - exact_mean) / std).half()
    torch.testing.assert_close(y, expected, rtol=2**-10, atol=1e-4)


def test_constant_channel(implementation, device) -> None:
    x = torch.full((32, 3, 5), 7.0, device=device, requires_grad=True)
    y = fused.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=0)
    y.backward(torch.randn_like(y))
    assert x.grad.isfinite().all()


def test_values_near_1e30(implementation, device) -> None:
    """The closed form keeps such a variance in float64. In the kernels it overflows in float32, as
    in torch's: the output is the bias then, not NaN."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).to(device) * 1e30
    y = fused.batch_norm(x, None, None, training=True)
    if implementation == "eager" and device.type == "cpu":
        exact = F.batch_norm(x.double(), None, None, training=True)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-6)
    else:
        torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=0)


def test_values_near_1e30_in_half_precision(implementation, device) -> None:
    """Of which the variance that PyTorch's kernel finds is inf: its output would be 0."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 3, generator=generator) * 1e30).to(device, torch.bfloat16)
    y = fused.batch_norm(x, None, None, training=True)
    exact = F.batch_norm(x.double(), None, None, training=True)
    # The kernels, which have no float64 here, know that it overflowed.
    expected = exact if implementation == "eager" and device.type == "cpu" else exact * 0
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-9)


def test_bessels_correction_has_its_own_gradient(implementation, device) -> None:
    """n/(n-1) in the third term: against autograd through torch.var(correction=1)."""
    t = example((5, 3, 2), torch.float64, device)
    upstream = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0)).to(t["input"])

    def composed(input, running_mean, running_var, weight, bias, **_) -> Tensor:
        mean = input.mean((0, 2), keepdim=True)
        var = input.var((0, 2), correction=1, keepdim=True)
        shape = (1, -1, 1)
        return (input - mean) / (var + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)

    ours = run(fused.batch_norm, t, upstream, training=True, correction=1)
    theirs = run(composed, t, upstream)
    for name in ("output", "dinput", "dweight", "dbias"):
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2)], ids=str)
def test_evaluation_has_its_own_gradient(shape, correction, implementation, device) -> None:
    """Frozen statistics do not depend on the input: dx = weight * rstd * dy, element by element."""
    t = example(shape, torch.float32, device)
    x = t["input"].requires_grad_()
    y = fused.batch_norm(**t, training=False, correction=correction)
    upstream = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, upstream)
    slope = (t["weight"] * (t["running_var"] + 1e-5).rsqrt()).view(1, -1, *[1] * (x.dim() - 2))
    torch.testing.assert_close(dx, upstream * slope)


HUGE = [
    (65536, 2),
    pytest.param((100000, 32), marks=pytest.mark.slow),
    pytest.param((125000, 50), marks=pytest.mark.slow),
    pytest.param((160000, 256), marks=pytest.mark.slow),
    pytest.param((131071, 3), marks=pytest.mark.slow),
    pytest.param((880802, 1), marks=pytest.mark.slow),
    pytest.param((1000003, 1), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("shape", [(131071, 3), (880802, 1), (1000003, 1), (100000, 32)], ids=str)
def test_very_many_rows_on_the_cpu(shape) -> None:
    """The same, without the interpreter, which takes long."""
    test_very_many_rows(shape, "eager", "cpu")


@pytest.mark.parametrize("shape", HUGE, ids=str)
def test_very_many_rows(shape, implementation, device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device).requires_grad_()
    y = fused.batch_norm(x, None, None, training=True)
    upstream = torch.randn(shape, generator=generator).to(device)
    (dx,) = torch.autograd.grad(y, x, upstream)
    exact = x.detach().double().requires_grad_()
    expected = F.batch_norm(exact, None, None, training=True)
    (dexpected,) = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(dx.double(), dexpected, rtol=0, atol=5e-6)


ODD = [(9, 1), (9, 3), (5, 65), (3, 1000), (2, 4097), (2, 3, 30, 30), (4, 5, 7, 7), (4, 5, 1)]


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_channels_and_sizes_that_are_no_powers_of_two(shape, implementation, device) -> None:
    check_against_torch(example(shape, torch.float32, device), implementation, training=True)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_few_channels_with_many_values(channels_last, implementation, device) -> None:
    """Several programs share a channel; their results are merged in a fixed order: two runs are
    equal to the last bit, and right."""
    t = example((3, 2, 64, 96), torch.float32, device, residual=True)
    if channels_last:
        for name in ("input", "residual"):
            t[name] = t[name].contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(t["input"])
    results = [
        run(fused.batch_norm, t, upstream, training=True, activation="tanh") for _ in range(2)
    ]
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=0)
    check_against_torch(t, implementation, training=True, activation="tanh")


def test_gain_gradient_with_a_large_offset(implementation, device) -> None:
    """dgamma is the sum of xhat * dy, in which the mean is gone, not what is left of sums of x * dy
    and dy: against float64, with a mean of 100 and a standard deviation of 1e-2."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(512, 3, generator=generator) * 1e-2 + 100).to(device)
    weight = torch.ones(3, device=device, requires_grad=True)
    upstream = torch.randn(512, 3, generator=generator).to(device)
    y = fused.batch_norm(x, None, None, weight, training=True)
    (dweight,) = torch.autograd.grad(y, weight, upstream)
    xhat = F.batch_norm(x.double(), None, None, training=True)
    # The saved mean is rounded to float32, to within 2**-18 at 100: a shift of all of xhat.
    bound = 2**-18 / 1e-2 * upstream.double().sum(0).abs() + 1e-3
    assert ((dweight.double() - (xhat * upstream).sum(0)).abs() <= bound).all()


def test_gradients_share_no_memory(implementation, device) -> None:
    """Whoever writes to one, or keeps one, has that one."""
    leaves = [torch.randn(s, device=device).requires_grad_() for s in ((4, 3, 5), (3,), (3,))]
    y = fused.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True)
    gradients = torch.autograd.grad(y.square().sum(), leaves)
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == 3


def test_input_is_never_changed(implementation, device) -> None:
    for activation in ACTIVATIONS:
        t = example((33, 5), torch.float32, device, residual=True)
        before = {name: t[name].clone() for name in ("input", "residual", "weight", "bias")}
        t["input"].requires_grad_()
        fused.batch_norm(**t, training=True, activation=activation).square().sum().backward()
        for name, tensor in before.items():
            torch.testing.assert_close(t[name].detach(), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_without_weight_or_bias(missing, training, implementation, device) -> None:
    t = example((9, 3, 2), torch.float32, device) | dict.fromkeys(missing)
    check_against_torch(t, implementation, training=training, activation="silu")


def test_without_running_statistics(implementation, device) -> None:
    t = example((9, 3, 2), torch.float32, device) | {"running_mean": None, "running_var": None}
    check_against_torch(t, implementation, training=True)


def test_negative_momentum(implementation, device) -> None:
    t = example((9, 3, 2), torch.float32, device)
    check_against_torch(t, implementation, training=True, momentum=-1.2)


def test_cumulative_average_does_not_look_at_the_counter(implementation, device) -> None:
    """momentum=None divides by num_batches_tracked where it lies. (On a GPU a look would stall.)"""
    module = fused.BatchNorm1d(3, momentum=None, device=device)
    batches = torch.randn(4, 9, 3, device=device)
    for batch in batches:
        module(batch)
    torch.testing.assert_close(module.running_mean, batches.mean((0, 1)))
    assert module.num_batches_tracked == 4


@pytest.mark.parametrize("shape", [(20, 6), (3, 6, 20, 20)], ids=str)
@pytest.mark.parametrize("training, momentum", [(True, 0.1), (True, None), (False, 0.1)])
def test_no_host_synchronisation(training, momentum, shape, device) -> None:
    """The whole step is captured in a CUDA graph, which forbids them, and replayed."""
    kind = fused.BatchNorm1d if len(shape) == 2 else fused.BatchNorm2d
    module = kind(6, momentum=momentum, activation="relu", skip_nonfinite=True, device=device)
    module.train(training)
    x, residual = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))

    def step() -> tuple[Tensor, ...]:
        y = module(x, residual)
        return y, *torch.autograd.grad(y.square().sum(), (x, residual, *module.parameters()))

    check_replay(step, [x, residual, *module.parameters(), *module.buffers()])


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last in memory": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "batch last in memory": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "batch before the channels": lambda x: (
        x.movedim((0, 1), (-2, -1)).contiguous().movedim((-2, -1), (0, 1))
    ),
    "sliced channels": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "a part, transposed": lambda x: F.pad(x.mT, (0, 1))[..., :-1].mT,
    "one channel expanded": lambda x: x[:, :1].expand_as(x),
    "one channel alone expanded": lambda x: x[:, :1].contiguous().expand_as(x),
    "pointer off by one": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [(33, 5), (4, 5, 6), (3, 5, 2, 4)], ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides_of_input_and_gradient(
    strides, shape, training, implementation, device
) -> None:
    t = example(shape, torch.float32, device)
    x = STRIDES[strides](t["input"])
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    ours = run(fused.batch_norm, t | {"input": x}, STRIDES[strides](upstream), training=training)
    contiguous = STRIDES[strides](upstream).contiguous()
    theirs = run(F.batch_norm, t | {"input": x.contiguous()}, contiguous, training=training)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5)
    if "memory" in strides or strides in ("transposed", "batch before the channels"):
        assert ours["output"].stride() == x.stride()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("strides", STRIDES)
def test_what_follows_may_overwrite_the_output(strides, training, implementation, device) -> None:
    """Of grey images, expanded, by ReLU(inplace=True), say."""
    x = torch.randn(2, 3, 4, 5, device=device)
    x = STRIDES[strides](x).detach().requires_grad_()
    gradients = []
    for module in (fused.BatchNorm2d(3, device=device), nn.BatchNorm2d(3, device=device)):
        y = module.train(training)(x)
        assert not y._is_view()
        gradients += torch.autograd.grad(y.relu_().square().sum(), x)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
@pytest.mark.parametrize("shape", [(33, 5), (4, 5, 6), (3, 5, 2, 4), (3, 5, 1, 4), (2, 5, 2, 3, 2)])
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides_in_half_precision(strides, shape, activation, dtype, device) -> None:
    """On the CPU, where PyTorch's own kernels may serve: of other strides, input's or the
    gradient's, their backward is wrong."""
    t = example(shape, dtype, device)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    options = {"training": True, "activation": activation, "correction": 1}
    exact = {name: value.double().contiguous() for name, value in t.items()}
    x = STRIDES[strides](t["input"])
    exact["input"] = x.double().contiguous()
    with fused.backend.use("eager"):
        for change in (STRIDES[strides], lambda t: t):
            dy = change(upstream)
            ours = run(fused.batch_norm, t | {"input": x}, dy, **options)
            expected = run(fused.batch_norm, exact, dy.double().contiguous(), **options)
            for name, value in expected.items():
                eps = torch.finfo(ours[name].dtype).eps
                error = (ours[name].double() - value).abs().max() / value.abs().max()
                assert error < max(4 * eps, 1e-5), f"{name}: {error:.3g}"


UNUSUAL = {
    "an image whose channels are last": lambda x: x[:1].movedim(1, -1).contiguous().movedim(-1, 1),
    "one of a batch": lambda x: x.to(memory_format=torch.channels_last)[1].unsqueeze(0),
    "a column": lambda x: x[..., :1].transpose(1, 2).contiguous().transpose(1, 2),
    "contiguous": lambda x: x[:1].contiguous().as_strided(x[:1].shape, (7, *x.stride()[1:])),
}


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
@pytest.mark.parametrize("layout", UNUSUAL)
def test_unusual_strides_of_sizes_of_1_in_half_precision(
    layout, activation, implementation, device
) -> None:
    """PyTorch's CPU kernels take such input for one format in the forward and for another in the
    backward, and their dx is another tensor's then."""
    t = example((2, 6, 11, 5), torch.bfloat16, device)
    t["input"] = UNUSUAL[layout](t["input"])
    packed = torch.stack((t["weight"], t["bias"]), 1)
    t["weight"], t["bias"] = packed.unbind(1)  # not contiguous
    upstream = torch.randn(t["input"].shape, device=device, dtype=torch.bfloat16)
    exact = {name: value.double().contiguous() for name, value in t.items()}
    for dy in (upstream, upstream.to(memory_format=torch.channels_last)):
        ours = run(fused.batch_norm, t, dy, training=True, activation=activation)
        theirs = run(directly, exact, dy.double(), training=True, activation=activation)
        for name in ("output", "dinput", "dweight", "dbias"):
            error = (ours[name].double() - theirs[name]).abs().max() / theirs[name].abs().max()
            assert error < (1e-5 if ours[name].dtype == torch.float32 else 0.02), (name, error)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_half_precision_takes_pytorchs_kernels(activation) -> None:
    """Of our passes over float32 chunks they are a third; nothing after them rounds once more."""
    t = example((2000, 5), torch.bfloat16, "cpu")
    x = t["input"].requires_grad_()
    with fused.backend.use("eager"), Operations() as operations:
        fused.batch_norm(**t, training=True, activation=activation).sum().backward()
    assert {"native_batch_norm.default", "native_batch_norm_backward.default"} <= operations.names
    assert x.grad is not None and not {n for n in operations.names if n.startswith("addcmul")}


@pytest.mark.parametrize("activation", [None, "relu", "tanh", "silu"])
@pytest.mark.parametrize("shape", [(2**18, 2), (64, 2, 64, 64)], ids=str)
def test_half_precision_of_channels_that_hardly_vary(shape, activation) -> None:
    """PyTorch's sums of them are off by many standard deviations, whatever eps hides."""
    x = torch.full(shape, 0.05)
    x[:, 1] = 0.045 + 1e-4 * torch.randn(x[:, 1].shape)
    x = x.bfloat16()
    if len(shape) > 2:
        x = x.to(memory_format=torch.channels_last)
    rows = [d for d in range(x.dim()) if d != 1]
    mean, var = torch.zeros(2), torch.ones(2)
    with fused.backend.use("eager"):
        y = fused.batch_norm(x, mean, var, training=True, momentum=1.0, activation=activation)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean(rows), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var(rows), rtol=1e-5, atol=1e-12)
    assert not y.select(1, 0).any()


@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [2, 3, 4, 16, 1024])
def test_half_precision_dx_is_as_exact_as_torchs(n, dtype, activation) -> None:
    """Though dz waits in dx's memory, where that rounds it to no harm."""
    t = example((n, 4096 // n), dtype, "cpu")
    upstream = torch.randn(n, 4096 // n, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = {"training": True, "activation": activation}
    exact = run(directly, {k: v.double() for k, v in t.items()}, upstream.double(), **options)
    with fused.backend.use("eager"):
        ours = run(fused.batch_norm, t, upstream, **options)
    theirs = run(torchs, t, upstream, **options)
    error, allowed = (
        ((found["dinput"].double() - exact["dinput"]).norm() / exact["dinput"].norm()).item()
        for found in (ours, theirs)
    )
    assert error <= max(1.05 * allowed, torch.finfo(dtype).eps / 4)


def test_float16_dz_beyond_its_range() -> None:
    """dx is within it: rstd is small."""
    x = (torch.randn(256, 4, generator=torch.Generator().manual_seed(0)) * 1e3).half()
    dy = torch.where(x > 0, 6.4e4, -6.4e4).half()
    t = {"input": x, "running_mean": None, "running_var": None}
    exact = run(directly, {"input": x.double()} | dict.fromkeys(("running_mean", "running_var")),
                dy.double(), training=True, activation="silu")  # fmt: skip
    with fused.backend.use("eager"):
        ours = run(fused.batch_norm, t, dy, training=True, activation="silu")
    assert ours["dinput"].isfinite().all()
    error = (ours["dinput"].double() - exact["dinput"]).abs().max() / exact["dinput"].abs().max()
    assert error < 1e-3


@pytest.mark.parametrize("residual", [False, True])
def test_an_activation_of_bfloat16_is_differentiated_once(residual, monkeypatch) -> None:
    """A chunk of z is formed in the forward, and once in the backward: dz waits in dx's memory."""
    t = example((2000, 8), torch.bfloat16, "cpu", residual=residual)
    x = t["input"].requires_grad_()
    with fused.backend.use("eager"), Operations() as forward:
        y = fused.batch_norm(**t, training=True, activation="tanh")
    calls: list[Tensor] = []

    def tanh_(z: Tensor) -> Tensor:
        calls.append(z)
        return z.tanh_()

    monkeypatch.setattr(eager, "tanh_by_sigmoid_", tanh_)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x)
    assert dx.isfinite().all() and len(calls) == 1
    assert "batch_norm_update_stats.default" in forward.names


WIDER = {
    "rows": lambda x: F.pad(x, (0, 1))[..., :-1],
    "channels": lambda x: F.pad(x, (0, 0) * (x.dim() - 2) + (0, 1))[:, :-1],
    "channels last": lambda x: F.pad(x.movedim(1, -1), (0, 1))[..., :-1].movedim(-1, 1),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("which", ["input", "residual", "gradient"])
@pytest.mark.parametrize("shape", [(33, 16), (3, 4, 16)], ids=str)
@pytest.mark.parametrize("wider", WIDER)
def test_a_part_of_wider_memory(wider, shape, which, implementation, device) -> None:
    """Of 16 neighbours, which begin where 16 do in the other tensors, but not in this."""
    t = example(shape, torch.float32, device, residual=True)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    options = {"training": True, "activation": "silu"}
    expected = run(fused.batch_norm, t, upstream, **options)
    if which == "gradient":
        upstream = WIDER[wider](upstream)
    else:
        t[which] = WIDER[wider](t[which])
    ours = run(fused.batch_norm, t, upstream, **options)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5)


def test_channels_last_input_with_a_contiguous_gradient(implementation, device) -> None:
    """With a height of 1 the two formats look alike; PyTorch 2.13's CPU backward mixes them up and
    is wrong by the size of the gradient."""
    x = torch.randn(2, 2, 1, 2, device=device).permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    upstream = torch.randn(2, 2, 1, 2, device=device)
    mean, var, weight = torch.zeros(2, device=device), torch.ones(2, device=device), None
    weight = torch.tensor([2.0, 3.0], device=device)
    y = fused.batch_norm(x.requires_grad_(), mean, var, weight, eps=1e-12)
    (dx,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(dx, upstream * weight.view(1, 2, 1, 1))


@pytest.mark.parametrize("shape", [(9, 5), (9, 5, 2)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_strides_of_what_belongs_to_channels(training, shape, implementation, device) -> None:
    """Columns of a matrix, and one number for all channels, serve as weight, bias and statistics;
    what is beside the running ones stays as it is. PyTorch 2.13's CPU backward takes no notice of
    the weight's stride."""
    t = example(shape, torch.float32, device)
    columns = torch.stack([t["running_mean"], t["running_var"], t["weight"]], 1)
    one = torch.full((1,), 2.0, device=device)
    mean, var, weight = columns.unbind(1)
    contiguous = t | {"bias": one.repeat(5)}
    strided = t | {"running_mean": mean, "running_var": var, "weight": weight.requires_grad_()}
    dx = []
    for tensors in (contiguous, strided | {"bias": one.expand(5)}):
        x = t["input"].clone().requires_grad_()
        y = fused.batch_norm(**tensors | {"input": x}, training=training, activation="tanh")
        dx.append(torch.autograd.grad(y, x, t["input"])[0])
    torch.testing.assert_close(*dx, rtol=1e-4, atol=1e-5)
    expected = [t[name] for name in ("running_mean", "running_var", "weight")]
    torch.testing.assert_close(columns, torch.stack(expected, 1))


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_negated_views(training, activation, implementation, device) -> None:
    """Of everything that goes in and of the upstream gradient, and running statistics in one."""
    tensors = example((9, 5, 2), torch.float32, device, residual=True)

    def run(convert) -> list[Tensor]:
        t = {name: convert(tensor) for name, tensor in tensors.items()}
        leaves = [t[name].requires_grad_() for name in ("input", "weight", "bias", "residual")]
        y = fused.batch_norm(**t, training=training, activation=activation)
        upstream = convert(torch.linspace(-1, 1, y.numel(), device=device).view(y.shape))
        gradients = torch.autograd.grad(y, leaves, upstream)
        return [y, *gradients, t["running_mean"], t["running_var"]]

    torch.testing.assert_close(run(negated), run(torch.clone), **same_bits(device))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_weight_and_bias_of_other_shapes(training, implementation, device) -> None:
    """As torch takes them, where there are as many numbers as channels; with a gradient besides."""
    t = example((9, 5), torch.float32, device)
    row, column = t["weight"].view(1, 5).requires_grad_(), t["bias"].view(5, 1)
    plain = {name: tensor.clone() for name, tensor in t.items()}
    y = fused.batch_norm(**t | {"weight": row, "bias": column}, training=training)
    torch.testing.assert_close(y, fused.batch_norm(**plain, training=training), rtol=0, atol=0)
    arguments = {k: v for k, v in t.items() if k != "residual"}
    with torch.no_grad():
        torchs = F.batch_norm(**arguments | {"weight": row, "bias": column}, training=training)
        ours = fused.batch_norm(**arguments | {"weight": row, "bias": column}, training=training)
    torch.testing.assert_close(ours, torchs)
    (gradient,) = torch.autograd.grad(y, row, torch.ones_like(y))
    assert gradient.shape == (1, 5)


def test_gradient_of_stride_0(implementation, device) -> None:
    """`.sum()` sends back one number with stride 0: the sum's gradient is 0 but for rounding."""
    t = example((33, 5, 2), torch.float32, device)
    x = t["input"].requires_grad_()
    fused.batch_norm(**t, training=True).sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-6)


INF = float("inf")
# What is bad, and in which row: the first is what others are subtracted from.
BAD = [
    *[(INF, shape, 0) for shape in ((9, 3), (9, 3, 2), (2, 3, 90, 50))],
    *[(-INF, (9, 3, 2), 4), (INF, (9, 3), 4), (float("nan"), (9, 3, 2), 4)],
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.float32], ids=str)
def test_counters_of_other_dtypes(dtype, implementation, device) -> None:
    """Of a state_dict in half precision, loaded with assign=True, say."""
    norm = fused.BatchNorm1d(3, momentum=None, device=device)
    norm.num_batches_tracked = torch.zeros((), dtype=dtype, device=device)
    batches = torch.randn(4, 9, 3, device=device)
    for batch in batches:
        norm(batch)
    assert norm.num_batches_tracked == 4 and norm.num_batches_tracked.dtype == dtype
    torch.testing.assert_close(norm.running_mean, batches.mean((0, 1)))


@pytest.mark.cuda
def test_a_counter_on_another_device(implementation, device) -> None:
    """On the CPU, where load_state_dict(assign=True) puts one that the checkpoint has not."""
    x = torch.randn(9, 3, device=device)
    for momentum in (0.1, None):
        norm = fused.BatchNorm1d(3, momentum=momentum, device=device)
        norm.num_batches_tracked = torch.tensor(3)
        norm(x)
        assert norm.num_batches_tracked == 4
        torch.testing.assert_close(norm.running_mean, x.mean(0) * (momentum or 0.25))


def test_a_momentum_that_is_a_tensor(implementation, device) -> None:
    t = example((9, 3), torch.float32, device)
    check_against_torch(t, implementation, training=True, momentum=torch.tensor(0.25))


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_running_statistics_of_half_precision_are_rounded_once(
    momentum, implementation, device
) -> None:
    """A step's roundings add up, more of them where the momentum is small."""
    torch.manual_seed(0)
    ours, theirs = (
        module(8, momentum=momentum, device=device).half()
        for module in (fused.BatchNorm1d, nn.BatchNorm1d)
    )
    exact = nn.BatchNorm1d(8, momentum=momentum, device=device).double()
    for _ in range(60):
        x = torch.randn(4, 8, 6, device=device).half() * 2 + 1
        for module in (ours, theirs, exact):
            module(x.to(module.running_mean.dtype))
    for name in ("running_mean", "running_var"):
        errors = [
            (m.get_buffer(name) - exact.get_buffer(name)).abs().mean() for m in (ours, theirs)
        ]
        assert errors[0] <= 1.1 * errors[1], name


@pytest.mark.parametrize("shape", [(9, 3), (9, 3, 2)], ids=str)
def test_a_running_variance_that_overflowed_stays_inf(shape, implementation, device) -> None:
    norm = fused.BatchNorm1d(3, device=device)
    norm.running_var.fill_(float("inf"))
    norm(torch.randn(shape, device=device))
    assert norm.running_var.isinf().all() and norm.running_mean.isfinite().all()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_bias_that_is_updated_before_the_backward(
    compiled, training, implementation, device
) -> None:
    """As an optimizer does between two backwards through one graph. Torch's batch norm does not
    keep it, and without an activation nothing is computed from it."""
    torch.compiler.reset()
    found: list[list[Tensor]] = []
    for module in (fused.BatchNorm1d, nn.BatchNorm1d):
        torch.manual_seed(0)
        norm = module(3, device=device).train(training)
        call: Any = torch.compile(norm, backend="aot_eager") if compiled else norm
        x = torch.randn(5, 3, 2, device=device, requires_grad=True)
        y = call(x)
        with torch.no_grad():
            norm.bias.add_(1)
        again = not compiled  # AOTAutograd has no second derivatives
        leaves = [x, *norm.parameters()]
        found += [list(torch.autograd.grad(y, leaves, x.detach(), create_graph=again))]
        if again:
            found[-1].extend(torch.autograd.grad(found[-1][1].square().sum(), x))
    torch.testing.assert_close(*found)


def test_an_empty_batch_under_torch_func(implementation, device) -> None:
    """The running statistics stay as they are, as outside of it."""
    norm = fused.BatchNorm1d(3, device=device)
    buffers = {name: t.clone() for name, t in norm.named_buffers()}

    def loss(x: Tensor, buffers: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(norm, buffers, x).sum(), dict(buffers)

    x = torch.empty(0, 3, device=device)
    _, after = torch.func.grad(loss, has_aux=True)(x, buffers)
    with forward_ad.dual_level():
        norm(x)
    for found in (after, dict(norm.named_buffers())):
        assert found["num_batches_tracked"] == 1
        assert found["running_mean"].eq(0).all() and found["running_var"].eq(1).all()


def test_skip_init(device) -> None:
    norm = torch.nn.utils.skip_init(fused.BatchNorm1d, 3, correction=1, device=device)
    assert norm.correction == 1 and norm.weight.shape == (3,)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4)], ids=str)
def test_a_momentum_that_is_a_bool(shape, implementation, device) -> None:
    """A number, as to torch."""
    t = example(shape, torch.float32, device)
    check_against_torch(t, implementation, training=True, momentum=True)


def test_skips_a_variance_that_overflows(implementation, device) -> None:
    """Of finite numbers: it is inf in float32."""
    norm = fused.BatchNorm1d(2, skip_nonfinite=True, device=device)
    norm(torch.tensor([[1.0, 1e30], [2.0, -1e30], [4.0, 0.0]], device=device))
    assert norm.running_var[1] == 1 and norm.running_var[0] != 1


@pytest.mark.parametrize("bad, shape, row", BAD, ids=str)
def test_batch_with_an_inf_or_nan(bad, shape, row, implementation, device) -> None:
    """Running statistics are poisoned for good, as torch's, unless such channels are skipped."""
    t = example(shape, torch.float32, device)
    t["input"].select(1, 1).view(shape[0], -1)[row, 0] = bad
    before = {name: t[name].clone() for name in ("running_mean", "running_var")}
    skipped = {k: v.clone() for k, v in t.items()}
    theirs = {k: v.clone().cpu() for k, v in t.items()}
    fused.batch_norm(**t, training=True)
    fused.batch_norm(**skipped, training=True, skip_nonfinite=True)
    F.batch_norm(**theirs, training=True)
    for name, old in before.items():
        expected = theirs[name].to(device)
        if implementation == "eager" and device.type != "cpu":  # where nobody may look, inf - inf
            expected = expected.where(expected.isfinite(), torch.nan)
        torch.testing.assert_close(t[name], expected, equal_nan=True)
        assert skipped[name][1] == old[1]
        torch.testing.assert_close(skipped[name][::2], t[name][::2], rtol=0, atol=0)
        assert (skipped[name][::2] != old[::2]).all()


class Operations(TorchDispatchMode):
    """Names of torch's operations"""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(9, 3), (3, 2, 40, 70)], ids=str)
def test_batches_are_counted_by_the_same_kernel(shape, momentum, implementation, device) -> None:
    module = fused.BatchNorm1d if len(shape) == 2 else fused.BatchNorm2d
    norm = module(shape[1], momentum=momentum, device=device)
    x = torch.randn(shape, device=device)
    with Operations() as operations:
        for _ in range(3):
            norm(x)
        norm.eval()(x)
    assert norm.num_batches_tracked == 3
    if implementation == "triton":
        assert not any(name.startswith("add") for name in operations.names)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_empty_batches_are_counted(momentum, implementation, device) -> None:
    """As torch counts them."""
    ours, theirs = (
        module(3, momentum=momentum, device=device)
        for module in (fused.BatchNorm1d, nn.BatchNorm1d)
    )
    for rows in (0, 2, 0):
        x = torch.arange(3.0 * rows, device=device).view(rows, 3)
        torch.testing.assert_close(ours(x), theirs(x))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_empty_batch(training, shape, implementation, device) -> None:
    t = example(shape, torch.float32, device, residual=True)
    before = t["running_mean"].clone()
    results = run(
        fused.batch_norm, t, torch.zeros(shape, device=device), training=training, activation="relu"
    )
    assert results["output"].shape == results["dinput"].shape == shape
    torch.testing.assert_close(results["dweight"], torch.zeros(3, device=device))
    torch.testing.assert_close(results["running_mean"], before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_empty_batch_of_another_dtype(training, dtype, implementation, device) -> None:
    """Torch takes any; there is nothing to compute."""
    for module in (fused.BatchNorm1d, nn.BatchNorm1d):
        for parameters in (torch.float16, torch.float32, torch.float64):
            norm = module(3, device=device, dtype=parameters).train(training)
            x = torch.empty(0, 3, dtype=dtype, device=device, requires_grad=True)
            y = norm(x)
            y.sum().backward()
            assert y.dtype == x.grad.dtype == dtype
            assert norm.weight.grad.dtype == norm.running_var.dtype == parameters
            assert not norm.weight.grad.any() and not norm.running_mean.any()


# How far apart rows, images, positions or channels lie, one of which begins at element 2**31, or a
# tile of which does.
FAR = [
    ((3, 5), (2**30, 1)),
    ((3, 5), (1, 2**29)),
    ((2050, 5), (2**20, 1)),
    ((3, 2, 3), (2**30, 4, 1)),
    ((2050, 2, 3), (2**20, 4, 1)),
    ((3, 2, 3), (8, 1, 2**30)),
    ((3, 2, 2050), (8, 1, 2**20)),
]


@pytest.mark.interpreted("the emulator copies a tensor's whole storage, here 4 GiB")
@pytest.mark.parametrize("shape, strides", FAR, ids=str)
def test_offsets_beyond_2_to_the_31(shape, strides, device) -> None:
    check_far_apart(shape, strides, device)


def check_far_apart(shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> None:
    """In 4 GiB of memory; what lies between the values is never touched."""
    pytest.importorskip("triton")
    order = sorted(range(len(shape)), key=strides.__getitem__, reverse=True)
    *sizes, last = (shape[d] for d in order)
    # With room between the rows, as all of these have it: else several would be read as one.
    near = torch.randn(*sizes, last // 16 * 16 + 16, generator=torch.Generator().manual_seed(0))
    near = near.half().to(device)[..., :last]
    near = near.permute([order.index(d) for d in range(len(shape))])
    if device.type == "cuda":  # elsewhere untouched memory is none
        skip_without_memory(5, device)
    try:
        memory = torch.UntypedStorage(2 * (2**31 + 2**22), device=device)
    except RuntimeError:
        pytest.skip("4 GiB of memory are not to be had")
    far = torch.tensor([], dtype=torch.float16, device=device)
    far.set_(memory, 0, shape, strides).copy_(near)
    results = []
    with fused.backend.use("triton"):
        for t in (far, near):
            leaf = t.detach().requires_grad_()
            y = fused.batch_norm(leaf, None, None, training=True, activation="silu", residual=t)
            results.append((y, *torch.autograd.grad(y, leaf, t)))  # an upstream gradient like it
    torch.testing.assert_close(*results, **same_bits(device))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(device) -> None:
    skip_without_memory(12, device)
    x = torch.randn(2**22 + 3, 512, dtype=torch.bfloat16, device=device)
    y = fused.batch_norm(x, None, None, training=True)
    parts = x.split(2**18)  # all of x in float64 would be 17 GB
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(x)
    squares = torch.stack([(part.double() - mean).square().sum(0) for part in parts]).sum(0)
    expected = (x[-8:].double() - mean) / (squares / len(x) + 1e-5).sqrt()
    torch.testing.assert_close(y[-8:].double(), expected, rtol=1e-2, atol=1e-2)
