"""Small random checkpoints with the names and the structure of real ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from handler.checkpoint import Checkpoint, Config

LM_DEFAULTS: dict[str, Any] = {
    "dim": 32,
    "num_heads": 4,
    "num_layers": 2,
    "hidden_scale": 4,
    "n_q": 4,
    "card": 48,
    "norm_first": True,
    "bias_ff": False,
    "bias_attn": False,
    "bias_proj": False,
    "activation": "gelu",
    "causal": True,
    "memory_efficient": True,
    "positional_embedding": "sin",
    "dropout": 0.1,
    "weight_init": "gaussian",
}


def lm_config(lm: Mapping[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """The `xp.cfg` of a language model under cross-attention, with `lm` over the defaults of `transformer_lm`."""
    config: dict[str, Any] = {
        "solver": "musicgen",
        "dora": {"dir": "/checkpoint/${oc.env:NOBODY_SETS_THIS}/outputs"},
        "sample_rate": 32000,
        "channels": 1,
        "dataset": {"segment_duration": 30},
        "lm_model": "transformer_lm",
        "transformer_lm": {**LM_DEFAULTS, **(lm or {})},
        "codebooks_pattern": {"modeling": "delay", "delay": {"delays": [0, 1, 2, 3]}},
        "fuser": {"cross": ["description"], "prepend": [], "sum": [], "input_interpolate": []},
        "conditioners": {
            "description": {"model": "lut", "lut": {"n_bins": 64, "dim": 16, "tokenizer": "noop"}},
            "args": {"drop_desc_p": 0.5},
        },
        "classifier_free_guidance": {"training_dropout": 0.3, "inference_coef": 3.0},
    }
    return {**config, **sections}


def lm_state(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random parameters under the names of audiocraft's language model (its own, and its LUT conditioners')."""
    generator = torch.Generator().manual_seed(seed)
    lm = config["transformer_lm"]
    dim, card, heads = lm["dim"], lm["card"], lm["num_heads"]
    head_dim = dim // heads
    kv_dim = head_dim * (heads // lm.get("kv_repeat", 1))
    hidden = int(lm["hidden_scale"] * dim)
    state: dict[str, Tensor] = {}

    def weight(name: str, *shape: int, bias: bool = False, suffix: str = ".weight") -> None:
        state[name + suffix] = torch.randn(shape, generator=generator) * (2.0 / shape[-1]) ** 0.5
        if bias:
            state[name + suffix.replace("weight", "bias")] = torch.randn(shape[0], generator=generator) * 0.2

    def norm(name: str) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(dim, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(dim, generator=generator)

    for k in range(lm["n_q"]):
        weight(f"emb.{k}", card + 1, dim)
        weight(f"linears.{k}", card, dim, bias=lm["bias_proj"])
    if lm["norm_first"]:
        norm("out_norm")
    rotary = lm["positional_embedding"] != "sin"
    if rotary:
        _rope(state, "transformer.rope", head_dim, lm.get("xpos", False))
    for i in range(lm["num_layers"]):
        layer = f"transformer.layers.{i}"
        weight(f"{layer}.self_attn.in_proj", dim + 2 * kv_dim, dim, bias=lm["bias_attn"], suffix="_weight")
        weight(f"{layer}.self_attn.out_proj", dim, dim, bias=lm["bias_attn"])
        weight(f"{layer}.linear1", hidden, dim, bias=lm["bias_ff"])
        weight(f"{layer}.linear2", dim, hidden, bias=lm["bias_ff"])
        norms = ["norm1", "norm2"]
        scales = ["layer_scale_1", "layer_scale_2"]
        attentions = ["self_attn"] if lm.get("qk_layer_norm") else []
        if config["fuser"]["cross"] or lm.get("cross_attention"):
            weight(f"{layer}.cross_attention.in_proj", 3 * dim, dim, bias=lm["bias_attn"], suffix="_weight")
            weight(f"{layer}.cross_attention.out_proj", dim, dim, bias=lm["bias_attn"])
            norms.append("norm_cross")
            scales.append("layer_scale_cross")
            attentions += ["cross_attention"] if lm.get("qk_layer_norm_cross") else []
        for name in norms:
            norm(f"{layer}.{name}")
        for name in attentions:
            norm(f"{layer}.{name}.q_layer_norm")
            norm(f"{layer}.{name}.k_layer_norm")
        if lm.get("layer_scale") is not None:
            for name in scales:
                state[f"{layer}.{name}.scale"] = 0.5 + 0.1 * torch.randn(dim, generator=generator)
        if rotary:
            _rope(state, f"{layer}.self_attn.rope", head_dim, lm.get("xpos", False))
    for name, conditioner in config["conditioners"].items():
        if name == "args" or conditioner["model"] != "lut":
            continue
        prefix = f"condition_provider.conditioners.{name}"
        weight(f"{prefix}.embed", conditioner["lut"]["n_bins"], conditioner["lut"]["dim"])
        weight(f"{prefix}.output_proj", dim, conditioner["lut"]["dim"], bias=True)
    return state


def lm_checkpoint(lm: Mapping[str, Any] | None = None, seed: int = 0, **sections: Any) -> Checkpoint:
    """A random language model's checkpoint, in memory."""
    config = lm_config(lm, **sections)
    return Checkpoint("state_dict.bin", Config.parse(yaml.safe_dump(config), "state_dict.bin"), lm_state(config, seed))


def write_export(path: Path, state: Mapping[str, Any], config: Mapping[str, Any] | str) -> None:
    """Writes an export as audiocraft does, float16 where `state` is."""
    text = config if isinstance(config, str) else yaml.safe_dump(config)
    torch.save({"best_state": dict(state), "xp.cfg": text, "version": "1.4.0a2", "exported": True}, path)


def _rope(state: dict[str, Tensor], name: str, head_dim: int, xpos: bool) -> None:
    even = torch.arange(0, head_dim, 2).float()
    state[f"{name}.frequencies"] = (1.0 / 10_000 ** (even / head_dim)).half()
    if xpos:
        half = torch.arange(head_dim // 2).float()
        state[f"{name}.xpos.decay_rates"] = ((half / (head_dim // 2) + 0.4) / 1.4).half()
