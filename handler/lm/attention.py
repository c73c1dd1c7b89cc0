"""Where keys and values are kept, and who attends to whom: in a prompt, and in a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from handler.lm.transformer import TransformerConfig


class KVCache:
    """The keys and values of a fixed number of rows and positions, for every layer; claimed once, never grown.

    On a CPU they are float32 whatever the model's dtype: bfloat16 products of single queries are slower there.
    """

    def __init__(
        self, config: TransformerConfig, rows: int, positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        dtype = self.dtype_on(config, device, dtype)
        shape = (config.num_layers, rows, config.num_kv_heads, positions, config.head_dim)
        # Zeros, written and not only promised: memory that is not there must be missed now, not under load.
        self.keys = torch.empty(shape, device=device, dtype=dtype).zero_()
        self.values = torch.empty(shape, device=device, dtype=dtype).zero_()

    @staticmethod
    def dtype_on(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """The dtype of keys and values, for a model that computes in `dtype`."""
        return torch.float32 if device.type == "cpu" or config.attention_as_float32 else dtype

    @classmethod
    def row_bytes(cls, config: TransformerConfig, positions: int, device: torch.device, dtype: torch.dtype) -> int:
        """The bytes of one row."""
        size = cls.dtype_on(config, device, dtype).itemsize
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * positions * size


CrossKV = list[tuple[Tensor, Tensor]]
"""For each layer the condition's keys and values, each `[C, H, L, head_dim]`."""


class PrefillAttention:
    """Causal attention within whole rows of equal length, from their first position on.

    Args:
        config: the transformer's.
        num_rows, length: R and P + S, the rows and the positions of each; vectors come row after row.
        device, dtype: of the model.
        cross: keys and values of the first C rows' condition; the other rows' condition is null.
        null_values: for each layer what attention over a null condition gives, `[H, head_dim]`.
        cache: where to leave keys and values, if they are needed again.
        first_row: the cache row of the first row.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_rows: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
        cross: CrossKV | None = None,
        null_values: Sequence[Tensor] = (),
        cache: KVCache | None = None,
        first_row: int = 0,
    ) -> None:
        self.config, self.dtype = config, KVCache.dtype_on(config, device, dtype)
        self.num_rows, self.length = num_rows, length
        self.cross, self.null_values = cross, null_values
        self.cache, self.rows = cache, slice(first_row, first_row + num_rows)
        self.positions = torch.arange(length, device=device).repeat(num_rows)  # [N]
        self.mask: Tensor | None = None
        if config.past_context is not None:
            position = torch.arange(length, device=device)
            behind = position[:, None] - position[None, :]
            self.mask = (behind >= 0) & (behind <= config.past_context)  # [P + S, P + S]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.num_rows, self.length)).transpose(1, 2)  # [R, heads, P + S, head_dim]

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self._split(q), self._split(k), self._split(v)
        if self.cache is not None:
            self.cache.keys[layer, self.rows, :, : self.length] = k
            self.cache.values[layer, self.rows, :, : self.length] = v
        if self.config.kv_repeat > 1:
            k = k.repeat_interleave(self.config.kv_repeat, dim=1)
            v = v.repeat_interleave(self.config.kv_repeat, dim=1)
        q, k, v = (x.to(self.dtype) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.mask is None)
        return out.transpose(1, 2).flatten(0, 1)

    def cross_attention(self, layer: int, q: Tensor) -> Tensor:
        out = torch.empty_like(q).copy_(self.null_values[layer])  # [N, H, head_dim]
        if self.cross is not None:
            k, v = self.cross[layer]
            attended = F.scaled_dot_product_attention(self._split(q)[: len(k)].to(k.dtype), k, v)
            out[: len(k) * self.length] = attended.transpose(1, 2).flatten(0, 1)
        return out


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one request that stand at the same position, and so share one attention product.

    Attributes:
        vectors: their places among the step's vectors.
        rows: their places in the cache.
        position: of the vector now read; keys and values up to and with it are attended to.
    """

    vectors: slice
    rows: slice
    position: int


