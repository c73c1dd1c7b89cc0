"""Matrix products in float32 with weights kept in float16, on a CPU."""

from __future__ import annotations

import logging
import warnings
from functools import cache

import torch
from torch import Tensor

from handler.linear import Linear, activated, keeps_rows, trial

logger = logging.getLogger(__name__)


@cache
def can_halve() -> bool:
    """Whether FBGEMM's products of float32 inputs and float16 weights are right on this CPU, found out by trying them.

    They are private to torch. With AVX-512 a row's bits are the same for any number of rows; with AVX2 alone they are
    not (1, 2, 7 and 14 rows take another kernel), and weights are then kept in float32.
    """
    weight, x, _ = trial()
    large = x * 2.0**20  # more than float16 holds
    try:
        packed = _pack(weight)
        right = keeps_rows(lambda rows: _product(rows, packed), x) and torch.allclose(
            _product(large, packed).double(), large.double() @ weight.double().T, rtol=1e-5, atol=4.0
        )
    except (AttributeError, RuntimeError):
        right = False
    if not right:
        logger.warning(
            "products with float16 weights depend on the number of rows on this CPU (%s): weights are kept in float32, "
            "which takes twice the memory and time.",
            torch.backends.cpu.get_cpu_capability(),
        )
    return right


def fits_half(weight: Tensor) -> bool:
    """Whether a weight can be kept in float16: it loses nothing, as published weights do not, and this CPU can."""
    if not can_halve():
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
