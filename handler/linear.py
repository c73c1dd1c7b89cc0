"""Matrix products with weights laid out for the device they run on."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

_PACKED_DTYPES = (torch.float32, torch.bfloat16)


def can_prepack() -> bool:
    """Whether this torch has the oneDNN operators with prepacked weights, and they give the right product.

    They are private, so they are tried once on a small product instead of trusted.
    """
    try:
        weight, x = torch.arange(32.0).view(4, 8), torch.arange(16.0).view(2, 8)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        product = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return bool(torch.allclose(product, x @ weight.T))


_CAN_PREPACK = can_prepack()
if not _CAN_PREPACK:
    logger.warning(
        "oneDNN's prepacked linears are missing from torch %s: the decode step on a CPU takes about three times "
        "as long, and the last bits of a result may depend on how many requests run together.",
        torch.__version__,
    )


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

    def __call__(self, x: Tensor) -> Tensor:
        """`[N, in]` -> `[N, out]`."""
        if self._packed:
            if len(x) == 1:
                # A single row takes another kernel, with other last bits than the same row beside others.
                return self(x.expand(2, -1))[:1]
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return F.linear(x, self._weight, self.bias)
