"""Where widely used cross-entropies were found wrong: one test, or a few, for each failure."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from fused.eager import cross_entropy_rows
from tests.exactness import negated, same_bits, skip_without_memory
from tests.graphs import check_replay
from tests.test_cross_entropy import DTYPES, REDUCTIONS, check_against_torch, example, small_chunks  # noqa: F401

INF = float("inf")


def both(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Two leaves with the same numbers, for us and for torch."""
    return logits.clone().requires_grad_(), logits.clone().requires_grad_()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_upstream_gradient_other_than_1(reduction, implementation, device) -> None:
    """A random number for mean and sum, a random vector for none: not grad_output[0] for all."""
    logits, target, _ = example((9, 27), torch.float32, device)
    check_against_torch(logits, target, None, implementation, reduction=reduction)


@pytest.mark.parametrize("shape", [(9, 27), (3, 27, 4)], ids=str)
def test_upstream_gradient_of_stride_0(shape, implementation, device) -> None:
    """`.sum()` sends back an expanded one."""
    logits, target, _ = example(shape, torch.float32, device)
    ours, theirs = both(logits)
    (fused.cross_entropy(ours, target, reduction="none").sum() * 3).backward()
    (F.cross_entropy(theirs, target, reduction="none").sum() * 3).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_upstream_gradient_that_is_not_contiguous(implementation, device) -> None:
    logits, target, _ = example((3, 27, 4), torch.float32, device)
    upstream = torch.randn(4, 3, device=device).t()
    ours, theirs = both(logits)
    fused.cross_entropy(ours, target, reduction="none").backward(upstream)
    F.cross_entropy(theirs, target, reduction="none").backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_logits_are_never_changed(implementation, device) -> None:
    logits, target, _ = example((9, 27), torch.float32, device)
    before = logits.clone()
    with torch.no_grad():
        fused.cross_entropy(logits, target)
    fused.cross_entropy(logits.requires_grad_(), target).backward()
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("grad_in_forward", [True, False])
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_second_backward_gives_the_same_gradient(
    upstream, grad_in_forward, implementation, device
) -> None:
    """Whoever received the first gradient has written to it meanwhile."""
    logits, target, _ = example((9, 200), torch.float32, device)
    logits.requires_grad_()
    loss = fused.cross_entropy(logits, target, grad_in_forward=grad_in_forward) * upstream
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = first.clone()
    first.zero_()
    for retain in (True, False):
        (again,) = torch.autograd.grad(loss, logits, retain_graph=retain)
        torch.testing.assert_close(again, expected, rtol=0, atol=0)
        again.zero_()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_gradients_accumulate(implementation, device) -> None:
    """The first gradient becomes .grad itself; the second is added to it, not the first twice."""
    logits, target, _ = example((9, 200), torch.float32, device)
    ours, theirs = both(logits)
    for factor in (1.0, 0.5, 1.0):
        loss = fused.cross_entropy(ours, target)
        (loss * factor).backward(retain_graph=True)
        loss.backward()
        (F.cross_entropy(theirs, target) * (factor + 1)).backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_logits_changed_after_forward(implementation, device) -> None:
    """The gradient is that of the logits as they were, or there is none."""
    logits, target, _ = example((9, 200), torch.float32, device)
    logits.requires_grad_()
    (expected,) = torch.autograd.grad(fused.cross_entropy(logits, target), logits)
    scaled = logits * 1
    loss = fused.cross_entropy(scaled, target)
    scaled.data.mul_(2)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    scaled = logits * 1
    loss = fused.cross_entropy(scaled, target, grad_in_forward=False)
    scaled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def least(x: Tensor) -> float:
    return torch.finfo(x.dtype).min