class StepAttention:
    """One vector a row: each attends to its own row's past, which ends where the row ends.

    Each span is a product of its own, so its bits depend on nothing beside it (`scaled_dot_product_attention` over
    all rows would make them depend on the number of rows), and nobody reads beyond its own length.

    Args:
        spans: the rows of this step, in the order of its vectors.
        positions: int64 `[N]`.
        crosses: for each request with a condition, the places of its first C vectors and their keys and values.
        null_values: for each layer what attention over a null condition gives, `[H, head_dim]`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        cache: KVCache,
        spans: Sequence[Span],
        positions: Tensor,
        crosses: Sequence[tuple[slice, CrossKV]],
        null_values: Sequence[Tensor],
    ) -> None:
        self.positions, self.null_values = positions, null_values
        self._scale = config.head_dim**-0.5
        self._null_is_zero = not config.bias_attn
        shape = (len(positions), config.num_heads, config.head_dim)
        # Every layer uses the same memory: what it is given back has been used when the next one comes.
        self._q = torch.empty(shape, device=positions.device, dtype=cache.keys.dtype)
        self._own, self._cross = torch.empty_like(self._q), torch.zeros_like(self._q)
        self._pasts = [_Past(config, cache, span, self._q, self._own) for span in spans]
        self._crosses: list[tuple[CrossKV, Tensor, Tensor]] = []
        for vectors, cross in crosses:
            queries, out = (x[vectors].flatten(0, 1).unsqueeze(2) for x in (self._q, self._cross))
            self._crosses.append((cross, queries, out))  # each [C * H, head_dim, 1]

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.mul(q, self._scale, out=self._q)
        for past in self._pasts:
            past.new_keys[layer].copy_(k[past.vectors])
            past.new_values[layer].copy_(v[past.vectors])
            _attend(past.q, past.keys[layer], past.values[layer], past.out)
        return self._own

    def cross_attention(self, layer: int, q: Tensor) -> Tensor:
        torch.mul(q, self._scale, out=self._q)
        if not self._null_is_zero:
            self._cross.copy_(self.null_values[layer])
        for cross, queries, out in self._crosses:
            k, v = cross[layer]  # [C, H, L, head_dim]
            _attend(queries, k.flatten(0, 1), v.flatten(0, 1), out)
        return self._cross


class _Past:
    """What one span reads and writes, as views made once for all layers.

    Attributes:
        vectors: its places among the step's vectors.
        new_keys, new_values: for each layer where those of this step go, `[R, H_kv, head_dim]`.
        keys, values: for each layer those seen, `[R * H_kv, L, head_dim]`.
        q, out: `[R * H_kv, head_dim, repeat]` of the step's queries and results.
    """

    def __init__(self, config: TransformerConfig, cache: KVCache, span: Span, q: Tensor, out: Tensor) -> None:
        first = 0 if config.past_context is None else max(0, span.position - config.past_context)
        keys, values = cache.keys[:, span.rows], cache.values[:, span.rows]  # [layers, R, H_kv, positions, head_dim]
        self.vectors = span.vectors
        self.new_keys, self.new_values = keys[:, :, :, span.position].unbind(), values[:, :, :, span.position].unbind()
        self.keys = keys[:, :, :, first : span.position + 1].flatten(1, 2).unbind()
        self.values = values[:, :, :, first : span.position + 1].flatten(1, 2).unbind()
        self.q, self.out = (x[span.vectors].view(-1, config.kv_repeat, config.head_dim).mT for x in (q, out))


def _attend(q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
    """Attention of scaled queries `[B, head_dim, repeat]` over keys and values `[B, L, head_dim]`, into a view like q.

    Keys come first in their product, which is faster for the few queries there are.
    """
    weights = torch.bmm(keys, q).mT.softmax(dim=-1)  # [B, repeat, L]
    torch.bmm(weights, values, out=out.mT)
