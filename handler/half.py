"""Matrix products in float32 with weights kept in float16, on a CPU."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from handler.linear import Linear, activated


def can_halve() -> bool:
    """Whether this torch multiplies float32 inputs by float16 weights, in float32.

    The operators are private, so a product that float16 could not hold is tried once.
    """
    weight = torch.tensor([[1.0, 2.0**-10], [3.0, -0.5]])
    x = torch.tensor([[1.0, 2.0**-10], [2.0**20, 1.0]])
    try:
        product = _product(x, _pack(weight))
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(product, x @ weight.T)


def fits_half(weight: Tensor) -> bool:
    """Whether float16 holds every value of a weight, as of those that were published in it; and can be used."""
    if not _CAN_HALVE:
        return False
    return weight.dtype is torch.float16 or bool(torch.equal(weight.half().to(weight.dtype), weight))


class HalfLinear(Linear):
    """`x @ weight.T + bias` in float32, of a weight that float16 holds exactly: half the memory, and half to read.

    Each weight is widened on its way to the product, so nothing is lost, and a row has the same bits whatever rows
    stand beside it.

    Args:
        weight: `[out, in]`, for which `fits_half` holds.
        bias: `[out]` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.float()
        self._packed_weight = _pack(weight.float())

    def __call__(self, x: Tensor, activation: str = "") -> Tensor:
        """float32 `[N, in]` -> `[N, out]`, with the exact GELU (`gelu`) or ReLU (`relu`) of it where named."""
        product = _product(x, self._packed_weight)
        return activated(product if self.bias is None else product.add_(self.bias), activation)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual` `[N, out]` plus the product of x `[N, in]`; a new tensor."""
        total = _product(x, self._packed_weight)
        if self.bias is not None:
            total.add_(self.bias)
        return total.add_(residual)


def _pack(weight: Tensor) -> torch.ScriptObject:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch means to move its quantised operators elsewhere
        return torch.ops.quantized.linear_prepack_fp16(weight, None)


def _product(x: Tensor, packed: torch.ScriptObject) -> Tensor:
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)


_CAN_HALVE = can_halve()
