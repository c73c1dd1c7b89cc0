"""Matrix products with weights laid out for the device they run on."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
_ALGORITHMS = {"gelu": "none"}  # the exact one, with erf


def can_prepack() -> bool:
    """Whether this torch has the oneDNN operators with prepacked weights, and they give the right products.

    They are private, so each is tried once on a small product instead of trusted.
    """
    try:
        weight, x = torch.arange(-16.0, 16.0).view(4, 8) / 32, torch.arange(-8.0, 8.0).view(2, 8)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        products = [_packed_product(x, packed, None, activation) for activation in ("", "gelu", "relu")]
        residual = x[:, :4].contiguous()
        products.append(torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, None, "add"))
    except (AttributeError, RuntimeError):
        return False
    plain = x @ weight.T
    expected = [plain, F.gelu(plain), F.relu(plain), residual + plain]
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(products, expected, strict=True))


class Linear:
    """`x @ weight.T + bias`, for weights that never change again.

    On a CPU the weight is prepacked for oneDNN, which streams it once for 1 to 16 rows alike and gives the same bits
    for a row whatever rows stand beside it (from two rows on). The dense weight is not kept.

    Args:
        weight: `[out, in]`, of any dtype and on any device; it is converted.
        bias: `[out]` or None.
        device, dtype: where and in what the product is computed.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.to(device, dtype)
        weight = weight.to(device, dtype)
        self._packed = device.type == "cpu" and dtype in _PACKED_DTYPES and _CAN_PREPACK
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._packed else weight

    def __call__(self, x: Tensor, activation: str = "") -> Tensor:
        """`[N, in]` -> `[N, out]`, with the exact GELU (`gelu`) or ReLU (`relu`) of it where named."""
        if self._packed:
            if len(x) == 1:
                # A single row takes another kernel, with other last bits than the same row beside others.
                return _packed_product(x.expand(2, -1), self._weight, self.bias, activation)[:1]
            return _packed_product(x, self._weight, self.bias, activation)
        return activated(F.linear(x, self._weight, self.bias), activation)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual` `[N, out]` plus the product of x `[N, in]`, summed before it is rounded; a new tensor."""
        if self._packed:
            if len(x) == 1:
                return self.add_to(residual.expand(2, -1).contiguous(), x.expand(2, -1))[:1]
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self.bias, "add")
        return residual + F.linear(x, self._weight, self.bias)


def activated(x: Tensor, activation: str) -> Tensor:
    """The activation of this name; none is x itself."""
    if activation == "gelu":
        return F.gelu(x)
    return F.relu(x) if activation == "relu" else x


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    algorithm = _ALGORITHMS.get(activation, "")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation or "none", [], algorithm)


_CAN_PREPACK = can_prepack()
if not _CAN_PREPACK:
    logger.warning(
        "oneDNN's prepacked linears are missing from torch %s: the decode step on a CPU takes about three times "
        "as long, and the last bits of a result may depend on how many requests run together.",
        torch.__version__,
    )
