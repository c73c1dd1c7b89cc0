"""The transformer of the language model: one set of layers, used by prefill and by the decode step alike.

A layer works on flat vectors `[N, dim]` and leaves to an `Attention` which vectors attend to which; so the same code
runs a whole prompt (N = rows x positions) and one decode step (N = rows). The attentions are in `attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from handler.half import HalfLinear, fits_half
from handler.linear import Linear, kept_in
from handler.lm.embedding import Rotary, sinusoidal_embedding
from handler.quantized import QuantizedLinear


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


class LayerNorm(nn.LayerNorm):
    """Torch's own, without the calls around it: they take longer than a few rows' norm itself."""

    def finalize(self) -> None:
        self._arguments = (self.normalized_shape, self.weight, self.bias, self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, *self._arguments)


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
        self._linear = lay_out(self.weight.detach(), _detached(self.bias), device, dtype)
        del self.weight, self.bias

    def __call__(self, x: Tensor, activation: str = "") -> Tensor:
        """See `Linear`."""
        return self._linear(x, activation)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """See `Linear`."""
        return self._linear.add_to(residual, x)


class SelfAttention(nn.Module):
    """Causal self-attention; rows q, k, v of `in_proj_weight` in this order, each head-major.

    What `out_proj` makes of its result is left to the layer, which adds it to the residual in the same go.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        projected = config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
        self.in_proj_weight = nn.Parameter(torch.empty(projected, config.dim))
        self.in_proj_bias = nn.Parameter(torch.empty(projected)) if config.bias_attn else None
        self.out_proj = Projection(config.dim, config.dim, config.bias_attn)
        if config.qk_layer_norm:
            self.q_layer_norm = LayerNorm(config.dim)
            self.k_layer_norm = LayerNorm(config.dim)
        self._in_proj: Linear

    def finalize(self, device: torch.device, dtype: torch.dtype) -> None:
        self._in_proj = lay_out(self.in_proj_weight.detach(), _detached(self.in_proj_bias), device, dtype)
        del self.in_proj_weight, self.in_proj_bias
        self.out_proj.finalize(device, dtype)

    def __call__(self, x: Tensor, attention: Attention, rotary: Rotary | None) -> Tensor:
        """`[N, dim]` -> `[N, dim]`, before `out_proj`."""
        config = self.config
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        projected = self._in_proj(x).view(len(x), -1, config.head_dim)  # [N, H + 2 * H_kv, head_dim]
        q, k, v = projected.split_with_sizes(heads, dim=1)
        if config.qk_layer_norm:
            # Over the whole dim, before the heads are split and before the rotation.
            q, k = self.q_layer_norm(q.flatten(1)).view_as(q), self.k_layer_norm(k.flatten(1)).view_as(k)
        if rotary is not None:
            q, k = rotary.rotate(q, k, attention.positions)
        if config.attention_as_float32:
            q, k, v = q.float(), k.float(), v.float()
        return attention.self_attention(self.layer, q, k, v).flatten(1).to(x.dtype)


