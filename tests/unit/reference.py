"""The language model of audiocraft once more, in the plainest form: one pass, no cache, one row at a time.

It shares no line with the package, so that what the goldens do not reach (rotary positions, normalised queries,
repeated keys, post-norm, …) is checked against a second reading of the same meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def logits(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    sequence: Tensor,
    prefix: Tensor,
    cross: Tensor | None,
    additive: Tensor | None = None,
) -> Tensor:
    """Logits `[S, K, card]` of one row: sequence `[K, S]`, prefix `[P, dim]`, cross-attention source `[L, dim]`."""
    lm = config["transformer_lm"]
    x = sum(F.embedding(sequence[k], state[f"emb.{k}.weight"]) for k in range(lm["n_q"]))
    assert isinstance(x, Tensor)
    x = x if additive is None else x + additive
    x = torch.cat([prefix, x])  # [P + S, dim]
    if lm["positional_embedding"] in ("sin", "sin_rope"):
        half = lm["dim"] // 2
        rates = lm.get("max_period", 10_000) ** (torch.arange(half) / (half - 1))
        phase = torch.arange(len(x))[:, None] / rates
        x = x + lm.get("positional_scale", 1.0) * torch.cat([phase.cos(), phase.sin()], dim=1)
    for i in range(lm["num_layers"]):
        x = _layer(lm, {k.removeprefix(f"transformer.layers.{i}."): v for k, v in state.items()}, x, cross)
    if lm["norm_first"]:
        x = _norm(state, "out_norm", x)
    heads = [F.linear(x, state[f"linears.{k}.weight"], state.get(f"linears.{k}.bias")) for k in range(lm["n_q"])]
    return torch.stack(heads, dim=1)[len(prefix) :]


def _layer(lm: Mapping[str, Any], state: Mapping[str, Tensor], x: Tensor, cross: Tensor | None) -> Tensor:
    def scaled(name: str, y: Tensor) -> Tensor:
        return y * state[f"{name}.scale"] if f"{name}.scale" in state else y

    def feed_forward(y: Tensor) -> Tensor:
        y = F.linear(y, state["linear1.weight"], state.get("linear1.bias"))
        y = F.gelu(y) if lm["activation"] == "gelu" else F.relu(y)
        return F.linear(y, state["linear2.weight"], state.get("linear2.bias"))

    if lm["norm_first"]:
        x = x + scaled("layer_scale_1", _self_attention(lm, state, _norm(state, "norm1", x)))
        if cross is not None:
            x = x + scaled("layer_scale_cross", _cross_attention(lm, state, _norm(state, "norm_cross", x), cross))
        return x + scaled("layer_scale_2", feed_forward(_norm(state, "norm2", x)))
    inputs = x
    x = _norm(state, "norm1", x + scaled("layer_scale_1", _self_attention(lm, state, x)))
    if cross is not None:
        attended = scaled("layer_scale_cross", _cross_attention(lm, state, inputs, cross))
        x = _norm(state, "norm_cross", x + attended)
    return _norm(state, "norm2", x + scaled("layer_scale_2", feed_forward(x)))


def _self_attention(lm: Mapping[str, Any], state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    head_dim, repeat = lm["dim"] // lm["num_heads"], lm.get("kv_repeat", 1)
    kv_dim = head_dim * (lm["num_heads"] // repeat)
    qkv = F.linear(x, state["self_attn.in_proj_weight"], state.get("self_attn.in_proj_bias"))
    q, k, v = qkv.split([lm["dim"], kv_dim, kv_dim], dim=1)
    if lm.get("qk_layer_norm"):
        q, k = _norm(state, "self_attn.q_layer_norm", q), _norm(state, "self_attn.k_layer_norm", k)
    behind = torch.arange(len(x))[:, None] - torch.arange(len(x))[None]
    allowed = behind >= 0
    if lm.get("past_context") is not None:
        allowed &= behind <= lm["past_context"]
    heads = []
    for h in range(lm["num_heads"]):
        kv = h // repeat
        qh = q[:, h * head_dim : (h + 1) * head_dim]
        kh, vh = (y[:, kv * head_dim : (kv + 1) * head_dim] for y in (k, v))
        if lm["positional_embedding"] != "sin":
            qh, kh = _rotated(lm, state, qh, 1), _rotated(lm, state, kh, -1)
        scores = (qh @ kh.T / head_dim**0.5).masked_fill(~allowed, float("-inf"))
        heads.append(scores.softmax(dim=1) @ vh)
    out = torch.cat(heads, dim=1)
    return F.linear(out, state["self_attn.out_proj.weight"], state.get("self_attn.out_proj.bias"))


def _cross_attention(lm: Mapping[str, Any], state: Mapping[str, Tensor], x: Tensor, source: Tensor) -> Tensor:
    dim, head_dim = lm["dim"], lm["dim"] // lm["num_heads"]
    weight, bias = state["cross_attention.in_proj_weight"], state.get("cross_attention.in_proj_bias")
    q, k, v = (
        F.linear(y, weight[i * dim : (i + 1) * dim], None if bias is None else bias[i * dim : (i + 1) * dim])
        for i, y in enumerate((x, source, source))
    )
    if lm.get("qk_layer_norm_cross"):
        q, k = _norm(state, "cross_attention.q_layer_norm", q), _norm(state, "cross_attention.k_layer_norm", k)
    heads = [
        (qh @ kh.T / head_dim**0.5).softmax(dim=1) @ vh
        for qh, kh, vh in zip(q.split(head_dim, 1), k.split(head_dim, 1), v.split(head_dim, 1), strict=True)
    ]
    out = torch.cat(heads, dim=1)
    return F.linear(out, state["cross_attention.out_proj.weight"], state.get("cross_attention.out_proj.bias"))


def _rotated(lm: Mapping[str, Any], state: Mapping[str, Tensor], x: Tensor, sign: int) -> Tensor:
    position = torch.arange(len(x))[:, None].float()
    angle = position * state["self_attn.rope.frequencies"].float()
    decay = torch.ones_like(angle)
    if lm.get("xpos"):
        decay = state["self_attn.rope.xpos.decay_rates"].float() ** (sign * position / 512)
    scale = lm.get("positional_scale", 1.0)
    cos, sin = scale * decay * angle.cos() + 1 - scale, scale * decay * angle.sin()
    even, odd = x[:, 0::2], x[:, 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=2).flatten(1)


def _norm(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)
