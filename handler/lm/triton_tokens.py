"""From tokens to the vectors a decode step begins with, and from its logits to the next tokens, as Triton kernels.

Only `fused_step.py` imports this, as Triton may be missing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from handler.lm.decoder import UNKNOWN
from handler.lm.step_state import StepState


@triton.jit
def _embed(
    sequences_ptr: tl.tensor,
    table_ptr: tl.tensor,
    sinusoid_ptr: tl.tensor,
    additive_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    request_of_ptr: tl.tensor,
    step_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    x_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    steps: int,
    codebooks: tl.constexpr,
    tokens: tl.constexpr,
    dim: tl.constexpr,
    adds: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Part of the input vector of one row; grid (N, dim / block)."""
    n, part = tl.program_id(0), tl.program_id(1)
    row, request = tl.load(rows_ptr + n), tl.load(request_of_ptr + n)
    step = tl.load(step_ptr + request)
    position = tl.load(offsets_ptr + row) + step
    dims = part * block + tl.arange(0, block)
    inside = dims < dim
    total = tl.zeros([block], dtype=tl.float32)
    for k in tl.static_range(codebooks):
        token = tl.load(sequences_ptr + (request * codebooks + k) * steps + step)
        total += tl.load(table_ptr + (k * tokens + token) * dim + dims, mask=inside, other=0.0)
    x = total.to(x_ptr.dtype.element_ty)
    if adds:
        x += tl.load(additive_ptr + (row * steps + step) * dim + dims, mask=inside, other=0.0)
    x += tl.load(sinusoid_ptr + position * dim + dims, mask=inside, other=0.0)
    tl.store(x_ptr + n * dim + dims, x, mask=inside)
    if part == 0:
        tl.store(positions_ptr + n, position)


