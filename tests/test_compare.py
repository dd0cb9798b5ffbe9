"""Gradient tables and slopes."""

import pytest
import torch

from fused.compare import compare, finite_difference

T = torch.tensor([1.0, 2.0])


def test_exact_approximate_and_different() -> None:
    table = compare(
        {"same": T, "near": T + 1e-6, "far": T + 0.5},
        {"same": T.clone(), "near": T, "far": T},
    )
    assert [(r.name, r.exact, r.approximate) for r in table] == [
        ("same", True, True),
        ("near", False, True),
        ("far", False, False),
    ]
    assert table.rows[2].maxdiff == 0.5
    assert (len(table), table.exact, table.approximate) == (3, 1, 2)


def test_prints_aligned() -> None:
    """In the order of the first."""
    lines = str(compare({"logprobs": T, "h": T}, {"h": T, "logprobs": T + 1})).splitlines()
    assert lines == [
        "logprobs | exact: False | approximate: False | maxdiff: 1",
        "h        | exact: True  | approximate: True  | maxdiff: 0",
    ]


def test_nan_is_neither_exact_nor_approximate() -> None:
    (row,) = compare({"x": T * float("nan")}, {"x": T})
    assert not row.exact and not row.approximate and row.maxdiff != row.maxdiff


def test_equal_infinities_and_whole_numbers() -> None:
    (row,) = compare({"x": T / 0}, {"x": T / 0})
    assert row.exact and row.maxdiff == 0.0
    one, three = (torch.tensor([n], dtype=torch.uint8) for n in (1, 3))
    assert [row.maxdiff for row in compare({"x": one}, {"x": three})] == [2.0]  # 254 in 8 bits
    assert [row.maxdiff for row in compare({"x": one > 2}, {"x": three > 2})] == [1.0]
    large = torch.tensor([2**53])
    assert [row.maxdiff for row in compare({"x": large + 1}, {"x": large})] == [1.0]
    half = torch.tensor([6e4], dtype=torch.float16)
    assert [row.maxdiff for row in compare({"x": half}, {"x": -half})] == [2 * half.item()]


def test_tolerances() -> None:
    (row,) = compare({"x": T + 0.1}, {"x": T}, rtol=0, atol=0.2)
    assert row.approximate
    for ours, approximate in ((1.5, False), (0.75, True)):  # rtol is of the reference
        (row,) = compare({"x": T * ours}, {"x": T}, rtol=0.3, atol=0)
        assert row.approximate == approximate
    (row,) = compare({"x": T}, {"x": T * 1.4}, rtol=0.3, atol=0)
    assert row.approximate


def test_empty_tensors_and_tables() -> None:
    (row,) = compare({"x": T[:0]}, {"x": T[:0]})
    assert row.exact and row.maxdiff == 0.0
    assert str(compare({}, {})) == ""


def test_refuses_other_names_shapes_and_dtypes() -> None:
    with pytest.raises(ValueError, match=r"expected a in torch.float64, got torch.float32"):
        compare({"a": T.float()}, {"a": T.double()})
    with pytest.raises(ValueError, match="only one side has a, b"):
        compare({"a": T}, {"b": T})
    with pytest.raises(ValueError, match="only one side has b"):
        compare({"a": T}, {"a": T, "b": T})
    with pytest.raises(ValueError, match=r"expected a of shape \(1, 2\), got \(2,\)"):
        compare({"a": T}, {"a": T.unsqueeze(0)})
    with pytest.raises(ValueError, match=r"expected a of shape \(2,\), got \(1,\)"):
        compare({"a": T[:1]}, {"a": T})


def test_finite_difference() -> None:
    x = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    slope = finite_difference(lambda t: t**2, x, h=1e-3)
    torch.testing.assert_close(slope, 2 * x + 1e-3, rtol=0, atol=1e-9)
