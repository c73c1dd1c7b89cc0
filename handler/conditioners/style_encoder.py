"""The parts of the style conditioner (arXiv:2407.12563, section 3), with their names in checkpoints."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handler.audio import convert_audio
from handler.compression import CompressionModel
from handler.conditioners.mert import SAMPLE_RATE, shortest_audio
from handler.lm.embedding import sinusoidal_embedding

if TYPE_CHECKING:
    from transformers import HubertModel


class StyleFeatures(nn.Module, ABC):
    """Vectors of an excerpt: a pretrained model, which is not in the checkpoint, and an embedding, which is.

    Args:
        model: the pretrained model; it moves along between devices.
        min_samples: the shortest excerpt it takes.
    """

    def __init__(self, model: nn.Module, min_samples: int) -> None:
        super().__init__()
        self.min_samples = min_samples
        # In a list, or nn.Module would count it among the parameters of the checkpoint.
        self._model: list[Any] = [model]

    @abstractmethod
    def forward(self, excerpt: Tensor, num_codebooks: int) -> Tensor:
        """Excerpts float32 `[B, T]` -> `[B, L, dim]`; `num_codebooks` matters where the features are codes."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> StyleFeatures:
        self._model[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)


class MertFeatures(StyleFeatures):
    """MERT's last hidden state, 75 vectors a second, projected (`model_name: mert`).

    Args:
        mert: the model.
        sample_rate: of the excerpts, in Hz.
        dim: of the vectors.
    """

    def __init__(self, mert: HubertModel, sample_rate: int, dim: int) -> None:
        super().__init__(mert, math.ceil(shortest_audio(mert) * sample_rate / SAMPLE_RATE))
        self.sample_rate = sample_rate
        self.weight = nn.Parameter(torch.empty(dim, mert.config.hidden_size))
        self.bias = nn.Parameter(torch.empty(dim))

    def hidden(self, excerpt: Tensor) -> Tensor:
        """MERT's last hidden state, float32 `[B, L, 768]`."""
        wav = convert_audio(excerpt[:, None], self.sample_rate, SAMPLE_RATE, 1)[:, 0]  # [B, T']
        return self._model[0](wav).last_hidden_state

    def forward(self, excerpt: Tensor, num_codebooks: int) -> Tensor:
        return F.linear(self.hidden(excerpt), self.weight, self.bias)


class EncodecFeatures(StyleFeatures):
    """The sum of the embeddings of a compression model's codes (`model_name: encodec`).

    Args:
        compression_model: of mono audio at the excerpts' rate.
        num_codebooks: how many embeddings there are (`encodec_n_q`).
        dim: of the vectors.
    """

    def __init__(self, compression_model: CompressionModel, num_codebooks: int, dim: int) -> None:
        super().__init__(compression_model, min_samples=1)
        for k in range(num_codebooks):
            self.add_module(str(k), nn.Embedding(compression_model.cardinality, dim))

    def forward(self, excerpt: Tensor, num_codebooks: int) -> Tensor:
        codes, _ = self._model[0].encode(excerpt[:, None])  # [B, K, L]
        embeddings = list(self.children())[:num_codebooks]
        vectors = [embed(k_codes) for embed, k_codes in zip(embeddings, codes.unbind(1), strict=False)]
        return torch.stack(vectors).sum(dim=0)  # [B, L, dim]


class StyleTransformer(nn.Module):
    """Pre-norm layers that see both ways, behind a sinusoid; no biases but the norms', and no norm at the end."""

    def __init__(self, dim: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layer(dim, num_heads) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, dim]` -> `[B, L, dim]`."""
        x = x + sinusoidal_embedding(torch.arange(x.shape[1], device=x.device), x.shape[2])
        for layer in self.layers:
            x = layer(x)
        return x


class StyleQuantizer(nn.Module):
    """Residual vector quantization (arXiv:2107.03312) that gives the vectors, not their codes: the bottleneck."""

    def __init__(self, dim: int, num_codebooks: int, bins: int) -> None:
        super().__init__()
        self._codebooks = [_Codebook(dim, bins) for _ in range(num_codebooks)]
        layers = [nn.ModuleDict({"_codebook": codebook}) for codebook in self._codebooks]
        self.vq = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, x: Tensor, num_codebooks: int) -> Tensor:
        """`[B, L, dim]` -> the sum of the nearest rows of the first `num_codebooks` codebooks, of the same shape."""
        quantized = torch.zeros_like(x)
        for codebook in self._codebooks[:num_codebooks]:
            # The squared distance in audiocraft's order of terms: rounding decides between near neighbours.
            embed = codebook.embed
            distances = x.square().sum(-1, keepdim=True) - 2 * x @ embed.T + embed.square().sum(-1)  # [B, L, bins]
            nearest = F.embedding(distances.argmin(-1), embed)
            x, quantized = x - nearest, quantized + nearest
        return quantized


class _Codebook(nn.Module):
    """`embed` float32 `[bins, dim]`, and the statistics that training keeps beside it in the file."""

    def __init__(self, dim: int, bins: int) -> None:
        super().__init__()
        self.embed: Tensor
        self.register_buffer("inited", torch.zeros(1))
        self.register_buffer("cluster_size", torch.zeros(bins))
        self.register_buffer("embed", torch.empty(bins, dim))
        self.register_buffer("embed_avg", torch.zeros(bins, dim))


def _layer(dim: int, num_heads: int) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        dim, num_heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, bias=False
    )
    # Its `bias` speaks of the norms too, and the checkpoint's have one.
    layer.norm1, layer.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
    return layer
