"""Cross-entropy whose gradient takes the logits' memory."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

import fused
from tests.exactness import same_bits
from tests.test_cross_entropy import example


@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(9, 27), (9, 27, 5), (2, 8192), (2, 8201)], ids=str)
def test_inplace_takes_the_logits_memory(shape, kind, options, implementation, device) -> None:
    leaf, target, _ = example(shape, torch.float32, device, kind)
    leaf.requires_grad_()
    (expected,) = torch.autograd.grad(fused.cross_entropy(leaf, target), leaf)
    logits = leaf * 1.0
    received: list[Tensor] = []
    logits.register_hook(received.append)
    loss = fused.cross_entropy(logits, target, inplace=True, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient, expected)
    assert received[0].data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}], ids=str)
@pytest.mark.parametrize("beyond", [3, 6])
@pytest.mark.parametrize("shape", [(3, 8201), (2, 4097), (2, 8202, 2)], ids=str)
def test_inplace_in_rows_of_a_padded_vocabulary(
    shape, beyond, options, implementation, device
) -> None:
    """Rows that begin anywhere, by accesses of 16 bytes; what is beyond them stays."""
    values, target, _ = example(shape, torch.float32, device)
    wide = values.movedim(1, -1).contiguous()
    memory = F.pad(wide, (0, beyond), value=7.0).requires_grad_() * 1.0
    received: list[Tensor] = []
    memory.register_hook(received.append)
    logits = memory.narrow(-1, 0, shape[1]).movedim(-1, 1)
    loss = fused.cross_entropy(logits, target, inplace=True, **options)
    loss.backward()
    leaf = values.requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(leaf, target), leaf)[0].movedim(1, -1)
    torch.testing.assert_close(received[0], F.pad(expected, (0, beyond)))
    assert (memory[..., shape[1] :] == 7).all()


@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("largest", [10.0, 25.0, 100.0])
def test_inplace_behind_a_cap(largest, dtype, options, implementation, device) -> None:
    """The logits are needed until it is known whether the largest must be subtracted."""
    leaf, target, _ = example((9, 27), dtype, device)
    leaf[3:, 5] = largest
    leaf.requires_grad_()
    expected = fused.cross_entropy(leaf, target, softcap=40.0, **options)
    loss = fused.cross_entropy(leaf * 1.0, target, softcap=40.0, inplace=True, **options)
    torch.testing.assert_close(loss, expected, **same_bits(device))
    gradients = (torch.autograd.grad(t, leaf) for t in (loss, expected))
    torch.testing.assert_close(*gradients, **same_bits(device))


@pytest.mark.skipif("not config.getoption('--compiled')", reason="of compiled kernels")
@pytest.mark.parametrize("shape, early", [((9, 27), True), ((2, 8192), False)], ids=str)
def test_no_warp_overwrites_what_another_has_not_read(shape, early, monkeypatch) -> None:
    """Its target's logit, which every warp reads and one overwrites: without the emulator's leave
    to do so where all but one of those readings may be of anything."""
    from triton.runtime import driver

    names = {"_cross_entropy_fwd_kernel", "_cross_entropy_bwd_kernel"}
    monkeypatch.setattr(driver.active, "without_updates", names)
    leaf, target, _ = example(shape, torch.float32, "cpu", ignored=0)
    logits = leaf.requires_grad_() * 1.0
    with fused.backend.use("triton"):
        loss = fused.cross_entropy(logits, target, inplace=True, grad_in_forward=early)
        loss.backward()
    expected = torch.autograd.grad(F.cross_entropy(leaf, target), leaf)
    torch.testing.assert_close(leaf.grad, *expected)


WAYS: dict[str, Callable[..., Tensor]] = {
    "function": fused.cross_entropy,
    "with stats": lambda *a, **options: fused.cross_entropy_with_stats(*a, **options).loss,
    "module": lambda x, y, **options: fused.CrossEntropyLoss(**options)(x, y),
}


@pytest.mark.parametrize("way", WAYS)
def test_by_the_forward_or_by_the_backward(way, implementation, device) -> None:
    leaf, target, _ = example((9, 27), torch.float32, device)
    for early in (True, False):
        logits = leaf.requires_grad_() * 1.0
        before, edge = logits.detach().clone(), get_gradient_edge(logits)
        loss = WAYS[way](logits, target, inplace=True, grad_in_forward=early)
        assert torch.equal(logits, before) == (not early)
        (gradient,) = torch.autograd.grad(loss, edge)
        assert gradient.data_ptr() == logits.data_ptr()


def test_the_other_gradients_are_formed_before_the_logits_are_lost(implementation, device) -> None:
    leaves = example((9, 27), torch.float32, device, "probabilities", weighted=True)
    gradients = []
    for options in ({"inplace": True}, {}):
        x, target, weight = (t.detach().clone().requires_grad_() for t in leaves)
        loss = fused.cross_entropy(x * 1.0, target, weight, label_smoothing=0.1, **options)
        gradients.append(torch.autograd.grad(loss, (x, target, weight)))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}], ids=str)
@pytest.mark.parametrize("shift", [-60.0, 60.0])
def test_inplace_of_logits_far_from_0(shift, options, implementation, device) -> None:
    """The closed form finds that it must subtract the largest one: they must still be there."""
    leaf, target, _ = example((9, 27), torch.float32, device)
    leaf = (leaf + shift).requires_grad_()
    expected = F.cross_entropy(leaf, target)
    loss = fused.cross_entropy(leaf * 1.0, target, inplace=True, **options)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x, leaf)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"grad_in_forward": False}], ids=str)
def test_a_loss_that_is_kept_keeps_no_logits(options, implementation, device) -> None:
    """After the backward: losses are kept to be shown."""
    leaf, target, _ = example((9, 27), torch.float32, device)
    logits = leaf.requires_grad_() * 1.0
    loss = fused.cross_entropy(logits, target, logit_scale=0.5, **options)
    assert loss.grad_fn.saved_tensors[0].data_ptr() == logits.data_ptr()
    loss.backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        loss.grad_fn.saved_tensors  # noqa: B018


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_inplace_in_a_padded_vocabulary(upstream, implementation, device) -> None:
    """Logits that are a slice: what is beside them stays as it is."""
    leaf, target, _ = example((9, 27), torch.float32, device)
    leaf.requires_grad_()
    (expected,) = torch.autograd.grad(fused.cross_entropy(leaf, target) * upstream, leaf)
    padded = torch.cat((leaf, torch.full_like(leaf, 7.0)), 1) * 1.0
    loss = fused.cross_entropy(padded[:, :27], target, inplace=True) * upstream
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(padded[:, 27:], torch.full_like(leaf, 7.0), rtol=0, atol=0)


def test_inplace_misuse_raises(implementation, device) -> None:
    leaf, target, _ = example((9, 27), torch.float32, device)
    leaf.requires_grad_()
    before = leaf.detach().clone()
    view = torch.zeros(9, 54, device=device)[:, :27].requires_grad_()  # a leaf itself
    views = ((leaf.view(9, 27), target), (leaf[0], target[0]), (view, target))
    for logits, y in ((leaf, target), *views):
        with pytest.raises(RuntimeError, match="inplace=False for a leaf that requires grad"):
            fused.cross_entropy(logits, y, inplace=True)
    row = torch.zeros(27, device=device, requires_grad=True)  # is given a batch dimension
    with pytest.raises(RuntimeError, match="inplace=False for a leaf that requires grad"):
        fused.cross_entropy(row, target[0], inplace=True)
    assert torch.equal(leaf, before) and not row.any()
    for shape, strides in (((9, 27), (0, 1)), ((9, 27), (2, 1)), ((2, 3, 3), (7, 3, 1))):
        sharing, y = (leaf * 1.0).as_strided(shape, strides), target.new_zeros(shape[0], *shape[2:])
        with pytest.raises(RuntimeError, match="inplace=False for an input whose elements share"):
            fused.cross_entropy(sharing, y, inplace=True)
    empty = torch.zeros(4, 3, 0, 2, device=device, requires_grad=True) * 1.0
    empty = empty.contiguous(memory_format=torch.channels_last)  # of strides (0, 1, 6, 3)
    y = target.new_zeros(4, 0, 2)
    assert fused.cross_entropy(empty, y, inplace=True, reduction="sum") == 0

    for early in (True, False):  # a second backward finds the gradient where the logits were
        logits = leaf * 1.0
        loss = fused.cross_entropy(logits, target, inplace=True, grad_in_forward=early)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    loss = fused.cross_entropy(leaf * 1.0, target, inplace=True)
    with pytest.raises(RuntimeError, match="inplace=False for create_graph=True"):
        torch.autograd.grad(loss, leaf, create_graph=True)

    logits = leaf * 1.0  # a graph that saved the logits before
    squares = (logits**2).sum()
    fused.cross_entropy(logits, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@pytest.mark.parametrize(
    "view",
    [lambda t: t, lambda t: t.view(27, 9).view(-1, 27), lambda t: t.narrow(0, 0, 9)],
    ids=["itself", "a view of a view", "its only part"],
)
def test_a_use_of_logits_after_they_were_overwritten(view, implementation, device) -> None:
    """Of these, or of what they are a view of: of the gradient's numbers it would be."""
    leaf, target, _ = example((9, 27), torch.float32, device)
    leaf.requires_grad_()
    logits = leaf * 1.0
    before = logits.sum()  # a use before that needs no logits for its gradient
    loss = fused.cross_entropy(view(logits), target, inplace=True)
    for later in (F.cross_entropy(logits, target), logits.sum(), view(logits).exp().sum()):
        with pytest.raises(RuntimeError, match="no use of logits after a call with inplace=True"):
            (loss + later).backward(retain_graph=True)
    leaf.grad = None
    (before + loss).backward()
    expected = torch.autograd.grad(F.cross_entropy(leaf, target), leaf)[0] + 1
    torch.testing.assert_close(leaf.grad, expected)


