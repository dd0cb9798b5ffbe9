"""Tensors of shape (N, C, *S) as the kernels see them: (N, C, S), a row being one (n, s).

A tensor may be the negative of what is in its memory, as the imaginary part of a conjugate is; that
is resolved here, for a kernel does not know of it.
"""

import torch


def inner(x: torch.Tensor) -> torch.Tensor:
    """x (N, C, *S) as (N, C, S); a view wherever one exists."""
    x = x.resolve_neg()
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


def rows_are_neighbours(x: torch.Tensor) -> bool:
    """Whether x is (N, C) column by column in memory. It is then better seen as (1, C, N), whose
    neighbours are rows: `inner` transposed."""
    # A negative's `inner` is a copy, which `copy_back` takes as it is.
    return x.dim() == 2 and 0 < x.stride(0) < x.stride(1) and x.shape[0] > 1 and not x.is_neg()


def vector(x: torch.Tensor | None) -> torch.Tensor | None:
    """x (C,) with its elements side by side, as the kernels read it; itself wherever it is so."""
    return None if x is None else x.resolve_neg().contiguous()


def copy_back(tensor: torch.Tensor | None, rows: torch.Tensor | None) -> None:
    """What a kernel wrote to rows = inner(tensor) or vector(tensor), where that was a copy."""
    if tensor is not None and rows is not None and tensor.data_ptr() != rows.data_ptr():
        tensor.copy_(rows.view(tensor.shape))


def lies_as(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether x has the strides of another tensor of its shape, wherever these matter."""
    steps = zip(x.shape, x.stride(), other.stride(), strict=True)
    return all(size == 1 or a == b for size, a, b in steps)


def strides(x: torch.Tensor | None) -> tuple[int, int, int]:
    """The strides of an (N, C, S) tensor, zeros for none."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))
