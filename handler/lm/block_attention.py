"""Attention of a decode step on a CPU: weighted sums of table rows, for all rows of the step in one go.

The score of a position is a key's product with the query, the result the values' sum with the weights. Both are sums of
the rows of a table, each times a number, which `embedding_bag` makes at the pace of the memory: one call for all rows
and heads, of which each reads no more than it has, and in an order that depends on nothing beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 32
"""Positions whose keys lie side by side, one dimension after another: the rows of the keys' table."""


def whole_blocks(positions: int) -> int:
    """The positions that are held where so many are needed."""
    return -(-positions // BLOCK) * BLOCK


class BlockCache:
    """The keys and values of a fixed number of rows and positions, for every layer; claimed once, never grown.

    Args:
        layers, rows, heads, positions, head_dim: how many; positions are rounded up to whole blocks.

    Attributes:
        keys: float32 `[layers, rows, H_kv, blocks, head_dim, BLOCK]`.
        values: float32 `[layers, rows, H_kv, blocks * BLOCK, head_dim]`.
    """

    def __init__(self, layers: int, rows: int, heads: int, positions: int, head_dim: int) -> None:
        self.blocks = whole_blocks(positions) // BLOCK
        # Zeros, written and not only promised: memory that is not there must be missed now, not under load.
        self.keys = torch.empty(layers, rows, heads, self.blocks, head_dim, BLOCK).zero_()
        self.values = torch.empty(layers, rows, heads, self.blocks * BLOCK, head_dim).zero_()
        self.key_tables = [keys.flatten(0, -2) for keys in self.keys]
        self.value_tables = [values.flatten(0, -2) for values in self.values]

    def write(self, layer: int, rows: slice, keys: Tensor, values: Tensor) -> None:
        """Takes in the first S positions of some rows, keys and values `[R, H_kv, S, head_dim]`."""
        length = keys.shape[2]
        padded = F.pad(keys.float(), (0, 0, 0, whole_blocks(length) - length))
        blocks = padded.unflatten(2, (-1, BLOCK)).mT  # [R, H_kv, blocks, head_dim, BLOCK]
        self.keys[layer, rows, :, : blocks.shape[2]] = blocks
        self.values[layer, rows, :, :length] = values


class BlockAttention:
    """One query for each of N rows of a cache, over the positions of its row.

    Args:
        cache: where keys and values are.
        rows: the row of the cache of each query.
        first, last: for each query the first and the last position that it sees, both included; with a last of -1 it
            sees none, and its result is 0.
        repeat: heads of a query for each head of the cache.
    """

    def __init__(
        self, cache: BlockCache, rows: Sequence[int], first: Sequence[int], last: Sequence[int], repeat: int = 1
    ) -> None:
        self._cache = cache
        _, _, heads, blocks, head_dim, _ = cache.keys.shape
        start, end = torch.tensor(first)[:, None], torch.tensor(last)[:, None]  # [N, 1]
        most = int(end.max()) // BLOCK + 1
        block = torch.arange(most)
        read = (block >= start // BLOCK) & (block <= end // BLOCK)  # [N, most]
        every_head = torch.arange(heads * repeat) // repeat  # [H]
        place = torch.tensor(rows)[:, None] * heads + every_head  # [N, H], of a row's head in the cache
        self._shape = (len(rows), heads * repeat, most * BLOCK)

        # A bag for each head and block of a query, empty where it is not read. Its table rows are a key's dimensions.
        bags = read[:, None].expand(-1, heads * repeat, -1).flatten()  # [N * H * most]
        self._bags = bags.nonzero().squeeze(1)  # [M]
        self._queries = self._bags // most  # [M]
        key_blocks = (place[:, :, None] * blocks + block).flatten()[self._bags]  # [M]
        self._key_rows = (key_blocks[:, None] * head_dim + torch.arange(head_dim)).int().flatten()
        self._key_offsets = _offsets(bags * head_dim)

        # A bag for each head of a query. Beyond its last position the weights are 0, and are those of that position:
        # what stands behind it may be anything, NaN too.
        position = torch.arange(most * BLOCK)
        value_rows = (
            place[:, :, None] * (blocks * BLOCK) + torch.minimum(position, end)[:, None]
        )  # [N, H, most * BLOCK]
        self._value_rows = value_rows.view(-1, BLOCK)[self._bags].int().flatten()
        self._value_offsets = _offsets((read.sum(1, keepdim=True) * BLOCK).expand(-1, heads * repeat).flatten())
        self._hidden = ((position < start) | (position > end))[:, None]  # [N, 1, most * BLOCK]

    def over(self, layer: int, queries: Tensor) -> Tensor:
        """Scaled queries float32 `[N, H, head_dim]` -> `[N, H, head_dim]`."""
        keys, values = self._cache.key_tables[layer], self._cache.value_tables[layer]
        factors = queries.flatten(0, 1).index_select(0, self._queries)  # [M, head_dim]
        scores = _bag_sums(keys, self._key_rows, self._key_offsets, factors).view(self._shape)
        weights = scores.masked_fill_(self._hidden, -torch.inf).softmax(dim=-1)  # [N, H, most * BLOCK]
        factors = weights.view(-1, BLOCK).index_select(0, self._bags)  # [M, BLOCK]
        return _bag_sums(values, self._value_rows, self._value_offsets, factors).view_as(queries)


def _offsets(lengths: Tensor) -> Tensor:
    """Where each bag of these lengths begins, and where the last ends."""
    return F.pad(lengths.cumsum(0), (1, 0)).int()


def _bag_sums(table: Tensor, rows: Tensor, offsets: Tensor, factors: Tensor) -> Tensor:
    """For each bag the sum of its rows of the table, each times its factor."""
    # Mode 0 is the sum; the last argument says that the offsets end with the last bag's end.
    return torch.embedding_bag(table, rows, offsets, False, 0, False, factors.view(-1), True)[0]
