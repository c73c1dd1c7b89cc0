"""Attention of a decode step on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from handler.lm.block_attention import BLOCK, BlockAttention, BlockCache, whole_blocks

LAYERS, ROWS, HEADS, POSITIONS, HEAD_DIM = 2, 5, 3, 3 * BLOCK + 7, 24
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, POSITIONS]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    kept = torch.get_num_threads()
    yield
    torch.set_num_threads(kept)


def filled(heads: int = HEADS) -> tuple[BlockCache, list[Tensor], list[Tensor]]:
    """A cache in which row i holds `LENGTHS[i]` positions and NaN behind them; and its keys and values."""
    cache = BlockCache(LAYERS, ROWS, heads, POSITIONS, HEAD_DIM)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    generator = torch.Generator().manual_seed(0)
    keys, values = [], []
    for row, length in enumerate(LENGTHS):
        k, v = (torch.randn(LAYERS, heads, length, HEAD_DIM, generator=generator) for _ in range(2))
        for layer in range(LAYERS):
            cache.write(layer, slice(row, row + 1), k[layer][None], v[layer][None])
        # What `write` fills its last block up with is nobody's either.
        cache.keys[:, row, :, (length - 1) // BLOCK, :, (length - 1) % BLOCK + 1 :] = float("nan")
        keys.append(k)
        values.append(v)
    return cache, keys, values


def queries(count: int, heads: int = HEADS) -> Tensor:
    return torch.randn(count, heads, HEAD_DIM, generator=torch.Generator().manual_seed(1))


def plain(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`[H, head_dim]` over `[H, L, head_dim]`."""
    return ((query[:, None] @ keys.mT).softmax(-1) @ values)[:, 0]


@pytest.mark.parametrize("layer", range(LAYERS))
def test_each_query_sees_the_past_of_its_own_row_and_nothing_else(layer: int) -> None:
    cache, keys, values = filled()
    rows = [3, 0, 4, 1, 2]
    q = queries(len(rows))
    attention = BlockAttention(cache, rows, [0] * len(rows), [LENGTHS[row] - 1 for row in rows])
    for query, row, out in zip(q, rows, attention.over(layer, q), strict=True):
        torch.testing.assert_close(out, plain(query, keys[row][layer], values[row][layer]), atol=1e-5, rtol=1e-5)


def test_a_limited_past_begins_where_it_is_told_to() -> None:
    cache, keys, values = filled()
    last, first, q = POSITIONS - 1, [0, 5, BLOCK, 2 * BLOCK + 1, POSITIONS - 1], queries(5)
    out = BlockAttention(cache, [4] * 5, first, [last] * 5).over(0, q)
    for query, start, actual in zip(q, first, out, strict=True):
        expected = plain(query, keys[4][0][:, start:], values[4][0][:, start:])
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    cache, keys, values = filled()
    q = queries(3)
    out = BlockAttention(cache, [0, 4, 2], [0, 0, 0], [-1, POSITIONS - 1, -1]).over(0, q)
    assert not out[0].any()
    assert not out[2].any()
    torch.testing.assert_close(out[1], plain(q[1], keys[4][0], values[4][0]), atol=1e-5, rtol=1e-5)


def test_several_heads_of_a_query_share_one_of_the_cache() -> None:
    cache, keys, values = filled(heads=2)
    q = queries(2, heads=6)
    out = BlockAttention(cache, [3, 4], [0, 0], [LENGTHS[3] - 1, LENGTHS[4] - 1], repeat=3).over(1, q)
    for query, row, actual in zip(q, [3, 4], out, strict=True):
        k, v = (x[row][1].repeat_interleave(3, dim=0) for x in (keys, values))
        torch.testing.assert_close(actual, plain(query, k, v), atol=1e-5, rtol=1e-5)


def test_a_result_has_the_same_bits_whoever_is_beside_it_and_on_any_number_of_threads() -> None:
    cache, _, _ = filled()
    q, last = queries(ROWS), [length - 1 for length in LENGTHS]
    together = None
    for count in (1, 2):
        torch.set_num_threads(count)
        out = BlockAttention(cache, list(range(ROWS)), [0] * ROWS, last).over(0, q)
        together = out if together is None else together
        assert torch.equal(out, together)
        for row in range(ROWS):
            alone = BlockAttention(cache, [row], [0], [last[row]]).over(0, q[row : row + 1])
            assert torch.equal(alone[0], together[row])


def test_positions_are_held_in_whole_blocks() -> None:
    assert [whole_blocks(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [0, BLOCK, BLOCK, 2 * BLOCK]
    assert BlockCache(1, 2, 3, BLOCK + 1, 4).values.shape == (1, 2, 3, 2 * BLOCK, 4)
