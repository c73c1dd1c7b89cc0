"""Random checkpoints of the published models' true dimensions, made once and kept outside the repository."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel

from handler.compression.audiocraft import encodec_from_config
from handler.debug_model import write_debug_checkpoint


@dataclass(frozen=True, slots=True)
class Dims:
    """Of a language model."""

    dim: int
    heads: int
    layers: int


DIMS = {"small": Dims(1024, 16, 24), "medium": Dims(1536, 24, 48), "large": Dims(2048, 32, 48)}
"""Those of the text-conditioned MusicGens, by name."""

CODEBOOKS, CARD = 4, 2048


def checkpoint_of(name: str) -> Path:
    """The folder of a random checkpoint, written at the first call (minutes for the large ones)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "musicgen-benchmarks"
    folder = cache / name
    if folder.is_dir():
        return folder
    staged = cache / f".{name}-{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    write_debug_checkpoint(staged)  # for its tokenizer
    generator = torch.Generator().manual_seed(0)
    _export(staged / "state_dict.bin", _lm_state(DIMS[name], generator), _lm_config(DIMS[name]))
    _export(staged / "compression_state_dict.bin", _codec_state(generator), _CODEC)
    _write_t5(staged / "hub" / "t5-base")
    staged.rename(folder)
    return folder


def _export(path: Path, state: dict[str, Tensor], config: dict[str, object]) -> None:
    torch.save({"best_state": state, "xp.cfg": yaml.safe_dump(config), "version": "1.4.0a2", "exported": True}, path)


def _lm_config(dims: Dims) -> dict[str, object]:
    return {
        "solver": "musicgen",
        "dataset": {"segment_duration": 30},
        "lm_model": "transformer_lm",
        "transformer_lm": {
            "dim": dims.dim,
            "num_heads": dims.heads,
            "num_layers": dims.layers,
            "hidden_scale": 4,
            "n_q": CODEBOOKS,
            "card": CARD,
            "norm_first": True,
            "bias_ff": False,
            "bias_attn": False,
            "bias_proj": False,
            "activation": "gelu",
            "causal": True,
            "positional_embedding": "sin",
        },
        "codebooks_pattern": {"modeling": "delay", "delay": {"delays": [0, 1, 2, 3]}},
        "fuser": {"cross": ["description"], "prepend": [], "sum": [], "input_interpolate": []},
        "conditioners": {"description": {"model": "t5", "t5": {"name": "t5-base"}}},
    }


def _lm_state(dims: Dims, generator: torch.Generator) -> dict[str, Tensor]:
    d = dims.dim
    shapes = {f"emb.{k}.weight": (CARD + 1, d) for k in range(CODEBOOKS)}
    shapes |= {f"linears.{k}.weight": (CARD, d) for k in range(CODEBOOKS)}
    norms = ["out_norm"]
    for i in range(dims.layers):
        layer = f"transformer.layers.{i}"
        for attention in ("self_attn", "cross_attention"):
            shapes[f"{layer}.{attention}.in_proj_weight"] = (3 * d, d)
            shapes[f"{layer}.{attention}.out_proj.weight"] = (d, d)
        shapes |= {f"{layer}.linear1.weight": (4 * d, d), f"{layer}.linear2.weight": (d, 4 * d)}
        norms += [f"{layer}.{norm}" for norm in ("norm1", "norm2", "norm_cross")]
    shapes["condition_provider.conditioners.description.output_proj.weight"] = (d, 768)
    state = {
        name: (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).half()
        for name, shape in tqdm(shapes.items(), desc="random language model", unit="tensor")
    }
    for norm in norms:
        state |= {f"{norm}.weight": torch.ones(d).half(), f"{norm}.bias": torch.zeros(d).half()}
    state["condition_provider.conditioners.description.output_proj.bias"] = torch.zeros(d).half()
    return state


_CODEC: dict[str, object] = {
    "compression_model": "encodec",
    "sample_rate": 32000,
    "channels": 1,
    "encodec": {"autoencoder": "seanet", "quantizer": "rvq", "sample_rate": 32000, "channels": 1},
    "seanet": {
        "channels": 1,
        "dimension": 128,
        "n_filters": 64,
        "n_residual_layers": 1,
        "ratios": [8, 5, 4, 4],
        "norm": "weight_norm",
        "lstm": 2,
        "pad_mode": "constant",
    },
    "rvq": {"n_q": CODEBOOKS, "bins": CARD},
}


def _codec_state(generator: torch.Generator) -> dict[str, Tensor]:
    state = {}
    for name, parameter in encodec_from_config(_CODEC).state_dict().items():
        scale = 1.0 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        key = name
        if name.startswith("quantizer.codebooks."):
            key, scale = f"quantizer.vq.layers.{name.rsplit('.', 1)[1]}._codebook.embed", 1.0
        state[key] = torch.randn(parameter.shape, generator=generator) * scale * (parameter.dim() > 1)
    return state


def _write_t5(folder: Path) -> None:
    vocabulary = T5Config.from_pretrained(folder).vocab_size
    torch.manual_seed(0)
    config = T5Config(vocab_size=vocabulary, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    T5EncoderModel(config).save_pretrained(folder)