class CrossAttention(nn.Module):
    """Attention over the text condition, whose keys and values are computed once for each request.

    There is no mask: a padded vector of the condition is zero, and takes part with score and value of zero. What
    `out_proj` makes of its result is left to the layer, which adds it to the residual in the same go.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.dim, config.dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * config.dim)) if config.bias_attn else None
        self.out_proj = Projection(config.dim, config.dim, config.bias_attn)
        if config.qk_layer_norm_cross:
            self.q_layer_norm = LayerNorm(config.dim)
            self.k_layer_norm = LayerNorm(config.dim)
        self._q_proj: Linear
        self._kv_proj: Linear
        self.null_value: Tensor

    def finalize(self, device: torch.device, dtype: torch.dtype) -> None:
        dim = self.config.dim
        weight, bias = self.in_proj_weight.detach(), _detached(self.in_proj_bias)
        self._q_proj = lay_out(weight[:dim], None if bias is None else bias[:dim], device, dtype)
        self._kv_proj = lay_out(weight[dim:], None if bias is None else bias[dim:], device, dtype)
        # What attention over zero vectors gives, however many: the mean of equal values.
        null = torch.zeros(dim) if bias is None else bias[2 * dim :]
        self.null_value = null.to(device, computed_in(dtype)).view(self.config.num_heads, -1)  # [H, head_dim]
        del self.in_proj_weight, self.in_proj_bias
        self.out_proj.finalize(device, dtype)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """`[C, L, dim]` -> keys and values, each `[C, H, L, head_dim]`."""
        k, v = self._kv_proj(source.flatten(0, 1)).unflatten(0, source.shape[:2]).chunk(2, dim=-1)  # [C, L, dim]
        if self.config.qk_layer_norm_cross:
            k = self.k_layer_norm(k)
        heads = (self.config.num_heads, self.config.head_dim)
        k, v = k.unflatten(-1, heads).transpose(1, 2), v.unflatten(-1, heads).transpose(1, 2)
        return k.contiguous(), v.contiguous()

    def __call__(self, x: Tensor, attention: Attention) -> Tensor:
        """`[N, dim]` -> `[N, dim]`, before `out_proj`."""
        config = self.config
        q = self._q_proj(x)  # [N, dim]
        if config.qk_layer_norm_cross:
            q = self.q_layer_norm(q)
        q = q.view(len(x), config.num_heads, config.head_dim)
        if config.attention_as_float32:
            q = q.float()
        return attention.cross_attention(self.layer, q).flatten(1).to(x.dtype)


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention if the model has it, and feed-forward, each with norm and residual."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.norm_first, self.activation = config.norm_first, config.activation
        self.self_attn = SelfAttention(config, layer)
        self.linear1 = Projection(config.dim, config.hidden_dim, config.bias_ff)
        self.linear2 = Projection(config.hidden_dim, config.dim, config.bias_ff)
        self.norm1 = LayerNorm(config.dim, eps=1e-5)
        self.norm2 = LayerNorm(config.dim, eps=1e-5)

        def scale() -> LayerScale | None:
            return LayerScale(config.dim) if config.layer_scale else None

        self.layer_scale_1, self.layer_scale_2 = scale(), scale()
        self.cross_attention: CrossAttention | None = None
        if config.cross_attention:
            self.cross_attention = CrossAttention(config, layer)
            self.norm_cross = LayerNorm(config.dim, eps=1e-5)
            self.layer_scale_cross = scale()

    def forward(self, x: Tensor, attention: Attention, rotary: Rotary | None) -> Tensor:
        """`[N, dim]` -> `[N, dim]`."""
        own, cross = self.self_attn, self.cross_attention
        if self.norm_first:
            x = _add(x, self.layer_scale_1, own.out_proj, own(self.norm1(x), attention, rotary))
            if cross is not None:
                x = _add(x, self.layer_scale_cross, cross.out_proj, cross(self.norm_cross(x), attention))
            return _add(x, self.layer_scale_2, self.linear2, self.linear1(self.norm2(x), self.activation))
        source = x
        x = self.norm1(_add(x, self.layer_scale_1, own.out_proj, own(x, attention, rotary)))
        if cross is not None:
            # The query is the layer's input, not what self-attention made of it: so the reference was trained.
            x = self.norm_cross(_add(x, self.layer_scale_cross, cross.out_proj, cross(source, attention)))
        return self.norm2(_add(x, self.layer_scale_2, self.linear2, self.linear1(x, self.activation)))


def _add(residual: Tensor, scale: LayerScale | None, projection: Projection, x: Tensor) -> Tensor:
    if scale is None:
        return projection.add_to(residual, x)
    return residual + scale(projection(x))


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


def lay_out(weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Linear:
    """A linear map for a device; int8 is for a CPU."""
    if dtype is torch.int8:
        return QuantizedLinear(weight, bias)
    if bytes_of_value(weight, device, dtype) < dtype.itemsize:
        return HalfLinear(weight, bias)
    return Linear(weight, bias, device, dtype)


def bytes_of_value(weight: Tensor, device: torch.device, dtype: torch.dtype) -> int:
    """What `lay_out` takes for each value of a weight."""
    if dtype is torch.int8:
        return dtype.itemsize
    if dtype is torch.float32 and device.type == "cpu" and fits_half(weight):
        return torch.float16.itemsize
    return kept_in(dtype, device).itemsize


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What is between the products of weights of this dtype."""
    return torch.float32 if dtype is torch.int8 else dtype


def _detached(parameter: nn.Parameter | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()
