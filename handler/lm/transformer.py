"""The transformer of the language model: one set of layers, used by prefill and by the decode step alike.

A layer works on flat vectors `[N, dim]` and leaves to an `Attention` which vectors attend to which; so the same code
runs a whole prompt (N = rows x positions) and one decode step (N = rows). The attentions are in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handler.linear import Linear
from handler.lm.embedding import Rotary, sinusoidal_embedding


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """What `transformer_lm` of the `xp.cfg` says about the layers; the names are its keys.

    `past_context` limits each position to that many positions before it, and itself.
    """

    dim: int
    num_heads: int
    num_layers: int
    hidden_dim: int
    norm_first: bool
    bias_attn: bool
    bias_ff: bool
    activation: str
    positional_embedding: str
    max_period: float
    positional_scale: float
    xpos: bool
    qk_layer_norm: bool
    qk_layer_norm_cross: bool
    layer_scale: bool
    kv_repeat: int
    past_context: int | None
    attention_as_float32: bool
    cross_attention: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads // self.kv_repeat


class Attention(Protocol):
    """Which vectors attend to which, and where keys and values are kept.

    Attributes:
        positions: int64 `[N]`, the position of each vector in its row, the prepended prefix counted.
    """

    positions: Tensor

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[N, H, head_dim]`, k and v `[N, H_kv, head_dim]` -> `[N, H, head_dim]`."""

    def cross_attention(self, layer: int, q: Tensor) -> Tensor:
        """q `[N, H, head_dim]` -> `[N, H, head_dim]`, over the condition's cached keys and values."""


class LayerScale(nn.Module):
    """A learnt scale of each channel of a residual branch (Touvron et al. 2021)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Projection(nn.Module):
    """The parameters of a linear map under their checkpoint names, until `finalize` lays them out for a device."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._linear: Linear

    def finalize(self, device: torch.device, dtype: torch.dtype) -> None:
        self._linear = Linear(self.weight.detach(), _detached(self.bias), device, dtype)
        del self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x)


