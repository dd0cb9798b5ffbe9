"""The shapes of cross-entropy's tests are on both sides of every threshold of kernels/tuning.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fused
from tests.exactness import negated
from tests.test_cross_entropy import DTYPES, SHAPES, check_against_torch, example

pytest.importorskip("triton")

from fused.kernels import tuning

# (N, C, S): a tile of neighbouring rows holds all classes, or some of them.
INNER = [(2, 1, 9), (2, 20, 33), (2, 40, 3), (9, 130, 5), (2, 1100, 5), (2, 1100, 67)]
CLASSES = sorted(
    {*range(1, 140)} | {2**k + d for k in range(8, 16) for d in (-1, 0, 1, 8)} | {50257, 1000000}
)


def plan(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> tuning.CrossEntropyPlan:
    n, c, *inner = shape
    return tuning.cross_entropy(torch.empty(n, c, *inner or [1], dtype=dtype, device="meta"))


def kind(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bool, ...]:
    """What decides which of the kernel's branches are taken."""
    p = plan(shape, dtype)
    return len(shape) > 2, p.HELD, p.EDGES, p.VEC > 1, p.THREADS > 0, p.BLOCK_N > 1


def test_every_kind_of_plan_is_tested() -> None:
    tested = {kind(shape, dtype) for shape in [*SHAPES, *INNER] for dtype in DTYPES}
    shapes = [(n, c, *s) for n in (1, 5, 70, 9000) for c in CLASSES for s in ((), (5,))]
    for dtype in DTYPES:
        for shape in shapes:
            assert kind(shape, dtype) in tested, (shape, dtype)


@pytest.mark.parametrize("rows", [32, 33])
def test_one_program_or_several(rows) -> None:
    """At the notebook's shape; both are among the tests' shapes."""
    assert (rows, 27) in SHAPES
    assert (plan((rows, 27), torch.float32).n_programs == 1) == (rows == 32)


def test_what_is_held_and_how_it_is_read() -> None:
    for dtype, most in ((torch.bfloat16, 8192), (torch.float32, 8192), (torch.float64, 4096)):
        assert plan((9, most), dtype).HELD and not plan((9, most + 1), dtype).HELD
    assert [plan((9000, c)).BLOCK_N for c in (8, 128, 129)] == [64, 4, 1]
    assert [plan((9, c)).EDGES for c in (4095, 4096, 4097)] == [False, False, True]
    rows = torch.empty(6, 4097, dtype=torch.bfloat16, device="meta")
    wider = torch.empty(6, 4099, dtype=torch.bfloat16, device="meta")[:, :-2]
    images = [x.view(2, 3, -1).transpose(1, 2) for x in (rows, wider)]
    edges = [tuning.cross_entropy(x).EDGES for x in images]
    sequences = [x.view(3, 2, -1).permute(1, 2, 0) for x in (rows, wider)]  # batch in the middle
    assert edges == [tuning.cross_entropy(x).EDGES for x in sequences] == [True, False]
    memory = torch.empty(9 * 8192 + 1)
    found = [tuning.cross_entropy(x.view(9, 8192, 1)).VEC for x in (memory[:-1], memory[1:])]
    assert found == [4, 1]  # 16 bytes at a time, where memory begins so


def test_neighbours_that_are_rows_are_held_or_fit_l2() -> None:
    """128 bytes of them, narrower for more classes; at least a sector of memory, 32 bytes."""

    def found(classes: int, dtype: torch.dtype) -> tuple[bool, int, int]:
        p = plan((64, classes, 4096), dtype)
        assert p.THREADS == 1 and p.PARTS * p.BLOCK_N == 32 * p.num_warps
        return p.HELD, p.BLOCK_N * dtype.itemsize, p.num_warps

    half = [found(c, torch.bfloat16) for c in (32, 64, 65, 128, 129, 256)]
    assert half == [(True, 128, 2), (True, 128, 8)] + [(True, 64, 8)] * 2 + [(True, 32, 8)] * 2
    twice = [found(c, torch.bfloat16) for c in (257, 689, 690, 2758, 2759)]
    assert twice == [(False, width, 8) for width in (128, 128, 64, 32, 128)]
    single = [found(c, torch.float32) for c in (32, 64, 128, 129, 512, 513)]
    assert single == [(True, 128, n) for n in (1, 4, 8)] + [(True, 64, 8), (True, 32, 8)] + [
        (False, 128, 8)
    ]
    assert [found(c, torch.float64)[:2] for c in (512, 513)] == [(True, 32), (False, 128)]
    for classes in (300, 689, 690, 2758):
        p = plan((64, classes, 4096))
        assert 3 * p.n_programs * p.BLOCK_N * 2 * classes <= 2 * 50 * 2**20


