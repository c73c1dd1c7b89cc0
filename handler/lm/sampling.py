"""From logits to tokens: guidance, temperature, top-k, top-p, and draws that depend on (seed, step, codebook) alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request draws its tokens; the names and meanings of audiocraft.

    Attributes:
        use_sampling: draw from the distribution; else take the likeliest token.
        temperature: divides the logits; 0 also means the likeliest token.
        top_k: keep the k likeliest tokens (and those tied with the k-th); 0 keeps all.
        top_p: keep the likeliest tokens, as long as those before them sum to at most p; wins over `top_k`; 0 is off.
    """

    use_sampling: bool = True
    temperature: float = 1.0
    top_k: int = 250
    top_p: float = 0.0

    @property
    def greedy(self) -> bool:
        return not self.use_sampling or self.temperature == 0.0


def uniform_draws(seed: int, num_steps: int, num_codebooks: int) -> Tensor:
    """The uniform numbers in [0, 1) of one request, float32 `[num_steps, K]`.

    Philox is counter based: number (step, codebook) is a function of the seed and its place alone, so the same on
    every device and however many requests run together.
    """
    bits = np.random.Philox(key=seed).random_raw(num_steps * num_codebooks)
    # 24 bits are all that float32 holds below 1; more could round up to 1 itself.
    uniform = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    return torch.from_numpy(uniform).view(num_steps, num_codebooks)


def guide(conditional: Tensor, wav_only: Tensor, null: Tensor, coef: Tensor, beta: Tensor) -> Tensor:
    """Classifier-free guidance, simple or double (MusicGen-Style paper, section 4.3).

    With `wav_only = conditional` and beta 1 it is the simple form, `null + coef * (conditional - null)`; with `null`
    the same too, it is the logits themselves, bit for bit.

    Args:
        conditional, wav_only, null: logits, float32 `[B, K, card]`.
        coef, beta: `cfg_coef` and `cfg_coef_beta`, float32 `[B, 1, 1]`.
    """
    return null + coef * (wav_only + beta * (conditional - wav_only) - null)  # [B, K, card]


def keep_top_k(probabilities: Tensor, top_k: Tensor, largest_k: int) -> Tensor:
    """Marks the `top_k` likeliest tokens and those tied with the last of them.

    Args:
        probabilities: `[B, K, card]`.
        top_k: int64 `[B]`, each 1 to `largest_k`.
        largest_k: the largest of `top_k`, at most card.

    Returns:
        bool `[B, K, card]`.
    """
    largest = probabilities.topk(largest_k, dim=-1).values  # [B, K, largest_k]
    index = (top_k - 1)[:, None, None].expand(-1, probabilities.shape[1], 1)
    return probabilities >= largest.gather(-1, index)


def keep_top_p(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Marks the likeliest tokens, as long as those before them sum to at most `top_p`.

    Args:
        probabilities: `[B, K, card]`.
        top_p: float `[B]`.

    Returns:
        bool `[B, K, card]`.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # [B, K, card]
    kept = before <= top_p[:, None, None]
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draws one token for each codebook by inverting the cumulative distribution.

    Args:
        weights: unnormalised probabilities, float32 `[B, K, card]`, 0 for tokens that must not be drawn.
        uniform: `[B, K]` in [0, 1).

    Returns:
        int64 tokens `[B, K]`.
    """
    cumulative = weights.cumsum(dim=-1)  # [B, K, card]
    target = uniform[..., None] * cumulative[..., -1:]
    # The first token whose cumulative weight exceeds the target: it always has a weight of its own. A product that
    # rounds up to the total would find none, so the total itself is never asked for.
    target = torch.minimum(target, torch.nextafter(cumulative[..., -1:], torch.zeros_like(target)))
    return (cumulative <= target).sum(dim=-1)