class SelfAttention(nn.Module):
    """Causal self-attention; rows q, k, v of `in_proj_weight` in this order, each head-major."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        projected = config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
        self.in_proj_weight = nn.Parameter(torch.empty(projected, config.dim))
        self.in_proj_bias = nn.Parameter(torch.empty(projected)) if config.bias_attn else None
        self.out_proj = Projection(config.dim, config.dim, config.bias_attn)
        if config.qk_layer_norm:
            self.q_layer_norm = nn.LayerNorm(config.dim)
            self.k_layer_norm = nn.LayerNorm(config.dim)
        self._in_proj: Linear

    def finalize(self, device: torch.device, dtype: torch.dtype) -> None:
        self._in_proj = Linear(self.in_proj_weight.detach(), _detached(self.in_proj_bias), device, dtype)
        del self.in_proj_weight, self.in_proj_bias
        self.out_proj.finalize(device, dtype)

    def forward(self, x: Tensor, attention: Attention, rotary: Rotary | None) -> Tensor:
        config = self.config
        kv_dim = config.head_dim * config.num_kv_heads
        q, k, v = self._in_proj(x).split([config.dim, kv_dim, kv_dim], dim=-1)  # [N, dim], [N, kv_dim] twice
        if config.qk_layer_norm:
            # Over the whole dim, before the heads are split and before the rotation.
            q, k = self.q_layer_norm(q), self.k_layer_norm(k)
        q = q.unflatten(-1, (config.num_heads, config.head_dim))  # [N, H, head_dim]
        k = k.unflatten(-1, (config.num_kv_heads, config.head_dim))  # [N, H_kv, head_dim]
        v = v.unflatten(-1, (config.num_kv_heads, config.head_dim))  # [N, H_kv, head_dim]
        if rotary is not None:
            q, k = rotary.rotate(q, k, attention.positions)
        if config.attention_as_float32:
            q, k, v = q.float(), k.float(), v.float()
        out = attention.self_attention(self.layer, q, k, v)
        return self.out_proj(out.flatten(1).to(x.dtype))


class CrossAttention(nn.Module):
    """Attention over the text condition, whose keys and values are computed once for each request.

    There is no mask: a padded vector of the condition is zero, and takes part with score and value of zero.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.dim, config.dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * config.dim)) if config.bias_attn else None
        self.out_proj = Projection(config.dim, config.dim, config.bias_attn)
        if config.qk_layer_norm_cross:
            self.q_layer_norm = nn.LayerNorm(config.dim)
            self.k_layer_norm = nn.LayerNorm(config.dim)
        self._q_proj: Linear
        self._kv_proj: Linear
        self.null_value: Tensor

    def finalize(self, device: torch.device, dtype: torch.dtype) -> None:
        dim = self.config.dim
        weight, bias = self.in_proj_weight.detach(), _detached(self.in_proj_bias)
        self._q_proj = Linear(weight[:dim], None if bias is None else bias[:dim], device, dtype)
        self._kv_proj = Linear(weight[dim:], None if bias is None else bias[dim:], device, dtype)
        # What attention over zero vectors gives, however many: the mean of equal values.
        null = torch.zeros(dim) if bias is None else bias[2 * dim :]
        self.null_value = null.to(device, dtype).view(self.config.num_heads, -1)  # [H, head_dim]
        del self.in_proj_weight, self.in_proj_bias
        self.out_proj.finalize(device, dtype)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """`[C, L, dim]` -> keys and values, each `[C, H, L, head_dim]`."""
        k, v = self._kv_proj(source.flatten(0, 1)).unflatten(0, source.shape[:2]).chunk(2, dim=-1)  # [C, L, dim]
        if self.config.qk_layer_norm_cross:
            k = self.k_layer_norm(k)
        heads = (self.config.num_heads, self.config.head_dim)
        k, v = k.unflatten(-1, heads).transpose(1, 2), v.unflatten(-1, heads).transpose(1, 2)
        if self.config.attention_as_float32:
            k, v = k.float(), v.float()
        return k.contiguous(), v.contiguous()

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        q = self._q_proj(x)  # [N, dim]
        if self.config.qk_layer_norm_cross:
            q = self.q_layer_norm(q)
        q = q.unflatten(-1, (self.config.num_heads, self.config.head_dim))  # [N, H, head_dim]
        if self.config.attention_as_float32:
            q = q.float()
        return self.out_proj(attention.cross_attention(self.layer, q).flatten(1).to(x.dtype))


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention if the model has it, and feed-forward, each with norm and residual."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.activation: Callable[[Tensor], Tensor] = F.gelu if config.activation == "gelu" else F.relu
        self.self_attn = SelfAttention(config, layer)
        self.linear1 = Projection(config.dim, config.hidden_dim, config.bias_ff)
        self.linear2 = Projection(config.hidden_dim, config.dim, config.bias_ff)
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-5)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-5)

        def scale() -> nn.Module:
            return LayerScale(config.dim) if config.layer_scale else nn.Identity()

        self.layer_scale_1, self.layer_scale_2 = scale(), scale()
        self.cross_attention: CrossAttention | None = None
        if config.cross_attention:
            self.cross_attention = CrossAttention(config, layer)
            self.norm_cross = nn.LayerNorm(config.dim, eps=1e-5)
            self.layer_scale_cross = scale()

    def forward(self, x: Tensor, attention: Attention, rotary: Rotary | None) -> Tensor:
        """`[N, dim]` -> `[N, dim]`."""
        if self.norm_first:
            x = x + self.layer_scale_1(self.self_attn(self.norm1(x), attention, rotary))
            if self.cross_attention is not None:
                x = x + self.layer_scale_cross(self.cross_attention(self.norm_cross(x), attention))
            return x + self.layer_scale_2(self._feed_forward(self.norm2(x)))
        source = x
        x = self.norm1(x + self.layer_scale_1(self.self_attn(x, attention, rotary)))
        if self.cross_attention is not None:
            # The query is the layer's input, not what self-attention made of it: so the reference was trained.
            x = self.norm_cross(x + self.layer_scale_cross(self.cross_attention(source, attention)))
        return self.norm2(x + self.layer_scale_2(self._feed_forward(x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.activation(self.linear1(x)))


class Transformer(nn.Module):
    """Positions, then the layers."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(TransformerLayer(config, i) for i in range(config.num_layers))
        self.rope: Rotary | None = None
        if config.positional_embedding in ("rope", "sin_rope"):
            self.rope = Rotary(config.head_dim, config.positional_scale, config.xpos)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        """`[N, dim]` -> `[N, dim]`."""
        config = self.config
        if config.positional_embedding in ("sin", "sin_rope"):
            sinusoid = sinusoidal_embedding(attention.positions, config.dim, config.max_period)  # [N, dim]
            x = x + (config.positional_scale * sinusoid).to(x.dtype)
        for layer in self.layers:
            x = layer(x, attention, self.rope)
        return x


def _detached(parameter: nn.Parameter | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()