@triton.jit
def _sample(
    logits_ptr: tl.tensor,
    sequences_ptr: tl.tensor,
    draws_ptr: tl.tensor,
    requests_ptr: tl.tensor,
    places_ptr: tl.tensor,
    step_ptr: tl.tensor,
    last_step_ptr: tl.tensor,
    coef_ptr: tl.tensor,
    beta_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    greedy_ptr: tl.tensor,
    diverged_ptr: tl.tensor,
    arrived_ptr: tl.tensor,
    places_stride: int,
    steps: int,
    codebooks: tl.constexpr,
    card: tl.constexpr,
    unknown: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """The next token of one codebook of one request; grid (B, K). The last of a request's programs counts its step."""
    place, codebook = tl.program_id(0), tl.program_id(1)
    request = tl.load(requests_ptr + place)
    step = tl.load(step_ptr + request)
    following = tl.minimum(step + 1, tl.load(last_step_ptr + request))
    codes = tl.arange(0, block)
    real = codes < card

    of_codebook = logits_ptr + codebook * card + codes
    row: tl.constexpr = codebooks * card
    conditional = tl.load(of_codebook + tl.load(places_ptr + place) * row, mask=real, other=0.0)
    wav_only = tl.load(of_codebook + tl.load(places_ptr + places_stride + place) * row, mask=real, other=0.0)
    null = tl.load(of_codebook + tl.load(places_ptr + 2 * places_stride + place) * row, mask=real, other=0.0)
    coef, beta = tl.load(coef_ptr + request), tl.load(beta_ptr + request)
    logits = null + coef * (wav_only + beta * (conditional - wav_only) - null)  # [block]
    # A sum leaves no NaN and no infinity out.
    finite = tl.abs(tl.sum(tl.where(real, logits, 0.0), axis=0)) < float("inf")
    tl.store(diverged_ptr + request, 1, mask=finite == 0)
    logits = tl.where(real, logits, -float("inf"))

    if tl.load(greedy_ptr + request) != 0:
        token = tl.argmax(logits, axis=0)
    else:
        weights = tl.exp((logits - tl.max(logits, axis=0)) / tl.load(temperature_ptr + request))
        weights = weights / tl.sum(weights, axis=0)
        # The bits of floats that are not negative are in the order of their values, so bits are searched one by one.
        bits = weights.to(tl.int32, bitcast=True)
        top_k, top_p = tl.load(top_k_ptr + request), tl.load(top_p_ptr + request)
        if top_p > 0.0:
            # The least value above which the weights sum to at most p; of its ties the first, as far as p goes.
            bound = tl.full([], 0x7FFFFFFF, tl.int32)
            for i in range(31):
                lower = bound & ~(1 << (30 - i))
                above = tl.sum(tl.where(bits > lower, weights, 0.0), axis=0)
                bound = tl.where(above <= top_p, lower, bound)
            tied = bits == bound
            before = tl.sum(tl.where(bits > bound, weights, 0.0), axis=0)
            rank = tl.cumsum(tied.to(tl.int32), axis=0) - 1
            keep = (bits > bound) | (tied & (before + rank.to(tl.float32) * weights <= top_p))
        else:
            # The k-th largest value, and its ties.
            bound = tl.full([], 0, tl.int32)
            if top_k < card:
                for i in range(31):
                    higher = bound | (1 << (30 - i))
                    bound = tl.where(tl.sum((bits >= higher).to(tl.int32), axis=0) >= top_k, higher, bound)
            keep = bits >= bound
        weights = tl.where(keep & real, weights, 0.0)
        cumulative = tl.cumsum(weights, axis=0)
        total = tl.max(cumulative, axis=0)
        below_total = (total.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
        uniform = tl.load(draws_ptr + (request * steps + following) * codebooks + codebook)
        target = tl.minimum(uniform * total, below_total)
        # A sum in parallel can round to less than the one before it, so a token must have a weight to be drawn.
        possible = weights > 0.0
        token = tl.min(tl.where(possible & (cumulative > target), codes, block), axis=0)
        token = tl.minimum(token, tl.max(tl.where(possible, codes, 0), axis=0))

    token = tl.minimum(token, card - 1)  # whatever logits that are not numbers gave
    at = sequences_ptr + (request * codebooks + codebook) * steps + following
    known = tl.load(at)
    tl.store(at, tl.where(known == unknown, token.to(tl.int64), known))
    arrived = tl.atomic_add(arrived_ptr + place, 1, sem="acq_rel", scope="gpu")
    if arrived == codebooks - 1:
        tl.store(arrived_ptr + place, 0)
        tl.store(step_ptr + request, following)


def embed(state: StepState, table: Tensor, sinusoid: Tensor, bucket: int) -> tuple[Tensor, Tensor]:
    """The input vectors of the first `bucket` rows of the plan, `[N, dim]`, and their positions, int64 `[N]`.

    Args:
        state: of the step.
        table: `[K * (card + 1), dim]`, the embeddings of all codebooks.
        sinusoid: `[positions, dim]`.
        bucket: N.
    """
    _, codebooks, steps = state.sequences.shape
    dim = table.shape[1]
    x = torch.empty(bucket, dim, device=table.device, dtype=table.dtype)
    positions = torch.empty(bucket, device=table.device, dtype=torch.long)
    _embed[(bucket, triton.cdiv(dim, 256))](
        state.sequences,
        table,
        sinusoid,
        table if state.additive is None else state.additive,
        state.plan.rows,
        state.plan.request_of,
        state.settings.step,
        state.offsets,
        x,
        positions,
        steps,
        codebooks=codebooks,
        tokens=table.shape[0] // codebooks,
        dim=dim,
        adds=state.additive is not None,
        block=256,
        num_warps=4,
    )
    return x, positions


def sample(logits: Tensor, state: StepState, arrived: Tensor, bucket: int) -> None:
    """Writes the next token of each codebook of the first `bucket` requests of the plan, and counts their steps.

    Args:
        logits: float32 `[N, K * card]`, of the vectors of the plan.
        state: of the step.
        arrived: int32 `[B]`, zeros, as they are again afterwards.
        bucket: N.
    """
    _, codebooks, steps = state.sequences.shape
    settings, requests = state.settings, state.plan.requests[:bucket]
    _sample[(len(requests), codebooks)](
        logits,
        state.sequences,
        state.draws,
        requests,
        state.plan.places,
        settings.step,
        settings.last_step,
        settings.coef,
        settings.beta,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        settings.greedy,
        settings.diverged,
        arrived,
        state.plan.places.stride(0),
        steps,
        codebooks=codebooks,
        card=settings.card,
        unknown=UNKNOWN,
        block=triton.next_power_of_2(settings.card),
        num_warps=8,
    )
