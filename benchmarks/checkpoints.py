"""Random checkpoints of the published models' true dimensions, made once and kept outside the repository."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel

from handler.checkpoint import COMPRESSION_FILE, LM_FILE
from handler.compression.audiocraft import encodec_from_config
from handler.debug_model import write_debug_checkpoint


@dataclass(frozen=True, slots=True)
class Dims:
    """Of a model; the defaults are what every published MusicGen has.

    Attributes:
        dim, heads, layers: the language model's.
        melody: whether text and chroma stand before the codes, instead of the text in cross-attention.
        filters: of the codec's outermost layer.
        text_layers, text_hidden: of T5; its dimension of 768 is every MusicGen's.
    """

    dim: int
    heads: int
    layers: int
    melody: bool = False
    filters: int = 64
    text_layers: int = 12
    text_hidden: int = 3072


DIMS = {
    "small": Dims(1024, 16, 24),
    "medium": Dims(1536, 24, 48),
    "large": Dims(2048, 32, 48),
    "melody": Dims(1536, 24, 48, melody=True),
}
"""Those of the published MusicGens, by name."""

CODEBOOKS, CARD = 4, 2048
TEXT_DIM, TEXT_VOCABULARY = 768, 32128
CHROMA_BINS, CHROMA_WINDOW = 12, 2**14

_VERSION = 2
"""Of what is written; a checkpoint of another version is not used again."""


def checkpoint_of(name: str, float32: bool = False) -> Path:
    """The folder of a random checkpoint, written at the first call (minutes for the large ones).

    Args:
        name: of `DIMS`.
        float32: the language model in float32, with weights that float16 cannot hold; else in float16, as published.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "musicgen-benchmarks"
    folder = cache / f"{name}{'-float32' if float32 else ''}-v{_VERSION}"
    if not folder.is_dir():
        staged = cache / f".{folder.name}-{os.getpid()}"
        shutil.rmtree(staged, ignore_errors=True)
        write_checkpoint(staged, DIMS[name], float32)
        staged.rename(folder)
    return folder


def write_checkpoint(folder: Path, dims: Dims, float32: bool = False) -> None:
    """Writes both checkpoint files and the auxiliary models, random but the same every time."""
    write_debug_checkpoint(folder)  # for its tokenizer
    generator = torch.Generator().manual_seed(0)
    state = _lm_state(dims, generator)
    if not float32:
        state = {name: value.half() for name, value in state.items()}
    _export(folder / LM_FILE, state, _lm_config(dims))
    codec = _codec_config(dims)
    _export(folder / COMPRESSION_FILE, _codec_state(codec, generator), codec)
    _write_t5(folder / "hub" / "t5-base", dims)
    if dims.melody:
        _write_htdemucs(folder / "hub" / "htdemucs")


def _export(path: Path, state: dict[str, Tensor], config: dict[str, object]) -> None:
    torch.save({"best_state": state, "xp.cfg": yaml.safe_dump(config), "version": "1.4.0a2", "exported": True}, path)


def _lm_config(dims: Dims) -> dict[str, object]:
    conditioners: dict[str, object] = {"description": {"model": "t5", "t5": {"name": "t5-base"}}}
    if dims.melody:
        chroma = {"sample_rate": 32000, "n_chroma": CHROMA_BINS, "radix2_exp": 14, "argmax": True}
        conditioners["self_wav"] = {"model": "chroma_stem", "chroma_stem": chroma}
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
        "fuser": {
            "cross": [] if dims.melody else ["description"],
            "prepend": ["self_wav", "description"] if dims.melody else [],
            "sum": [],
            "input_interpolate": [],
        },
        "conditioners": conditioners,
    }