MASKED = {
    "one": lambda x, y: x.index_fill(1, torch.tensor([5]), -INF),
    "first block": lambda x, y: torch.cat((torch.full_like(x[:, :4200], -INF), x[:, 4200:]), 1),
    "last block": lambda x, y: torch.cat((x[:, :7000], torch.full_like(x[:, 7000:], -INF)), 1),
    "all but the target": lambda x, y: torch.full_like(x, -INF).scatter(1, y[:, None], 1.0),
    "target": lambda x, y: x.scatter(1, y[:1, None], -INF),
    "a whole row": lambda x, y: x.index_fill(0, torch.tensor([1]), -INF),
    "plus infinity": lambda x, y: x.index_fill(1, torch.tensor([7]), INF),
    "nan": lambda x, y: x.index_fill(1, torch.tensor([7]), float("nan")),
    "least number": lambda x, y: x.scatter(1, torch.tensor([[5]]), least(x)),
    "least number at a target": lambda x, y: x.scatter(1, y[:1, None], least(x)),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("masked", MASKED)
def test_masked_logits(masked, label_smoothing, reduction, implementation, device) -> None:
    """NaN and infinity exactly where torch has them."""
    logits, _, _ = example((3, 8200), torch.float32, "cpu")
    target = torch.tensor([5000, 6000, 6999])
    logits = MASKED[masked](logits, target).to(device)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    check_against_torch(logits, target.to(device), None, implementation, **options)


EXTREME = {
    "all near -110": lambda x: x - 110,
    "all near 3e4": lambda x: x + 3e4,
    "one 1e4 above": lambda x: x + 1e4 * (torch.arange(x.shape[1], device=x.device) == 3),
}


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("extreme", EXTREME)
def test_extreme_logits(extreme, kind, implementation, device) -> None:
    logits, target, _ = example((9, 668), torch.float32, device, kind)
    logits = EXTREME[extreme](logits)
    assert fused.cross_entropy(logits, target).isfinite()
    check_against_torch(logits, target, None, implementation)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_logits_near_minus_110_in_rows_that_begin_anywhere(kind, implementation, device) -> None:
    """Lanes that have taken nothing from the edges of a row have a maximum of -inf, not of 0."""
    logits, target, _ = example((3, 8201), torch.float32, device, kind)
    check_against_torch(logits - 110, target, None, implementation)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("masked", MASKED)
def test_masked_logits_of_half_precision(masked, reduction) -> None:
    """The closed form looks for the largest logit only where a sum of exponentials asks for it."""
    logits, _, _ = example((3, 8200), torch.bfloat16, "cpu")
    target = torch.tensor([5000, 6000, 6999])
    with fused.backend.use("eager"):
        check_against_torch(
            MASKED[masked](logits, target), target, None, "eager", reduction=reduction
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_log_sum_exp_of_infinities(kind, dtype, implementation, device) -> None:
    """Torch's: an infinity, not NaN, where the row's largest logit is one."""
    logits, target, _ = example((9, 27), dtype, device, kind, ignored=0)
    logits[1, 3], logits[2, 3], logits[4] = INF, -INF, -INF
    logits[6, 3:5] = INF
    lse = fused.cross_entropy_with_stats(logits, target).lse
    torch.testing.assert_close(lse, logits.to(lse.dtype).logsumexp(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_the_least_number_where_nothing_counts(kind, dtype, implementation, device) -> None:
    """As torch.finfo(...).min masks classes, whose probabilities, or weights, are 0: times log2(e)
    it is an infinity, and 0 * inf is NaN."""
    logits, target, weight = example((9, 27), dtype, device, kind, weighted=True, ignored=0)
    assert weight is not None
    logits[:, ::2] = torch.finfo(dtype).min
    weight[::2] = 0.0
    if kind == "indices":
        target = (target // 2 * 2 - 1).abs()
    else:
        target[:, ::2] = 0.0
        check_against_torch(logits, target, None, implementation)
    check_against_torch(logits, target, weight, implementation, label_smoothing=0.1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [-3e4, -88.0, -14.0, -10.0, 52.0, 60.0, 95.0, 3e4])
def test_half_precision_far_from_0(shift, dtype, reduction) -> None:
    """In some of the rows: their exponentials may overflow or vanish, on both sides of where the
    closed form begins to subtract the largest logit."""
    logits, target, _ = example((16, 27), dtype, "cpu")
    logits[6:9] += shift
    logits[7, 3] -= 100  # a target whose probability is below what float32 can hold
    target[7] = 3
    with fused.backend.use("eager"):
        check_against_torch(logits, target, None, "eager", reduction=reduction)


# A cap's derivative vanishes far from 0, and with it the digits that a difference leaves.
OPTIONS_FAR = [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"probabilities": True}]
NEAR, FAR = [-16.0, -9.0, 9.0, 13.0, 16.0], [-3e4, -88.0, 50.0, 57.0, 3e4]


@pytest.mark.parametrize(
    "shift, options",
    [
        *itertools.product(NEAR, [*OPTIONS_FAR, {"softcap": 20.0}]),
        *itertools.product(FAR, OPTIONS_FAR),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_logits_far_from_0(shift, dtype, options, monkeypatch) -> None:
    """Where none is subtracted their rounding counts: of uncertain rows, and of confident ones."""
    monkeypatch.setattr(cross_entropy_rows, "CHUNK", 128)
    logits, target, weight = example((16, 27), dtype, "cpu", weighted=True, ignored=0)
    logits[8:].scatter_(1, target[8:, None], 12.0)
    logits += shift
    options = dict(options)
    if "z_loss" in options and dtype == torch.float64 and shift in FAR:
        pytest.skip("exp(z - lse) in float64 is no measure of itself: its rounding is |z| * 2^-53")
    if options.pop("probabilities", False):
        target = F.one_hot(target, 27).to(dtype)
    with fused.backend.use("eager"):
        for rows in (slice(8), slice(8, 16)):
            for w in (None, weight):
                for reduction in ("sum", "none"):
                    check_against_torch(
                        logits[rows], target[rows], w, "eager", reduction=reduction, **options
                    )


@pytest.mark.parametrize("classes", [27, 668, 1128, 50257, 32003, 128256, 151936])
def test_classes_that_are_no_multiple_of_a_block(classes, implementation, device) -> None:
    """Behind the cap a masked -inf would be -cap, and count: negative logits would show it."""
    logits, target, _ = example((1, classes), torch.float32, device, ignored=0)
    check_against_torch(logits - 20, target, None, implementation, softcap=5.0)


@pytest.mark.parametrize("cap", [250.0, 1e5, 1e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_wide_caps_change_little(dtype, cap, implementation, device) -> None:
    """An error of tanh next to 0 is multiplied by the cap: 1e-7 of them was a loss off by 1."""
    logits, target, _ = example((9, 27), dtype, device, ignored=0)
    found = fused.cross_entropy_with_stats(logits, target, softcap=cap).row_loss
    z = cap * torch.tanh(logits.double() / cap)
    exact = F.cross_entropy(z, target, reduction="none")
    atol = 4e-6 if dtype == torch.float32 else 1e-4
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, INF, float("nan")])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_have_loss_and_gradient_0(
    reduction, label_smoothing, upstream, dtype, implementation, device
) -> None:
    """Written as 0: memory that torch.empty leaves is NaN in these tests."""
    logits, target, _ = example((9, 27), dtype, device, ignored=0)
    target[::2] = -100
    logits[::4] = float("nan")  # nor does what is in them matter
    ours, theirs = both(logits)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    loss = fused.cross_entropy(ours, target, **options)
    torch.testing.assert_close(
        loss, F.cross_entropy(torch.nan_to_num(theirs), target, **options).detach()
    )
    loss.backward(torch.full_like(loss, upstream))
    torch.testing.assert_close(
        ours.grad[::2], torch.zeros(5, 27, dtype=dtype, device=device), rtol=0, atol=0
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_rows_ignored(reduction, label_smoothing, implementation, device) -> None:
    """The mean is NaN, the sum 0, and the gradient 0 in every case."""
    logits = torch.randn(4, 27, device=device, requires_grad=True)
    target = torch.full((4,), -100, device=device)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    loss = fused.cross_entropy(logits, target, **options)
    expected = F.cross_entropy(logits, target, **options)
    torch.testing.assert_close(loss, expected, equal_nan=True, rtol=0, atol=0)
    loss.backward(torch.ones_like(loss))
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("others", [0.0, 1.0])
def test_total_weight_0(others, label_smoothing, implementation, device) -> None:
    """Of the targets; with smoothing the other classes count as well, and their losses are no 0."""
    logits, target, _ = example((9, 27), torch.float32, device, ignored=0)
    target[1:].clamp_(max=19)
    target[0] = -100
    weight = torch.where(torch.arange(27, device=device) < 20, 0.0, others)
    ours, theirs = both(logits)
    options = {"label_smoothing": label_smoothing}
    loss = fused.cross_entropy(ours, target, weight, **options)
    expected = F.cross_entropy(theirs, target, weight, **options)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 27), (0, 27, 3), (2, 27, 0)], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batch(reduction, kind, shape, implementation, device) -> None:
    logits, target, weight = example(shape, torch.float32, device, kind, weighted=True)
    logits.requires_grad_()
    loss = fused.cross_entropy(logits, target, weight, reduction=reduction)
    expected = F.cross_entropy(logits, target, weight, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True, rtol=0, atol=0)
    loss.backward(torch.ones_like(loss))
    assert logits.grad.shape == shape


@pytest.mark.parametrize("shape", [(0, 27), (0, 27, 3), (2, 27, 0)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_an_empty_batch(reduction, shape, implementation, device) -> None:
    """Of the probabilities, and of the weights: 0."""
    leaves = example(shape, torch.float32, device, "probabilities", weighted=True)
    logits, target, weight = (t.requires_grad_() for t in leaves if t is not None)
    loss = fused.cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=0.1)
    found = torch.autograd.grad(loss, (logits, target, weight), torch.ones_like(loss))
    for gradient, like in zip(found, (logits, target, weight), strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(like), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 0), (0, 0), (2, 0, 0), (0,)], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_no_classes(kind, shape, implementation, device) -> None:
    logits = torch.zeros(shape, device=device, requires_grad=True)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = logits.detach() if kind == "probabilities" else torch.full(rows, -100, device=device)
    for reduction, label_smoothing in itertools.product(REDUCTIONS, (0.0, 0.1)):
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        for weight in (None, torch.ones(0, device=device)):
            loss = fused.cross_entropy(logits, target, weight, **options)
            expected = F.cross_entropy(logits, target, weight, **options)
            torch.testing.assert_close(loss, expected, equal_nan=True, rtol=0, atol=0)
            (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
            assert gradient.shape == shape
            stats = fused.cross_entropy_with_stats(logits, target, weight, **options)
            torch.testing.assert_close(stats.loss, loss, equal_nan=True, rtol=0, atol=0)
            row_loss = F.cross_entropy(logits, target, weight, **options | {"reduction": "none"})
            torch.testing.assert_close(
                stats.row_loss, row_loss.detach(), equal_nan=True, rtol=0, atol=0
            )
            lse = torch.logsumexp(logits.detach(), min(1, len(shape) - 1))
            lse = lse if kind == "probabilities" else torch.zeros_like(lse)
            torch.testing.assert_close(stats.lse, lse, rtol=0, atol=0)
            assert [s.requires_grad for s in stats] == [True, False, False, False, False]
            assert stats.correct.dtype == torch.int64 and stats.correct.item() == 0
            nothing = torch.full(rows, -1, device=device)
            torch.testing.assert_close(stats.prediction, nothing, rtol=0, atol=0)


CAPTURED = [
    {},
    {"reduction": "none"},
    {"inplace": True},
    {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.7},
]


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("options", CAPTURED, ids=str)
def test_no_host_synchronisation(options, kind, device) -> None:
    """The whole step is captured in a CUDA graph, which forbids them, and replayed."""
    logits, target, weight = example((9, 37), torch.float32, device, kind, weighted=True)
    assert weight is not None
    logits.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = fused.cross_entropy(logits * 1.5, target, weight, **options)
        return loss, *torch.autograd.grad(loss, logits, torch.full_like(loss, 0.7))

    check_replay(step, [logits, target, weight])


def test_float16_gradients_do_not_flush_to_zero(implementation, device) -> None:
    """1/N is not rounded to float16 before a loss scale arrives: no gradient is lost."""
    n, c = 128, 16
    logits = torch.zeros(n, c, dtype=torch.float16, device=device)
    logits[:, 0] = 10.0
    target = torch.zeros(n, dtype=torch.int64, device=device)
    (fused.cross_entropy(logits.requires_grad_(), target) * 2.0**15).backward()
    exact = torch.softmax(logits.detach().double(), 1)[:, 1] * 2.0**15 / n
    torch.testing.assert_close(logits.grad[:, 1].double(), exact, rtol=2e-3, atol=0)


def test_confident_predictions_keep_their_gradient(implementation, device) -> None:
    """p - 1 is formed before rounding: a bfloat16 p of 1 would leave a gradient of 0."""
    logits = torch.zeros(2, 27, dtype=torch.bfloat16, device=device)
    logits[:, 3] = 12.0
    logits.requires_grad_()
    target = torch.full((2,), 3, device=device)
    fused.cross_entropy(logits, target, reduction="sum").backward()
    exact = torch.softmax(logits.double(), 1)[:, 3] - 1
    torch.testing.assert_close(logits.grad[:, 3].double(), exact, rtol=1e-2, atol=0)


def test_log_sum_exp_is_kept_in_float32(implementation, device) -> None:
    """One rounded to bfloat16 made softmax sums of 1.004 to 1.021."""
    logits, target, _ = example((9, 4096), torch.bfloat16, device)
    target.clamp_(min=0)
    lse = fused.cross_entropy_with_stats(logits, target).lse
    sums = (logits.double() - lse.double()[:, None]).exp().sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


class Spread(torch.autograd.Function):
    """The same values at other strides of a memory"""

    @staticmethod
    def forward(ctx, values, memory, strides):
        spread = torch.tensor([], dtype=values.dtype, device=values.device)
        return spread.set_(memory, 0, values.shape, strides).copy_(values)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone(memory_format=torch.contiguous_format), None, None


@pytest.mark.interpreted("the emulator copies a tensor's whole storage, here 4 GiB")
@pytest.mark.parametrize("grad_in_forward", [True, False])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_offsets_beyond_2_to_the_31(kind, grad_in_forward, implementation, device) -> None:
    """The third of rows, or the fifth of classes, begins at element 2**31; the memory between them
    is never touched. In place, the gradient is written as far apart as the logits are read."""
    if implementation == "eager":
        pytest.skip("torch's own indexing")
    values, target, _ = example((3, 5), torch.bfloat16, device, kind, ignored=0)
    if device.type == "cuda":  # elsewhere untouched memory is none
        skip_without_memory(5, device)
    try:
        memory = torch.UntypedStorage(2 * (2**31 + 64), device=device)
    except RuntimeError:
        pytest.skip("4 GiB of memory are not to be had")
    options = {"grad_in_forward": grad_in_forward}
    expected = fused.cross_entropy(values.requires_grad_(), target, **options)
    (gradient,) = torch.autograd.grad(expected, values)
    for strides in ((2**30, 1), (1, 2**29)):
        logits = Spread.apply(values, memory, strides)
        loss = fused.cross_entropy(logits, target, inplace=True, **options)
        torch.testing.assert_close(loss, expected, **same_bits(device))
        (found,) = torch.autograd.grad(loss, values)
        torch.testing.assert_close(found, gradient, **same_bits(device))
        if kind == "probabilities":
            far = Spread.apply(target, memory, strides)
            loss = fused.cross_entropy(values, far, **options)
            torch.testing.assert_close(loss, expected, **same_bits(device))


@pytest.mark.slow
@pytest.mark.interpreted("the emulator copies memory, and not so much")
def test_more_than_2_to_the_31_elements(implementation, device) -> None:
    skip_without_memory(12, device)
    shape, first = (65536, 40000), 0
    if implementation == "triton" and device.type == "cpu":
        # 20 minutes; hours, if the rows before the last were not ignored.
        shape, first = (2**11 + 16, 2**20), 2**11 + 8
    logits = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    target = torch.full(shape[:1], -100, device=device)
    logits[first:].normal_()
    target[first:].random_(shape[1])
    fused.cross_entropy(logits.requires_grad_(), target, reduction="sum").backward()
    tail = logits.detach()[-8:].clone().requires_grad_()
    F.cross_entropy(tail.float(), target[-8:], reduction="sum").backward()
    torch.testing.assert_close(logits.grad[-8:], tail.grad, rtol=1e-2, atol=1e-5)
    assert not logits.grad[:first].any()


@pytest.mark.cuda
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_nearly_2_to_the_31_rows(reduction) -> None:
    """Of one row in memory: rows and a tile's more are no int32."""
    n = 2**31 - 3
    row, target = torch.randn(2, device="cuda"), torch.ones((), dtype=torch.int64, device="cuda")
    loss = fused.cross_entropy(row.expand(n, 2), target.expand(n), reduction=reduction)
    expected = F.cross_entropy(row, target) * (n if reduction == "sum" else 1)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "classes last in memory": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "batch last in memory": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "batch before the classes": lambda x: (
        x.movedim((0, 1), (-2, -1)).contiguous().movedim((-2, -1), (0, 1))
    ),
    "sliced classes": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "every other class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row expanded": lambda x: x[:1].expand_as(x),
    "one class expanded": lambda x: x[:, :1].expand_as(x),
    "pointer off by one": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x),
}


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(9, 27), (2, 27, 3), (2, 27, 3, 2)], ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_non_contiguous_logits(strides, shape, kind, implementation, device) -> None:
    logits, target, weight = example(shape, torch.float32, device, kind, weighted=True)
    check_against_torch(STRIDES[strides](logits), target, weight, implementation)


# Of 64 classes, whose rows would begin where 16 bytes do; the gradient lies in another order.
@pytest.mark.parametrize("shared", [(1, 64, 5), (3, 64, 1), (1, 64, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
def test_positions_that_share_their_logits(options, shared, implementation, device) -> None:
    logits, _, _ = example(shared, torch.float32, device)
    _, target, _ = example((3, 64, 5), torch.float32, device)
    check_against_torch(logits.expand(3, 64, 5), target, None, implementation, **options)


@pytest.mark.parametrize("stride", [8, 16])
def test_rows_that_overlap(stride, implementation, device) -> None:
    logits, _, _ = example((9, 64), torch.float32, device)
    _, target, _ = example((3, 64, 5), torch.float32, device)
    overlapping = logits.as_strided((3, 64, 5), (100, 1, stride))
    check_against_torch(overlapping, target, None, implementation)


# Columns of wider rows: some begin where 16 bytes do, others do not; held, and in several tiles.
SLICES = {
    "beside one": lambda x: F.pad(x, (0, 1))[:, :-1],
    "beside four": lambda x: F.pad(x, (0, 4))[:, :-4],
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "slices, classes",
    [("every other", 8200), ("beside one", 32), ("beside one", 4099), ("beside four", 8200)],
)
def test_a_part_of_wider_rows(slices, classes, reduction, implementation, device) -> None:
    """The gradient has strides of its own."""
    logits, target, _ = example((2, classes), torch.float32, device, ignored=0)
    check_against_torch(SLICES[slices](logits), target, None, implementation, reduction=reduction)


def test_classes_last_in_a_part_of_wider_rows(implementation, device) -> None:
    """Of rows (n, s) that begin anywhere, though those of an n do not."""
    logits, target, _ = example((2, 32, 4), torch.float32, device)
    wider = F.pad(logits.transpose(1, 2), (0, 1))[:, :, :-1].transpose(1, 2)
    check_against_torch(wider, target, None, implementation)


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(9, 27), (2, 27, 3)], ids=str)
def test_negated_views(shape, kind, options, implementation, device) -> None:
    """Of logits, probabilities, class weights and upstream gradients."""
    tensors = example(shape, torch.float32, device, kind, weighted=True)

    def run(convert) -> list[Tensor]:
        x, target, weight = (convert(t) if t.is_floating_point() else t for t in tensors)
        leaves = [x, *((target, weight) if kind == "probabilities" else ())]
        for leaf in leaves:
            leaf.requires_grad_()
        loss = fused.cross_entropy(convert(x), target, weight, **options)
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss)
        return [loss, *torch.autograd.grad(loss, leaves, convert(upstream))]

    torch.testing.assert_close(run(negated), run(torch.clone), **same_bits(device))


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_non_contiguous_targets(kind, implementation, device) -> None:
    logits, target, _ = example((2, 27, 3, 4), torch.float32, device, kind)
    ends = target.movedim(0, -1).contiguous().movedim(-1, 0)
    last = target.movedim(1, -1).contiguous().movedim(-1, 1)
    shuffled = target.movedim(-2, 0).contiguous().movedim(0, -2)  # no view of it is (N, ..., S)
    every_other = target.repeat_interleave(2, -1)[..., ::2]
    for strided in (ends, last, shuffled, every_other):
        assert not strided.is_contiguous()
        check_against_torch(logits, strided, None, implementation)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_strides_of_class_weights(reduction, kind, implementation, device) -> None:
    """A column of a matrix, and one number for all classes."""
    logits, target, weight = example((9, 27), torch.float32, device, kind, weighted=True, ignored=0)
    assert weight is not None
    for strided in (torch.stack((weight, -weight), 1)[:, 0], weight[:1].expand(27)):
        results = []
        for w in (strided, strided.contiguous()):
            x = logits.clone().requires_grad_()
            loss = fused.cross_entropy(x, target, w, reduction=reduction)
            results.append((loss, *torch.autograd.grad(loss.sum(), x)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_inner_dimensions_that_do_not_collapse(implementation, device) -> None:
    logits, target, _ = example((2, 27, 3, 4), torch.float32, device)
    for order in ((0, 1, 3, 2), (0, 3, 1, 2), (3, 0, 2, 1)):
        back = [order.index(i) for i in range(4)]
        shuffled = logits.permute(order).contiguous().permute(back)
        check_against_torch(shuffled, target, None, implementation)
    check_against_torch(logits, target.transpose(1, 2).contiguous().transpose(1, 2), None,
                        implementation)  # fmt: skip


def test_target_out_of_range_on_the_closed_form() -> None:
    logits, target, weight = example((9, 27), torch.float32, "cpu", weighted=True)
    target[4] = 31
    message = r"expected target in \[0, 27\) or ignore_index=-100, got 31 at row 4"
    with fused.backend.use("eager"):
        with pytest.raises(IndexError, match=message):
            fused.cross_entropy(logits, target)
        with pytest.raises(IndexError, match=message):
            fused.cross_entropy(logits, target, weight, label_smoothing=0.1)
        with pytest.raises(IndexError, match=r"got -1 at row \(0, 2\)"):
            fused.cross_entropy(logits[None].mT, torch.tensor([[0, 1, -1] + [0] * 6]))


@pytest.mark.parametrize("outside", [27, 31, -1, 2**40, -(2**40)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [{"logit_scale": 0.5}, {"label_smoothing": 0.1}], ids=str)
def test_target_out_of_range_on_the_kernels(outside, options, weighted, device) -> None:
    """No look on the host, no read out of bounds: the row's loss and gradient are NaN."""
    logits, target, weight = example((9, 27), torch.float32, device, weighted=weighted, ignored=0)
    target[4] = outside
    logits.requires_grad_()
    with fused.backend.use("triton"):
        loss = fused.cross_entropy(logits, target, weight, reduction="none", **options)
        mean = fused.cross_entropy(logits, target, weight, **options)
        gradients = [torch.autograd.grad(x, logits, torch.ones_like(x))[0] for x in (loss, mean)]
    rows = torch.arange(9, device=device) == 4
    torch.testing.assert_close(loss.isnan(), rows)
    for gradient in gradients:
        torch.testing.assert_close(gradient.isnan(), rows[:, None].expand(9, 27))
    assert mean.isnan()


def test_labels_and_logits_that_are_not_16_byte_aligned(implementation, device) -> None:
    logits, target, _ = example((9, 32), torch.bfloat16, device)
    for shift in (1, 3, 7):
        moved = torch.cat((logits.flatten()[:shift], logits.flatten()))[shift:].view_as(logits)
        labels = torch.cat((target[:1], target))[1:]
        check_against_torch(moved, labels, None, implementation)
    check_against_torch(logits, target.repeat_interleave(3)[::3], None, implementation)
    check_against_torch(logits, target[:1].expand(9), None, implementation)


def test_two_runs_are_bitwise_equal(implementation, device) -> None:
    logits, target, weight = example((20, 129), torch.float32, device, weighted=True)
    results = []
    for _ in range(2):
        x = logits.clone().requires_grad_()
        loss = fused.cross_entropy(x, target, weight, label_smoothing=0.1)
        loss.backward()
        results.append((loss, x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
