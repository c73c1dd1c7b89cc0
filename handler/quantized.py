"""Matrix products with weights of 8 bits, on a CPU."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from handler.linear import Linear, activated, keeps_rows, trial

_LARGEST = 127
_ZERO = 128
"""Of the quantised inputs, which the kernel wants unsigned."""


@cache
def can_quantize() -> bool:
    """Whether FBGEMM's products of 8-bit integers are exact on this CPU, found out by trying them.

    They are private to torch, and without VNNI their sums saturate at 16 bits, so the largest product is tried.
    """
    weight, x, _ = trial()
    try:
        packed = _pack(torch.full_like(weight, _LARGEST), torch.ones(len(weight)))
        largest = torch.tensor([[1.0], [-1.0]]).expand(2, weight.shape[1])
        product = _product(largest.contiguous(), packed)
        expected = largest[:, :1] * weight.shape[1] * _LARGEST
        packed = _pack(weight, weight.abs().amax(dim=1) / _LARGEST)
        return torch.allclose(product, expected, rtol=1e-6) and keeps_rows(
            lambda rows: _product(rows, packed), x / x.abs().max()
        )
    except (AttributeError, RuntimeError):
        return False


class QuantizedLinear(Linear):
    """`x @ weight.T + bias` in 8-bit integers: a quarter of the memory, and of the time to read it.

    Each output channel of the weights has a scale, and so has each row of the inputs when it comes, so that a row's
    result depends on no other row. Products and sums are exact; only the two roundings to 8 bits lose anything.

    Args:
        weight: `[out, in]`, of any floating dtype.
        bias: `[out]` or None.

    Only where `can_quantize()`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.float()
        weight = weight.float()
        self._packed_weight = _pack(weight, weight.abs().amax(dim=1).clamp_min(_TINY) / _LARGEST)

    def __call__(self, x: Tensor, activation: str = "") -> Tensor:
        """float32 `[N, in]` -> `[N, out]`, with the exact GELU (`gelu`) or ReLU (`relu`) of it where named."""
        largest = _largest(x)
        product = _product(x / largest, self._packed_weight).mul_(largest)
        return activated(product if self.bias is None else product.add_(self.bias), activation)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual` `[N, out]` plus the product of x `[N, in]`; a new tensor."""
        largest = _largest(x)
        total = torch.addcmul(residual, _product(x / largest, self._packed_weight), largest)
        return total if self.bias is None else total.add_(self.bias)


_TINY = torch.finfo(torch.float32).tiny


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of each row, `[N, 1]`; never 0."""
    return x.abs().amax(dim=1, keepdim=True).clamp_min_(_TINY)  # an infinity norm takes ten times as long


def _pack(weight: Tensor, scale: Tensor) -> torch.ScriptObject:
    zero = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():
        # Torch means to drop its quantised dtypes. Its newer product takes half as long again for 2 to 16 rows.
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(quantized, None)


def _product(x: Tensor, packed: torch.ScriptObject) -> Tensor:
    """Of inputs from -1 to 1, which are rounded to multiples of 1 / 127."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1 / _LARGEST, _ZERO, packed)
