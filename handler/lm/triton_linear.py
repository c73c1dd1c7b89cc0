"""Matrix products of few rows as Triton kernels, with the norm before them and what follows them.

With few rows a decode step is a chain of short kernels, and starting them costs as much as their work; so the norm
before a product and the activation or residual after it are done in the product's own kernel. Sums are float32.
Only `fused_step.py` imports this, as Triton may be missing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, nn

ROWS = 16
"""The rows of one product; the tensor cores take no fewer, so 1 to 16 rows cost the same."""


@triton.jit
def _moments(
    x_ptr: tl.tensor, count: int, inputs: tl.constexpr, block_rows: tl.constexpr, block_in: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The mean of each row, and one over its standard deviation."""
    rows = tl.arange(0, block_rows)
    mean = tl.zeros([block_rows], dtype=tl.float32)
    squares = tl.zeros([block_rows], dtype=tl.float32)  # of the distances from the mean
    for first in tl.static_range(0, inputs, block_in):
        ins = first + tl.arange(0, block_in)
        mask = (rows < count)[:, None] & (ins < inputs)[None, :]
        x = tl.load(x_ptr + rows[:, None] * inputs + ins[None, :], mask=mask, other=0.0).to(tl.float32)
        here = block_in if first + block_in <= inputs else inputs - first
        # Joins the moments of this part with those before it (Chan, Golub and LeVeque 1979).
        part_mean = tl.sum(x, axis=1) / here
        away = tl.where((ins < inputs)[None, :], x - part_mean[:, None], 0.0)
        shift = part_mean - mean
        mean += shift * (here / (first + here))
        squares += tl.sum(away * away, axis=1) + shift * shift * (first * here / (first + here))
    return mean, tl.rsqrt(squares / inputs + 1e-5)


@triton.jit
def _linear(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    norm_bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    count: int,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    norms: tl.constexpr,
    biased: tl.constexpr,
    activation: tl.constexpr,
    adds: tl.constexpr,
    block_rows: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
) -> None:
    """Some output features of all rows; grid (outputs / block_out,).

    `norms`: of the layer-normalised input; `activation`: "", "gelu" or "relu" of the product; `adds`: onto `out`.
    """
    rows = tl.arange(0, block_rows)
    outs = tl.program_id(0) * block_out + tl.arange(0, block_out)
    real_row, real_out = rows < count, outs < outputs
    if norms:
        mean, scale = _moments(x_ptr, count, inputs, block_rows, block_in)
    acc = tl.zeros([block_rows, block_out], dtype=tl.float32)
    for first in range(0, inputs, block_in):
        ins = first + tl.arange(0, block_in)
        real_in = ins < inputs
        weight = tl.load(
            weight_ptr + outs[None, :] * inputs + ins[:, None],
            mask=real_out[None, :] & real_in[:, None],
            other=0.0,
            eviction_policy="evict_first",
        )  # [block_in, block_out]
        x = tl.load(
            x_ptr + rows[:, None] * inputs + ins[None, :], mask=real_row[:, None] & real_in[None, :], other=0.0
        )  # [block_rows, block_in]
        if norms:
            gain = tl.load(norm_weight_ptr + ins, mask=real_in, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias_ptr + ins, mask=real_in, other=0.0).to(tl.float32)
            normed = (x.to(tl.float32) - mean[:, None]) * scale[:, None] * gain[None, :] + shift[None, :]
            x = normed.to(weight.dtype)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    if biased:
        acc += tl.load(bias_ptr + outs, mask=real_out, other=0.0).to(tl.float32)[None, :]
    if activation == "gelu":
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    elif activation == "relu":
        acc = tl.maximum(acc, 0.0)
    at = out_ptr + rows[:, None] * outputs + outs[None, :]
    mask = real_row[:, None] & real_out[None, :]
    if adds:
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, acc, mask=mask)


def num_stages(value_bytes: int) -> int:
    """Parts of the weight under way at once; of float32's no more than three fit a multiprocessor of any GPU."""
    return 4 if value_bytes <= 2 else 3


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    norm: nn.LayerNorm | None = None,
    activation: str = "",
    adds: bool = False,
) -> None:
    """Writes `activation(norm(x) @ weight.T + bias)` into `out`, or adds it there.

    Args:
        x: `[N, in]`, N at most `ROWS`.
        weight: `[out, in]`.
        bias: `[out]` or None.
        out: `[N, out]`; not x itself.
        norm: layer norm of the input, of eps 1e-5.
        activation: "", "gelu" or "relu".
        adds: onto what `out` holds.
    """
    out_features, in_features = weight.shape
    # Few outputs a program where there are few, so that every multiprocessor reads its part of the weight.
    block_out = 16 if out_features >= 2048 else 8
    _linear[(triton.cdiv(out_features, block_out),)](
        x,
        weight,
        weight if bias is None else bias,
        weight if norm is None else norm.weight,
        weight if norm is None else norm.bias,
        out,
        len(x),
        inputs=in_features,
        outputs=out_features,
        norms=norm is not None,
        biased=bias is not None,
        activation=activation,
        adds=adds,
        block_rows=ROWS,
        block_out=block_out,
        block_in=min(256, triton.next_power_of_2(in_features)),
        num_warps=4,
        num_stages=num_stages(weight.element_size()),
    )
