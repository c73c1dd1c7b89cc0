"""The decode step of few rows in as few kernels as its data dependences allow: eight a layer, three around them.

A layer is: norm, query, key and value; self-attention; its projection and residual; norm and cross-attention's query;
cross-attention; its projection and residual; norm, first feed-forward product and activation; second and residual.
"""

from __future__ import annotations

import logging
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handler.linear import Linear
from handler.lm.decode_attention import AttentionKernel, MaskedAttention, StaticAttention
from handler.lm.embedding import sinusoidal_embedding
from handler.lm.graphs import Run
from handler.lm.model import LanguageModel
from handler.lm.step_state import StepState
from handler.lm.transformer import TransformerConfig, TransformerLayer

logger = logging.getLogger(__name__)


class FusedStep:
    """The decode step of a model whose layers are all of the published kind; see `can_fuse`.

    Args:
        lm: the language model.
        kernel: how attention is computed.
    """

    def __init__(self, lm: LanguageModel, kernel: AttentionKernel) -> None:
        from handler.lm import triton_linear, triton_tokens

        self.lm, self.kernel = lm, kernel
        self._products, self._tokens = triton_linear, triton_tokens
        self.most_rows: int = triton_linear.ROWS

    def bound_to(self, state: StepState, bucket: int) -> Run:
        """One step of the first `bucket` vectors of the plan, at most `most_rows`; it can be captured."""
        config, device = self.lm.config, self.lm.device
        positions = torch.arange(state.cache.keys.shape[3], device=device)
        sinusoid = config.positional_scale * sinusoidal_embedding(positions, config.dim, config.max_period)
        arrived = torch.zeros(bucket, dtype=torch.int32, device=device)
        return partial(self._run, state, sinusoid.to(self.lm.dtype), arrived, bucket)

    def _run(self, state: StepState, sinusoid: Tensor, arrived: Tensor, bucket: int) -> None:
        lm, config = self.lm, self.lm.config
        x, positions = self._tokens.embed(state, lm._embeddings, sinusoid, bucket)  # [N, dim], [N]
        rows = state.plan.rows[:bucket]
        attention = StaticAttention(
            config, self.kernel, state.cache.keys, state.cache.values, state.cross, rows, positions
        )
        for layer in lm.transformer.layers:
            assert isinstance(layer, TransformerLayer)
            self._layer(layer, x, attention)
        logits = x.new_empty(bucket, lm.num_codebooks * lm.card, dtype=torch.float32)
        self._linear(x, lm._heads, logits, norm=lm.out_norm)
        self._tokens.sample(logits, state, arrived, bucket)

    def _layer(self, layer: TransformerLayer, x: Tensor, attention: StaticAttention) -> None:
        """Adds to x `[N, dim]`, in place."""
        config = self.lm.config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        own, cross = layer.self_attn, layer.cross_attention
        qkv = x.new_empty(len(x), (heads + 2 * kv_heads) * head_dim)
        self._linear(x, own._in_proj, qkv, norm=layer.norm1)
        q, k, v = qkv.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
        attended = attention.self_attention(own.layer, q, k, v)  # [N, H, head_dim]
        self._linear(attended.flatten(1), own.out_proj._linear, x, adds=True)
        if cross is not None:
            query = torch.empty_like(x)
            self._linear(x, cross._q_proj, query, norm=layer.norm_cross)
            attended = attention.cross_attention(cross.layer, query.unflatten(1, (heads, head_dim)))
            self._linear(attended.flatten(1), cross.out_proj._linear, x, adds=True)
        hidden = x.new_empty(len(x), config.hidden_dim)
        self._linear(x, layer.linear1._linear, hidden, norm=layer.norm2, activation=config.activation)
        self._linear(hidden, layer.linear2._linear, x, adds=True)

    def _linear(
        self,
        x: Tensor,
        weights: Linear,
        out: Tensor,
        norm: nn.LayerNorm | None = None,
        activation: str = "",
        adds: bool = False,
    ) -> None:
        self._products.linear(x, weights._weight, weights.bias, out, norm, activation, adds)


def can_fuse(config: TransformerConfig) -> bool:
    """Whether a model's layers are of the kind that all published models have."""
    return (
        config.norm_first
        and config.positional_embedding == "sin"
        and not config.qk_layer_norm
        and not config.qk_layer_norm_cross
        and not config.layer_scale
        and not config.attention_as_float32
    )


def fused_step(lm: LanguageModel, kernel: AttentionKernel) -> FusedStep | None:
    """The fused step where it runs, is right, and suits the model; else None, with a warning if it should have."""
    if lm.device.type != "cuda" or isinstance(kernel, MaskedAttention) or not can_fuse(lm.config):
        return None
    return FusedStep(lm, kernel) if products_are_right(lm.device, lm.dtype) else None


@cache
@torch.inference_mode()
def products_are_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Tries the product kernel, the one with most to it, beside torch's own."""
    from handler.lm.triton_linear import linear

    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(3, size, generator=generator).to(device, dtype) for size in (512, 2048))
    weight = (torch.randn(2048, 512, generator=generator) / 512**0.5).to(device, dtype)
    norm = nn.LayerNorm(512, device=device, dtype=dtype)
    try:
        out = residual.clone()
        linear(x, weight, None, out, norm, "gelu", adds=True)
        difference = float((residual + F.gelu(norm(x) @ weight.T) - out).abs().max())
        if not difference < max(1e-3, 20 * torch.finfo(dtype).eps):
            raise ArithmeticError(f"it differs by {difference:g} from the plain product")
    except Exception as error:
        logger.warning(
            "the fused decode step cannot be used (%s: %s): steps of few rows take about twice as long.",
            type(error).__name__,
            error,
        )
        return False
    return True
