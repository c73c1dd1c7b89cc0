"""Residual vector quantization (arXiv:2107.03312, section III-C)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Distances held at once: 64 MiB of float32.
MAX_DISTANCES = 2**24


class ResidualVectorQuantizer(nn.Module):
    """Codes each vector by its nearest codebook row, then what is left of it by the next codebook, and so on.

    Attributes:
        codebooks: `total_codebooks` parameters, each float32 `[bins, dimension]`.
    """

    def __init__(self, dimension: int, codebooks: int, bins: int) -> None:
        super().__init__()
        self.codebooks = nn.ParameterList(torch.empty(bins, dimension) for _ in range(codebooks))

    def encode(self, latent: Tensor, num_codebooks: int) -> Tensor:
        """Latent float32 `[B, dimension, T]` -> codes int64 `[B, num_codebooks, T]`."""
        batch, dimension, length = latent.shape
        vectors = latent.transpose(1, 2).reshape(-1, dimension)  # [B * T, dimension]
        embeds = list(self.codebooks)[:num_codebooks]
        rows = max(1, MAX_DISTANCES // embeds[0].shape[0])
        codes = torch.cat([self._encode(chunk, embeds) for chunk in vectors.split(rows)])  # [B * T, K]
        return codes.reshape(batch, length, num_codebooks).transpose(1, 2)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, K, T]` -> latent float32 `[B, dimension, T]`, the sum of the codebooks' rows."""
        latent = torch.zeros((), device=codes.device)
        for index, embed in zip(codes.unbind(1), self.codebooks, strict=False):
            latent = latent + F.embedding(index, embed)  # [B, T, dimension]
        return latent.transpose(1, 2)

    @staticmethod
    def _encode(vectors: Tensor, embeds: list[Tensor]) -> Tensor:
        codes = []
        for embed in embeds:
            # The squared distance in audiocraft's order of terms: rounding decides between near neighbours.
            distances = vectors.square().sum(1, keepdim=True) - 2 * vectors @ embed.T + embed.square().sum(1)
            codes.append(distances.argmin(1))
            vectors = vectors - F.embedding(codes[-1], embed)
        return torch.stack(codes, 1)
