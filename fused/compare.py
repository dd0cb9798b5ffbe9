"""Gradient tables: exact | approximate | maxdiff, for any two sets of named tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """How one tensor compares with its reference."""

    name: str
    exact: bool  # every element equal
    approximate: bool  # torch.allclose, with the table's rtol and atol
    maxdiff: float  # largest absolute difference; NaN if either side has one


@dataclass(frozen=True)
class Table:
    """Rows of a comparison; `str` prints them aligned."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def exact(self) -> int:
        """How many rows are exact."""
        return sum(row.exact for row in self.rows)

    @property
    def approximate(self) -> int:
        """How many rows are approximately equal."""
        return sum(row.approximate for row in self.rows)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        return "\n".join(
            f"{row.name:{width}} | exact: {row.exact!s:5} | approximate: {row.approximate!s:5} "
            f"| maxdiff: {row.maxdiff:.4g}"
            for row in self.rows
        )


def compare(
    ours: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    *,
    rtol: float = 1e-5,
    atol: float = 1e-8,
) -> Table:
    """Compares each tensor of `ours` with the one of the same name in `reference`.

    Args:
        ours: gradients by name; their order is the table's.
        reference: what they should be, same names, shapes and dtypes.
        rtol, atol: approximate means |ours - reference| <= atol + rtol * |reference| everywhere.

    Raises:
        ValueError: names, shapes or dtypes that do not match.
    """
    if ours.keys() != reference.keys():
        raise ValueError(
            "compare: expected the same names on both sides, but only one side has "
            + ", ".join(sorted(ours.keys() ^ reference.keys()))
        )
    return Table(tuple(_row(name, t, reference[name], rtol, atol) for name, t in ours.items()))


def finite_difference(f: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-6) -> Tensor:
    """The slope (f(x + h) - f(x)) / h of an elementwise function at every element of x.

    Its error is of order h * f'' from the step and eps / h from rounding: use float64.
    """
    return (f(x + h) - f(x)) / h


def _row(name: str, ours: Tensor, reference: Tensor, rtol: float, atol: float) -> Row:
    if ours.shape != reference.shape:
        raise ValueError(
            f"compare: expected {name} of shape {tuple(reference.shape)}, got {tuple(ours.shape)}"
        )
    if ours.dtype != reference.dtype:
        raise ValueError(f"compare: expected {name} in {reference.dtype}, got {ours.dtype}")
    ours, reference = ours.detach(), reference.detach()
    difference = (_widened(ours) - _widened(reference)).abs()
    difference = difference.masked_fill(ours == reference, 0)  # inf - inf is NaN
    return Row(
        name,
        exact=torch.equal(ours, reference),
        approximate=torch.allclose(ours, reference, rtol, atol),
        maxdiff=difference.max().item() if difference.numel() else 0.0,
    )


def _widened(t: Tensor) -> Tensor:
    """In which differences do not wrap or overflow."""
    if t.dtype.itemsize >= 4:
        return t
    return t.float() if t.is_floating_point() else t.long()