def test_many_short_rows_share_programs_that_stay() -> None:
    """As many as are resident at once, each with several tiles."""
    for shape in ((262144, 27), (262144, 1000)):
        p = plan(shape)
        assert 32 * p.num_warps * p.n_programs <= 132 * 2048
        assert p.n_programs * p.BLOCK_N * 4 <= shape[0]


def test_rows_in_flight_fit_l2() -> None:
    """Two thirds of 50 MB, down to one row a multiprocessor."""
    for classes in (32000, 66190, 66200, 128256):
        p = plan((8192, classes))
        assert not p.HELD
        assert p.n_programs == 132 or 3 * p.n_programs * classes * 2 <= 2 * 50 * 2**20


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", INNER, ids=str)
def test_neighbours_that_are_rows(shape, reduction, implementation, device) -> None:
    tensors = example(shape, torch.float32, device, weighted=True)
    options = {"label_smoothing": 0.1, "softcap": 5.0}
    check_against_torch(*tensors, implementation, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [4097, 8201])
def test_sequences_with_the_batch_in_the_middle(classes, reduction, implementation, device) -> None:
    """(T, N, C) as (N, C, T): with edges, held and in several tiles."""
    logits, target, weight = example((2, classes, 3), torch.float32, device, weighted=True)
    logits = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    check_against_torch(logits, target, weight, implementation, reduction=reduction)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"inplace": True}], ids=str)
@pytest.mark.parametrize("shape", [(67, 20), (33, 1100)], ids=str)
def test_columns_have_neighbours_that_are_rows(shape, options, kind, device, monkeypatch) -> None:
    """(N, C) column by column: read as (1, C, N)."""
    plan_of, found = tuning.cross_entropy, []

    def planned(x: torch.Tensor, *arguments: Any, **keywords: Any) -> tuning.CrossEntropyPlan:
        found.append((tuple(x.shape), plan_of(x, *arguments, **keywords)))
        return found[-1][1]

    monkeypatch.setattr(tuning, "cross_entropy", planned)
    logits, target, weight = example(shape, torch.float32, device, kind, weighted=True)

    def ours(x: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        assert x.shape == shape and x.stride() == (1, shape[0])
        return fused.cross_entropy(x.mul(1), *arguments, **{**keywords, **options})

    torchs = {key: value for key, value in options.items() if key != "inplace"}
    with fused.backend.use("triton"):
        check_against_torch(logits.t().contiguous().t(), target, weight, "triton", ours, **torchs)
    assert found and all(s == (1, *reversed(shape)) and p.PARTS for s, p in found)


def test_the_negative_of_columns_in_place(device) -> None:
    """What a kernel wrote to a copy is copied back, row for row."""
    logits, target, _ = example((5, 7), torch.float32, device)
    leaf = logits.t().contiguous().t().requires_grad_()
    columns = negated(leaf)
    assert columns.is_neg() and columns.stride(0) < columns.stride(1)
    with fused.backend.use("triton"):
        fused.cross_entropy(columns, target, inplace=True).backward()
    torch.testing.assert_close(leaf.grad, torch.func.grad(F.cross_entropy)(logits, target))


def test_a_million_classes(implementation, device) -> None:
    check_against_torch(*example((1, 1000000), torch.float32, device, ignored=0), implementation)


@pytest.mark.parametrize("shape", [(2, 4097), (2, 8201), (2, 40, 3)], ids=str)
def test_probabilities_and_their_gradient(shape, implementation, device) -> None:
    """With edges, in several tiles, and of neighbours that are rows."""
    tensors = example(shape, torch.float32, device, "probabilities", weighted=True)
    check_against_torch(*tensors, implementation, label_smoothing=0.1, z_loss=0.1)
    logits, target, _ = tensors
    ours, theirs = target.clone().requires_grad_(), target.clone().requires_grad_()
    fused.cross_entropy(logits, ours).backward()  # of the probabilities alone
    F.cross_entropy(logits, theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_gradient_is_scaled_in_several_steps(implementation, monkeypatch, device) -> None:
    """By two programs, of 64 numbers at a time."""
    monkeypatch.setattr(tuning, "scale", lambda n, device: tuning.Pass(64, 8, 2))
    check_against_torch(*example((11, 27), torch.float32, device), implementation)