class _Behind(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("name", ["chunk", "unbind", "full backward hook"])
def test_inplace_of_views_that_autograd_lets_nobody_change(
    name, early, implementation, device
) -> None:
    """They stay as they are, and so do those beside them."""
    leaf, target, _ = example((9, 27), torch.float32, device)
    leaf.requires_grad_()
    module = _Behind()
    module.register_full_backward_hook(lambda *_: None)
    views = {
        "chunk": lambda: torch.stack((leaf, leaf + 1), 1).flatten(0, 1).chunk(2),
        "unbind": lambda: torch.stack((leaf, leaf + 1)).unbind(),
        "full backward hook": lambda: (module(leaf), leaf * 1.0),
    }[name]
    found = []
    for inplace in (True, False):
        first, second = views()
        loss = fused.cross_entropy(first, target, inplace=inplace, grad_in_forward=early)
        loss = loss + fused.cross_entropy(second, target)
        found.append((loss, *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(*found)


def test_inplace_without_gradient_changes_nothing(implementation, device) -> None:
    logits, target, _ = example((9, 27), torch.float32, device)
    before, version = logits.clone(), logits._version
    fused.cross_entropy(logits, target, inplace=True)
    with torch.no_grad():
        fused.cross_entropy(logits.requires_grad_(), target, inplace=True)
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)
    assert logits._version == version


@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}], ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_inplace_behind_a_checkpoint(reentrant, options, implementation, device) -> None:
    """The logits are computed again for the backward, and overwritten again."""
    gradients = []
    ours = functools.partial(fused.cross_entropy, inplace=True, **options)
    for function in (ours, F.cross_entropy):
        leaf, target, _ = example((9, 27), torch.float32, device)

        def loss(x: Tensor, target=target, function=function) -> Tensor:
            return function(x * 2.0, target)

        result = checkpoint(loss, leaf.requires_grad_(), use_reentrant=reentrant) * 3
        result.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}], ids=str)
