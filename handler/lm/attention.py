"""Where keys and values are kept, and who attends to whom in a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from handler.lm.block_attention import BlockCache
from handler.lm.transformer import TransformerConfig


class KVCache:
    """The keys and values of a fixed number of rows and positions, for every layer; claimed once, never grown."""

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
        """The dtype of keys and values, for a model that computes in `dtype`; float32 on a CPU, whatever that is."""
        return torch.float32 if device.type == "cpu" or config.attention_as_float32 else dtype

    @classmethod
    def row_bytes(cls, config: TransformerConfig, positions: int, device: torch.device, dtype: torch.dtype) -> int:
        """The bytes of one row."""
        size = cls.dtype_on(config, device, dtype).itemsize
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * positions * size

    def write(self, layer: int, rows: slice, keys: Tensor, values: Tensor) -> None:
        """Takes in the first S positions of some rows, keys and values `[R, H_kv, S, head_dim]`."""
        self.keys[layer, rows, :, : keys.shape[2]] = keys
        self.values[layer, rows, :, : keys.shape[2]] = values


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
        cache: KVCache | BlockCache | None = None,
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
            self.cache.write(layer, self.rows, k, v)
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
