"""Tensors of shape (N, C, *S) as the closed forms see them: neighbours in memory as neighbours."""

from typing import NamedTuple, TypeVar

from torch import Tensor

_Seen = TypeVar("_Seen", Tensor, Tensor | None)


class View(NamedTuple):
    """How the tensors of a call, those with classes (N, C, *S) and those without (N, *S), are seen:

        "rows"       (N * S, C) and (N * S,)    whose neighbours are classes: channels_last
        "columns"    (1, C, N) and (1, N)       (N, C) whose neighbours are rows
        "positions"  (N, C, S) and (N, S)       images
        "as it is"

    Rows are in the same order in all of them.
    """

    kind: str
    dim: int  # of tensors with classes

    @staticmethod
    def of(x: Tensor, *others: Tensor | None) -> "View":
        """How logits x and `others` are seen: views of x and of those that have its classes."""
        dim, kind = x.dim(), "as it is"
        if dim == 2:
            if 0 < x.stride(0) < x.stride(1):
                kind = "columns"
        elif x.numel() > 0:
            with_classes = [x, *(t for t in others if t is not None and t.dim() == dim)]
            if all(t.movedim(1, -1).is_contiguous() for t in with_classes):
                kind = "rows"
            elif all(t[0, 0].is_contiguous() for t in with_classes):
                kind = "positions"
        return View(kind, dim)

    def __call__(self, t: _Seen) -> _Seen:
        """t as said above; a number, or none, is itself."""
        if t is None or t.dim() == 0 or self.kind == "as it is":
            return t
        with_classes = t.dim() == self.dim
        if self.kind == "columns":
            return (t.t() if with_classes else t).unsqueeze(0)
        if self.kind == "positions":
            return t.flatten(2 if with_classes else 1)
        return t.movedim(1, -1).flatten(0, -2) if with_classes else t.flatten()