@pytest.mark.parametrize("copied", [True, False])
def test_inplace_where_hooks_have_what_is_saved(copied, options, implementation, device) -> None:
    """They take no notice of versions: nothing is overwritten, and every use is right."""
    found = []
    ours: Any = functools.partial(fused.cross_entropy, inplace=True, **options)
    for function in (ours, F.cross_entropy):
        leaf, target, _ = example((9, 27), torch.float32, device)
        leaf.requires_grad_()
        pack = (lambda t: t.clone()) if copied else (lambda t: t)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            logits = leaf * 2.0
            squares = (logits * logits).sum()
            loss = function(logits, target)
        gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)]
        found.append([*gradients, *torch.autograd.grad(squares, leaf)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}], ids=str)
@pytest.mark.parametrize("view", [False, True])
def test_inplace_of_logits_that_retain_their_gradient(
    view, options, implementation, device
) -> None:
    """The logits stay as they are where a node that is never run would have the gradient."""
    leaf, target, _ = example((9, 27), torch.float32, device)
    found = []
    for ours in (True, False):
        logits = leaf.clone().requires_grad_() * 2.0
        logits.retain_grad()
        seen = logits.view(9, 27) if view else logits
        if ours:
            loss = fused.cross_entropy(seen, target, inplace=True, **options)
        else:
            loss = F.cross_entropy(seen, target)
        (loss * 3).backward()
        found.append(logits.grad)
    torch.testing.assert_close(*found)


def test_nothing_of_the_logits_size_is_kept_for_a_checkpoint(implementation, device) -> None:
    leaf, target, _ = example((9, 27), torch.float32, device)
    leaf.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return fused.cross_entropy(x.cos(), target, label_smoothing=0.1)

    assert loss(leaf).grad_fn.dx.shape == leaf.shape  # formed in the forward
    checkpointed = checkpoint(loss, leaf, use_reentrant=False)
    assert checkpointed.grad_fn.dx is None
    found = [torch.autograd.grad(y, leaf)[0] for y in (checkpointed, loss(leaf))]
    torch.testing.assert_close(*found)


def test_inplace_differentiated_twice_where_the_logits_are_still_there(
    implementation, device
) -> None:
    penalties: list[Tensor] = []
    for keywords in ({"inplace": True, "grad_in_forward": False}, {}):
        leaf, target, _ = example((9, 27), torch.float32, device)
        loss = fused.cross_entropy(leaf.requires_grad_() * 2.0, target, **keywords)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        penalties += torch.autograd.grad(gradient.square().sum(), leaf)
    torch.testing.assert_close(*penalties)
