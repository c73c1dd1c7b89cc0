"""Matrix products with weights laid out for the device they run on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

TRIED_ROWS = 40
_ALGORITHMS = {"gelu": "none"}  # the exact one, with erf


class Linear:
    """`x @ weight.T + bias`, for weights that never change again. A row's bits never depend on the other rows.

    On a CPU the weight is prepacked for oneDNN, which reads it once for 1 to 16 rows alike; the dense weight is not
    kept. Where oneDNN cannot compute in `dtype` (bfloat16 without AVX-512), the product is computed in float32 and
    rounded to `dtype`. Where it has no prepacked product at all, each row is multiplied alone.

    Args:
        weight: `[out, in]`, of any dtype and on any device; it is converted.
        bias: `[out]` or None.
        device, dtype: where and in what the product is given.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.shape
        self._dtype, self._computed_in = dtype, kept_in(dtype, device)
        self._on_cpu = device.type == "cpu"
        self._packed = self._on_cpu and can_prepack(self._computed_in)
        self.bias = None if bias is None else bias.to(device, dtype).to(self._computed_in)
        weight = weight.to(device, dtype).to(self._computed_in)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._packed else weight

    def __call__(self, x: Tensor, activation: str = "") -> Tensor:
        """`[N, in]` -> `[N, out]`, with the exact GELU (`gelu`) or ReLU (`relu`) of it where named."""
        x = x.to(self._computed_in)
        if self._packed:
            return _packed_product(x, self._weight, self.bias, activation).to(self._dtype)
        return activated(self._plain_product(x), activation).to(self._dtype)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual` `[N, out]` plus the product of x `[N, in]`, summed before it is rounded; a new tensor."""
        x, residual = x.to(self._computed_in), residual.to(self._computed_in)
        if self._packed:
            return _packed_sum(residual, x, self._weight, self.bias).to(self._dtype)
        return (residual + self._plain_product(x)).to(self._dtype)

    def _plain_product(self, x: Tensor) -> Tensor:
        if not self._on_cpu:
            return F.linear(x, self._weight, self.bias)
        # MKL takes other kernels for other numbers of rows, with other last bits.
        return torch.cat([F.linear(row, self._weight, self.bias) for row in x.split(1)])


def activated(x: Tensor, activation: str) -> Tensor:
    """The activation of this name; none is x itself."""
    if activation == "gelu":
        return F.gelu(x)
    return F.relu(x) if activation == "relu" else x


def kept_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which `Linear` keeps weights and computes: `dtype`, or float32 where a CPU cannot compute in it."""
    return dtype if device.type != "cpu" or can_prepack(dtype) else torch.float32


@cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's prepacked products in this dtype are right on this CPU, found out by trying them.

    They are private to torch, and bfloat16 needs AVX-512 or better.
    """
    weight, x, residual = (tensor.to(dtype) for tensor in trial())
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        products = [_packed_product(x, packed, None, activation) for activation in ("", "gelu", "relu")]
        products.append(_packed_sum(residual, x, packed, None))
        same_rows = keeps_rows(lambda rows: _packed_product(rows, packed, None, ""), x)
    except (AttributeError, RuntimeError):
        same_rows, products = False, []
    plain = x.double() @ weight.double().T
    expected = [plain, F.gelu(plain), F.relu(plain), residual + plain]
    bound = max(4 * torch.finfo(dtype).eps, 1e-5)  # rounding of the result, or of the sums
    right = same_rows and all(
        torch.allclose(a.double(), b, rtol=bound, atol=bound) for a, b in zip(products, expected, strict=True)
    )
    if not right:
        slower = "products in float32, rounded to it" if dtype is not torch.float32 else "one product for each row"
        logger.warning(
            "oneDNN has no prepacked products in %s on this CPU (torch %s, %s): it takes %s, which is slower.",
            str(dtype).removeprefix("torch."),
            torch.__version__,
            torch.backends.cpu.get_cpu_capability(),
            slower,
        )
    return right


def keeps_rows(product: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether each row of `product(x)` has the same bits alone, and among the rows before or behind it."""
    whole = product(x)
    return all(
        torch.equal(product(x[:rows]), whole[:rows]) and torch.equal(product(x[-rows:]), whole[-rows:])
        for rows in range(1, len(x))
    )


def trial() -> tuple[Tensor, Tensor, Tensor]:
    """A weight `[48, 64]` that float16 holds exactly, inputs `[TRIED_ROWS, 64]` and a residual `[TRIED_ROWS, 48]`.

    FBGEMM and oneDNN choose their kernels by the number of rows, so a small weight shows what a large one would.
    """
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(48, 64, generator=generator) / 8).half().float()
    return weight, torch.randn(TRIED_ROWS, 64, generator=generator), torch.randn(TRIED_ROWS, 48, generator=generator)


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    if len(x) == 1:
        # A single row takes another kernel, with other last bits than the same row among others.
        return _packed_product(x.expand(2, -1), packed, bias, activation)[:1]
    algorithm = _ALGORITHMS.get(activation, "")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation or "none", [], algorithm)


def _packed_sum(residual: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    if len(x) == 1:
        return _packed_sum(residual.expand(2, -1).contiguous(), x.expand(2, -1), packed, bias)[:1]
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")