def _lm_state(dims: Dims, generator: torch.Generator) -> dict[str, Tensor]:
    d = dims.dim
    shapes = {f"emb.{k}.weight": (CARD + 1, d) for k in range(CODEBOOKS)}
    shapes |= {f"linears.{k}.weight": (CARD, d) for k in range(CODEBOOKS)}
    norms = ["out_norm"]
    for i in range(dims.layers):
        layer = f"transformer.layers.{i}"
        for attention in ("self_attn",) if dims.melody else ("self_attn", "cross_attention"):
            shapes[f"{layer}.{attention}.in_proj_weight"] = (3 * d, d)
            shapes[f"{layer}.{attention}.out_proj.weight"] = (d, d)
        shapes |= {f"{layer}.linear1.weight": (4 * d, d), f"{layer}.linear2.weight": (d, 4 * d)}
        norms += [
            f"{layer}.{norm}" for norm in ("norm1", "norm2", "norm_cross") if not dims.melody or norm != "norm_cross"
        ]
    inputs = {"description": TEXT_DIM} | ({"self_wav": CHROMA_BINS} if dims.melody else {})
    projections = {f"condition_provider.conditioners.{name}.output_proj": into for name, into in inputs.items()}
    shapes |= {f"{projection}.weight": (d, into) for projection, into in projections.items()}
    state = {
        name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in tqdm(shapes.items(), desc="random language model", unit="tensor")
    }
    state |= {f"{projection}.bias": torch.zeros(d) for projection in projections}
    for norm in norms:
        state |= {f"{norm}.weight": torch.ones(d), f"{norm}.bias": torch.zeros(d)}
    if dims.melody:
        state["condition_provider.conditioners.self_wav.chroma.spec.window"] = torch.hann_window(CHROMA_WINDOW)
    return state


def _codec_config(dims: Dims) -> dict[str, object]:
    return {
        "compression_model": "encodec",
        "sample_rate": 32000,
        "channels": 1,
        "encodec": {"autoencoder": "seanet", "quantizer": "rvq", "sample_rate": 32000, "channels": 1},
        "seanet": {
            "channels": 1,
            "dimension": 128,
            "n_filters": dims.filters,
            "n_residual_layers": 1,
            "ratios": [8, 5, 4, 4],
            "norm": "weight_norm",
            "lstm": 2,
            "pad_mode": "constant",
        },
        "rvq": {"n_q": CODEBOOKS, "bins": CARD},
    }


def _codec_state(config: dict[str, object], generator: torch.Generator) -> dict[str, Tensor]:
    """Float32, with each weight norm apart and the codebooks' training statistics, as published."""
    state: dict[str, Tensor] = {}
    for name, parameter in encodec_from_config(config).state_dict().items():
        value = torch.randn(parameter.shape, generator=generator)
        stem, _, leaf = name.rpartition(".")
        if stem == "quantizer.codebooks":
            codebook = f"quantizer.vq.layers.{leaf}._codebook"
            statistics = {"inited": torch.ones(1), "cluster_size": torch.ones(len(value)), "embed_avg": value.clone()}
            state |= {f"{codebook}.{key}": tensor for key, tensor in {"embed": value, **statistics}.items()}
        elif value.dim() == 3:
            state |= {f"{stem}.weight_g": torch.ones(len(value), 1, 1), f"{stem}.weight_v": value}
        else:
            state[name] = value * value.shape[-1] ** -0.5 * 0.5
    return state


def _write_t5(folder: Path, dims: Dims) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=TEXT_VOCABULARY,
        d_model=TEXT_DIM,
        d_kv=64,
        d_ff=dims.text_hidden,
        num_layers=dims.text_layers,
        num_heads=12,
    )
    T5EncoderModel(config).save_pretrained(folder)


def _write_htdemucs(folder: Path) -> None:
    # Imported here: demucs takes a while to import, and only melody models need it.
    from demucs.htdemucs import HTDemucs

    from handler.conditioners.htdemucs import CONFIG_FILE, WEIGHTS_FILE

    torch.manual_seed(0)
    config = {"sources": ["drums", "bass", "other", "vocals"], "bottom_channels": 512, "segment": "39/5"}
    folder.mkdir(parents=True)
    state = HTDemucs(config["sources"], bottom_channels=512).state_dict()
    save_file({name: value.half().contiguous() for name, value in state.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
