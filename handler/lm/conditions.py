"""What the language model is given beside the codes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class FusedConditions:
    """The conditions of the R rows of a request that share a prefix length, ready for the language model.

    Attributes:
        rows: R.
        prefix: `[R, P, dim]`, put in front of the codes; P may be 0.
        cross: `[C, L, dim]`, the source of cross-attention of the first C rows; that of the others is null (all
            zeros), so they need none. None where C is 0.
        additive: `[R, S, dim]`, added to the embedded codes of each step, or None.
    """

    rows: int
    prefix: Tensor
    cross: Tensor | None = None
    additive: Tensor | None = None
