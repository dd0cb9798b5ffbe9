"""fused.eager.pages: large results on the CPU lie in memory for which large pages were asked."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused
from fused.eager.pages import large_pages

THERE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(not THERE.exists(), reason="the system has no such pages")


def asked(t: Tensor) -> bool:
    """Whether the mapping in the middle of t's memory has the flag "hg" of MADV_HUGEPAGE."""
    place, inside = t.data_ptr() + t.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name:  # the range of a mapping
            begin, end = (int(address, 16) for address in name.split("-"))
            inside = begin <= place < end
        elif inside and name == "VmFlags:":
            return "hg" in values
    raise AssertionError("no mapping has this address")


def test_the_advice_is_for_large_tensors_alone() -> None:
    """64 MB are a mapping of their own, as new as can be."""
    plain, large = (torch.empty(2**24) for _ in range(2))
    assert not asked(plain)
    assert large_pages(large) is large and asked(large)
    assert not asked(large_pages(torch.empty(2**24)[: 2**19]))


def test_elsewhere_nothing_happens(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["fused.eager.pages"], "_ADVICE", None)
    assert not asked(large_pages(torch.empty(2**24)))


def gradient_of_cross_entropy() -> Tensor:
    x = torch.zeros(2**14, 2**10, requires_grad=True)
    fused.cross_entropy(x, torch.zeros(2**14, dtype=torch.int64)).backward()
    assert x.grad is not None
    return x.grad


def output_of_batch_norm() -> Tensor:
    return fused.batch_norm(torch.zeros(2**14, 2**10), None, None, training=True)


def gradient_of_linear_cross_entropy() -> Tensor:
    w = torch.zeros(2**14, 2**10, requires_grad=True)
    x, target = torch.zeros(2, 2**10), torch.zeros(2, dtype=torch.int64)
    fused.linear_cross_entropy(x, w, target).backward()
    assert w.grad is not None
    return w.grad


@pytest.mark.parametrize(
    "result",
    [gradient_of_cross_entropy, output_of_batch_norm, gradient_of_linear_cross_entropy],
)
def test_large_results(result) -> None:
    assert asked(result())
