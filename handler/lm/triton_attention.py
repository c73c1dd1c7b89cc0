"""Attention of single queries over cached keys and values, as one Triton kernel a layer.

Each program reads a share of one row's cached positions for one head; the last of a head's programs to finish joins
the shares (split-K, as Flash-Decoding). Shares depend on the row's own length and the number of programs alone.
Only `decode_attention.py` imports this, as Triton may be missing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Positions that one program reads at a time."""

MOST_SPLITS = 16


@triton.jit
def _attend(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    null_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    q_stride: int,
    k_stride: int,
    v_stride: int,
    row_stride: int,
    head_stride: int,
    past: int,
    scale: float,
    repeat: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    splits: tl.constexpr,
    block: tl.constexpr,
    writes: tl.constexpr,
) -> None:
    """One share of one head of one vector; grid (N, H, splits).

    With `writes` lengths are the vectors' own positions, and the vector's own key and value take part and are written
    there; else they are the lengths of the cache's rows.
    """
    n, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    row = tl.load(rows_ptr + n)
    base = row * row_stride + (head // repeat) * head_stride
    dims = tl.arange(0, padded_dim)
    inside = dims < head_dim
    q = tl.load(q_ptr + n * q_stride + head * head_dim + dims, mask=inside, other=0.0).to(tl.float32) * scale
    if writes:
        position = tl.load(lengths_ptr + n)
        first = tl.maximum(position - past, 0)
        length = position + 1 - first
        own = n * k_stride + (head // repeat) * head_dim + dims
        own_key = tl.load(k_ptr + own, mask=inside, other=0.0)
        own_value = tl.load(v_ptr + n * v_stride + (head // repeat) * head_dim + dims, mask=inside, other=0.0)
        if split == 0:
            here = base + position * head_dim + dims
            tl.store(keys_ptr + here, own_key, mask=inside)
            tl.store(values_ptr + here, own_value, mask=inside)
    else:
        first = 0
        length = tl.load(lengths_ptr + row)
    share = tl.cdiv(tl.cdiv(length, splits), block) * block
    start = first + split * share
    end = tl.minimum(start + share, first + length)

    highest = -float("inf")
    total = 0.0
    acc = tl.zeros([padded_dim], dtype=tl.float32)
    for part in range(start, end, block):
        places = part + tl.arange(0, block)
        seen = places < end
        # Its own place may not be written yet.
        cached = seen & (places < position) if writes else seen
        at = base + places[:, None] * head_dim + dims[None, :]
        mask = cached[:, None] & inside[None, :]
        k = tl.load(keys_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [block, head_dim]
        v = tl.load(values_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if writes:
            is_own = (places == position)[:, None]
            k = tl.where(is_own, own_key.to(tl.float32)[None, :], k)
            v = tl.where(is_own, own_value.to(tl.float32)[None, :], v)
        scores = tl.where(seen, tl.sum(k * q[None, :], axis=1), -float("inf"))  # [block]
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        weights = tl.exp(scores - higher)
        rescale = tl.exp(highest - higher)
        total = total * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        highest = higher

    out_at = out_ptr + (n * heads + head) * head_dim + dims
    if splits == 1:
        if length > 0:
            tl.store(out_at, acc / total, mask=inside)
        else:
            tl.store(out_at, tl.load(null_ptr + head * head_dim + dims, mask=inside, other=0.0), mask=inside)
    else:
        # One line of the partial results: the weighted sum, then the total weight, then the highest score.
        line = padded_dim + 2
        of_head = partial_ptr + (n * heads + head) * splits * line
        tl.store(of_head + split * line + dims, acc)
        tl.store(of_head + split * line + padded_dim, total)
        tl.store(of_head + split * line + padded_dim + 1, highest)
        tl.debug_barrier()  # all of this program's stores come before its arrival is counted
        arrived = tl.atomic_add(counter_ptr + n * heads + head, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            tl.store(counter_ptr + n * heads + head, 0)
            if length > 0:
                lines = tl.arange(0, splits)
                totals = tl.load(of_head + lines * line + padded_dim, cache_modifier=".cg")
                highests = tl.load(of_head + lines * line + padded_dim + 1, cache_modifier=".cg")
                sums = tl.load(
                    of_head + lines[:, None] * line + dims[None, :], cache_modifier=".cg"
                )  # [splits, head_dim]
                weights = tl.exp(highests - tl.max(highests, axis=0))  # 0 for a share without positions
                joined = tl.sum(sums * weights[:, None], axis=0) / tl.sum(totals * weights, axis=0)
                tl.store(out_at, joined, mask=inside)
            else:
                tl.store(out_at, tl.load(null_ptr + head * head_dim + dims, mask=inside, other=0.0), mask=inside)


class TritonAttention:
    """`AttentionKernel` by Triton, with float32 sums whatever the dtype of the cache.

    Its scratch memory is claimed at the first use of each number of rows, which must be before a graph is captured.

    Args:
        device: where it runs.
        programs: how many programs fill the device; None asks it (two for each multiprocessor).
    """

    def __init__(self, device: torch.device, programs: int | None = None) -> None:
        if programs is None:
            programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
        self.device, self.programs = device, programs
        self._scratch: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def over_past(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor, past: int
    ) -> Tensor:
        return self._run(q, k, v, keys, values, rows, positions, past, q, writes=True)

    def over_condition(
        self, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, lengths: Tensor, null_value: Tensor
    ) -> Tensor:
        return self._run(q, q, q, keys, values, rows, lengths, 0, null_value, writes=False)

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
        lengths: Tensor,
        past: int,
        null_value: Tensor,
        writes: bool,
    ) -> Tensor:
        count, heads, head_dim = q.shape
        splits = self._splits(count * heads, keys.shape[2])
        padded = triton.next_power_of_2(head_dim)
        partial, counter = self._scratch_for(count * heads, splits, padded)
        out = torch.empty(count, heads, head_dim, device=q.device, dtype=q.dtype)
        q, k, v = _packed(q), _packed(k), _packed(v)
        _attend[(count, heads, splits)](
            q,
            k,
            v,
            keys,
            values,
            rows,
            lengths,
            null_value,
            out,
            partial,
            counter,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            keys.stride(0),
            keys.stride(1),
            past,
            head_dim**-0.5,
            repeat=heads // keys.shape[1],
            head_dim=head_dim,
            padded_dim=padded,
            splits=splits,
            block=BLOCK,
            writes=writes,
            num_warps=4,
        )
        return out

    def _splits(self, programs: int, longest: int) -> int:
        """Shares of one head: a power of two, enough to fill the device, none always without positions."""
        wanted = min(-(-self.programs // programs), -(-longest // BLOCK), MOST_SPLITS)
        return int(triton.next_power_of_2(wanted + 1)) // 2

    def _scratch_for(self, programs: int, splits: int, padded: int) -> tuple[Tensor, Tensor]:
        key = (programs, splits, padded)
        if key not in self._scratch:
            partial = torch.empty(programs * splits * (padded + 2), device=self.device)
            counter = torch.zeros(programs, dtype=torch.int32, device=self.device)
            self._scratch[key] = partial, counter
        return self._scratch[key]


def _packed(x: Tensor) -> Tensor:
    """`[N, heads, head_dim]`, of which the kernel takes only the first stride to be free."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
