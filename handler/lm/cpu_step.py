"""The decode step on a CPU: every row reads its own length, whatever the others' are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from handler.lm.attention import CrossKV
from handler.lm.block_attention import BLOCK, BlockAttention, BlockCache
from handler.lm.conditions import FusedConditions
from handler.lm.decoder import Decoder
from handler.lm.model import LanguageModel
from handler.lm.transformer import TransformerConfig


class CpuDecoder(Decoder):
    """A `Decoder` for a CPU.

    Args:
        lm: the language model.
        requests, rows: how many windows, and rows of all of them, can be under way at once.
        positions: the longest row, prefix included.
        steps: the longest sequence.
        condition_length: the longest cross-attention source.
    """

    cache: BlockCache

    def __init__(
        self, lm: LanguageModel, requests: int, rows: int, positions: int, steps: int, condition_length: int
    ) -> None:
        config = lm.config
        super().__init__(
            lm,
            BlockCache(config.num_layers, rows, config.num_kv_heads, positions, config.head_dim),
            torch.zeros(requests, lm.num_codebooks, steps, dtype=torch.long),
            torch.zeros(requests, steps, lm.num_codebooks),
            condition_length,
        )
        self._conditions = BlockCache(config.num_layers, rows, config.num_heads, condition_length, config.head_dim)
        self._condition_lengths = [0] * rows
        self._null_values = [value.float() for value in lm.null_values()]

    def step(self) -> None:
        """Generates one more token of every codebook of every window that is not done."""
        active = [slot for slot in self.slots if not slot.done]
        if not active:
            return
        rows: list[int] = []
        positions: list[int] = []
        additives: list[Tensor] = []
        for slot in active:
            rows += slot.rows
            for group in slot.window.conditions:
                positions += [group.prefix.shape[1] + slot.step] * group.rows
                if group.additive is not None:  # a model has them for all its requests or for none
                    additives.append(group.additive[:, slot.step])
        attention = StepAttention(
            self.lm.config,
            self.cache,
            rows,
            positions,
            self._conditions,
            [self._condition_lengths[row] for row in rows],
            self._null_values,
        )
        index = torch.tensor([slot.index for slot in active for _ in slot.rows])  # [N]
        step = torch.tensor([slot.step for slot in active for _ in slot.rows])  # [N]
        tokens = self.sequences[index, :, step]  # [N, K]
        additive = torch.cat(additives) if additives else None  # [N, dim]
        self._sample(active, self.lm.step(tokens, additive, attention))

    def _take_in(self, first_row: int, group: FusedConditions, cross: CrossKV | None) -> None:
        self._condition_lengths[first_row : first_row + group.rows] = [0] * group.rows
        for layer, (keys, values) in enumerate(cross or []):
            conditional = slice(first_row, first_row + len(keys))  # the rows behind them have a null condition
            self._conditions.write(layer, conditional, keys, values)
            self._condition_lengths[conditional] = [keys.shape[2]] * len(keys)


class StepAttention:
    """One vector a row, on a CPU: each attends to its own row's past, and to its row's condition.

    Args:
        config: the transformer's.
        past: the keys and values of the past.
        rows, positions: for each vector its row of the caches, and its position there.
        condition: the keys and values of the conditions.
        condition_lengths: for each vector the vectors of its row's condition; 0 where it is null.
        null_values: for each layer what attention over a null condition gives, `[H, head_dim]`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        past: BlockCache,
        rows: Sequence[int],
        positions: Sequence[int],
        condition: BlockCache,
        condition_lengths: Sequence[int],
        null_values: Sequence[Tensor],
    ) -> None:
        self.positions, self.null_values = torch.tensor(positions), null_values
        self._past, self._scale = past, config.head_dim**-0.5
        behind = max(positions) if config.past_context is None else config.past_context
        first = [max(0, position - behind) for position in positions]
        self._own = BlockAttention(past, rows, first, positions, config.kv_repeat)
        row = torch.tensor(rows)[:, None, None]
        block, lane = (x[:, None, None] for x in (self.positions // BLOCK, self.positions % BLOCK))
        head, dim = torch.arange(config.num_kv_heads)[:, None], torch.arange(config.head_dim)
        key = ((row * config.num_kv_heads + head) * past.blocks + block) * config.head_dim + dim
        self._new_keys = key * BLOCK + lane  # [N, H_kv, head_dim], places among a layer's numbers
        self._new_values = (row.flatten(), slice(None), self.positions)
        self._cross: BlockAttention | None = None
        if any(condition_lengths):
            last = [length - 1 for length in condition_lengths]
            self._cross = BlockAttention(condition, rows, [0] * len(rows), last)
        self._null = torch.tensor([length == 0 for length in condition_lengths])[:, None, None]  # [N, 1, 1]
        self._null_is_zero = not config.bias_attn

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._past.key_tables[layer].put_(self._new_keys, k.float())
        self._past.values[layer][self._new_values] = v.float()
        return self._own.over(layer, q.float() * self._scale)

    def cross_attention(self, layer: int, q: Tensor) -> Tensor:
        if self._cross is None:
            return self.null_values[layer].expand_as(q)
        out = self._cross.over(layer, q.float() * self._scale)  # [N, H, head_dim]
        return out if self._null_is_zero else torch.where(self._null, self.null_values[layer], out)
