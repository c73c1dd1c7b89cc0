"""Attention of a decode step whose tensors never move: rows, positions and lengths are read on the device.

Two ways to the same result: one Triton kernel for each attention, whose cost follows the cached length of each row, or
plain products under a mask, whose cost follows the longest row there could be.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from handler.lm.attention import CrossKV
from handler.lm.transformer import TransformerConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CrossCache:
    """The keys and values of the conditions of a fixed number of rows, for every layer; claimed once.

    Attributes:
        keys, values: `[layers, rows, H, L_max, head_dim]`.
        lengths: int64 `[rows]`, vectors of each row's condition; 0 where it is null.
        null_values: `[layers, H, head_dim]`, what attention over a null condition gives.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    null_values: Tensor

    def write(self, first_row: int, crosses: CrossKV) -> None:
        """Takes in the condition of some rows: for each layer keys and values `[C, H, L, head_dim]`."""
        count, _, length, _ = crosses[0][0].shape
        rows = slice(first_row, first_row + count)
        self.lengths[rows] = length
        for layer, (keys, values) in enumerate(crosses):
            self.keys[layer, rows, :, :length] = keys
            self.values[layer, rows, :, :length] = values


class AttentionKernel(Protocol):
    """Attention of one query for each of N rows."""

    def over_past(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor, past: int
    ) -> Tensor:
        """Writes k and v into the cache and attends to the last `past + 1` positions, this one included.

        Args:
            q: `[N, H, head_dim]`.
            k, v: `[N, H_kv, head_dim]`, H a multiple of H_kv.
            keys, values: `[rows, H_kv, positions, head_dim]`.
            rows, positions: int64 `[N]`, where in the cache each vector stands.
            past: positions before its own that a vector sees.

        Returns:
            `[N, H, head_dim]` in the dtype of q.
        """

    def over_condition(
        self, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, lengths: Tensor, null_value: Tensor
    ) -> Tensor:
        """Attends to the first `lengths` vectors of each row's condition; where there is none, gives `null_value`.

        Args:
            q: `[N, H, head_dim]`.
            keys, values: `[rows, H, L_max, head_dim]`.
            rows: int64 `[N]`, where in the cache each vector stands.
            lengths: int64 `[rows]`.
            null_value: `[H, head_dim]`.

        Returns:
            `[N, H, head_dim]` in the dtype of q.
        """


class MaskedAttention:
    """The plain way: every row reads its whole place in the cache, and a mask hides what is not its own."""

    def over_past(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor, past: int
    ) -> Tensor:
        keys[rows, :, positions] = k.to(keys.dtype)
        values[rows, :, positions] = v.to(values.dtype)
        behind = positions[:, None] - torch.arange(keys.shape[2], device=q.device)  # [N, positions]
        return _masked(q, keys[rows], values[rows], (behind >= 0) & (behind <= past))

    def over_condition(
        self, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, lengths: Tensor, null_value: Tensor
    ) -> Tensor:
        length = lengths[rows, None]  # [N, 1]
        out = _masked(q, keys[rows], values[rows], torch.arange(keys.shape[2], device=q.device) < length)
        return torch.where(length[:, None] > 0, out, null_value.to(q.dtype))


def _masked(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """q `[N, H, head_dim]` over keys and values `[N, H_kv, L, head_dim]` where `mask` `[N, L]` is true."""
    repeat = q.shape[1] // keys.shape[1]
    queries = q.to(keys.dtype).unflatten(1, (keys.shape[1], repeat))  # [N, H_kv, repeat, head_dim]
    # What the mask hides may be anything, NaN too, which no weight and no score of minus infinity would hide.
    keys, values = (x.where(mask[:, None, :, None], 0.0) for x in (keys, values))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None])
    return out.flatten(1, 2).to(q.dtype)


class StaticAttention:
    """The `Attention` of one decode step, over caches that never move.

    Args:
        config: the transformer's.
        kernel: how it is computed.
        keys, values: of the past, `[layers, rows, H_kv, positions, head_dim]`.
        cross: of the conditions, for models with cross-attention.
        rows, positions: int64 `[N]`, where in the caches each vector stands.
    """

    def __init__(
        self,
        config: TransformerConfig,
        kernel: AttentionKernel,
        keys: Tensor,
        values: Tensor,
        cross: CrossCache | None,
        rows: Tensor,
        positions: Tensor,
    ) -> None:
        self.past = keys.shape[3] if config.past_context is None else config.past_context
        self.kernel, self.keys, self.values, self.cross = kernel, keys, values, cross
        self.rows, self.positions = rows, positions

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.kernel.over_past(
            q, k, v, self.keys[layer], self.values[layer], self.rows, self.positions, self.past
        )

    def cross_attention(self, layer: int, q: Tensor) -> Tensor:
        cross = self.cross
        assert cross is not None
        return self.kernel.over_condition(
            q, cross.keys[layer], cross.values[layer], self.rows, cross.lengths, cross.null_values[layer]
        )


@cache
def attention_kernel(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The Triton kernel where it runs and is right, else the plain way, with a warning."""
    if device.type != "cuda":
        return MaskedAttention()
    try:
        from handler.lm.triton_attention import TritonAttention

        kernel = TritonAttention(device)
        check_kernel(kernel, device, dtype)
    # A missing compiler, driver or header each raise something of their own; the plain way is always right.
    except Exception as error:
        logger.warning(
            "the Triton attention kernel cannot be used (%s: %s): each decode step reads the whole cache instead of "
            "what is filled. It needs triton, a C compiler and Python's headers.",
            type(error).__name__,
            error,
        )
        return MaskedAttention()
    return kernel


@torch.inference_mode()
def check_kernel(kernel: AttentionKernel, device: torch.device, dtype: torch.dtype) -> None:
    """Runs a kernel on small random caches beside the plain way.

    Raises:
        ArithmeticError: if they differ.
    """
    sizes, heads, head_dim = (1, 77, 500), 4, 64
    longest = max(sizes)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    keys, values = random(len(sizes), heads, longest, head_dim), random(len(sizes), heads, longest, head_dim)
    q, k, v = (random(len(sizes), heads, head_dim) for _ in range(3))
    rows = torch.arange(len(sizes), device=device)
    positions = torch.tensor(sizes, device=device) - 1
    plain = MaskedAttention()
    null_value = random(heads, head_dim)
    for _ in range(2):  # the second time finds what the first left behind
        expected = plain.over_past(q, k, v, keys.clone(), values.clone(), rows, positions, longest)
        past = kernel.over_past(q, k, v, keys.clone(), values.clone(), rows, positions, longest)
        lengths = positions  # the first is 0
        condition = plain.over_condition(q, keys, values, rows, lengths, null_value)
        across = kernel.over_condition(q, keys, values, rows, lengths, null_value)
        for actual, wanted in ((past, expected), (across, condition)):
            difference = float((actual - wanted).abs().max())
            if not difference < max(1e-3, 10 * torch.finfo(dtype).eps):
                raise ArithmeticError(f"it differs by {difference:g} from the plain products")
