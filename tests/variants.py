"""Small random checkpoints of every published repository: its keys, its configuration, its auxiliary models.

What follows from the variant is true (conditioners, fuser, codebooks and delays, interleaving, the codec's form, sample
rate, segment, T5), sizes are a sixteenth of the published ones or less. The configurations are the goldens', which
audiocraft made.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from handler.checkpoint import COMPRESSION_FILE, LM_FILE
from handler.registry import VARIANTS, Variant
from tests.checkpoints import lm_state, write_export

GOLDENS = Path(__file__).resolve().parent / "goldens"
SHRINK = 16
LAYERS = 2
# Written by an older exporter, without `version` and `exported`.
FIRST_RELEASE = ("small", "medium", "large", "melody")
# Repositories that hold the codec itself; the others point to `facebook/encodec_32khz`.
WITH_CODEC = (*FIRST_RELEASE, "style", "audiogen-medium")
T5_DIMS = {"t5-base": 768, "t5-large": 1024}


def write_variant(name: str, folder: Path) -> Path:
    """Write the checkpoint of a variant, with its auxiliary models in `hub/`, and return the folder."""
    variant = VARIANTS[name]
    (folder / "hub").mkdir(parents=True, exist_ok=True)
    config = lm_config(variant)
    _write(folder / LM_FILE, variant, _lm_state(variant, config), config)
    _write_codec(folder / COMPRESSION_FILE, variant)
    for auxiliary in variant.auxiliaries:
        target = folder / "hub" / auxiliary
        if auxiliary == "t5-large":
            _write_t5_large(target)
        else:
            shutil.copytree(GOLDENS / "hub" / auxiliary, target)
    return folder


def lm_config(variant: Variant) -> dict[str, Any]:
    """The `xp.cfg` of a variant's language model."""
    golden = {"melody": "melody", "style": "style"}.get(variant.conditioners[-1], "text_mono")
    config = _config_of(GOLDENS / golden / LM_FILE)
    num_codebooks = 4 * variant.channels
    config["transformer_lm"] |= {
        "dim": variant.dim // SHRINK,
        "num_heads": variant.heads // 4,
        "num_layers": LAYERS,
        "n_q": num_codebooks,
    }
    if variant.channels == 2:
        config["channels"] = 2
        config["interleave_stereo_codebooks"] = {"use": True, "per_timestep": False}
        config["codebooks_pattern"]["delay"]["delays"] = [0, 0, 1, 1, 2, 2, 3, 3]
    if variant.name == "audiogen-medium":
        config |= {"solver": "audiogen", "sample_rate": 16_000}
        config["dataset"]["segment_duration"] = 10
        config["conditioners"]["description"]["t5"]["name"] = "t5-large"
    return config


def _lm_state(variant: Variant, config: dict[str, Any]) -> dict[str, Tensor]:
    """Float16, as published."""
    state = lm_state(config)
    generator = torch.Generator().manual_seed(1)
    dim = config["transformer_lm"]["dim"]

    def projection(name: str, into: int) -> None:
        prefix = f"condition_provider.conditioners.{name}.output_proj"
        state[f"{prefix}.weight"] = torch.randn(dim, into, generator=generator) / into**0.5
        state[f"{prefix}.bias"] = torch.randn(dim, generator=generator) * 0.1

    projection("description", T5_DIMS[config["conditioners"]["description"]["t5"]["name"]])
    if "melody" in variant.conditioners:
        projection("self_wav", 12)
        state["condition_provider.conditioners.self_wav.chroma.spec.window"] = torch.hann_window(16384)
    if "style" in variant.conditioners:
        golden = torch.load(GOLDENS / "style" / LM_FILE, weights_only=True)["best_state"]
        state |= {name: value for name, value in golden.items() if ".self_wav." in name}
        projection("self_wav", 256)
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}


def _write_codec(path: Path, variant: Variant) -> None:
    """An EnCodec, or the pointer to one. AudioGen's runs at 16 kHz with a last stride of 2 instead of 4."""
    if variant.name not in WITH_CODEC:
        torch.save({"pretrained": "facebook/encodec_32khz", "exported": True, "version": "1.4.0a2"}, path)
        return
    golden = GOLDENS / "text_mono" / COMPRESSION_FILE
    state, config = torch.load(golden, weights_only=True)["best_state"], _config_of(golden)
    if variant.sample_rate == 16_000:
        config["sample_rate"] = 16_000
        config["seanet"]["ratios"] = [8, 5, 4, 2]
        for name in ("encoder.model.3.conv.conv", "decoder.model.12.convtr.convtr"):
            state[f"{name}.weight_v"] = state[f"{name}.weight_v"][..., :4].clone()
    _write(path, variant, state, config)


def _write(path: Path, variant: Variant, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    if variant.name in FIRST_RELEASE:
        torch.save({"best_state": state, "xp.cfg": yaml.safe_dump(config, sort_keys=False)}, path)
    else:
        write_export(path, state, yaml.safe_dump(config, sort_keys=False))


def _config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(torch.load(path, weights_only=True)["xp.cfg"])
    return config


def _write_t5_large(folder: Path) -> None:
    """The goldens' T5 once more, with 1024 dimensions for 768 and other random weights."""
    shutil.copytree(GOLDENS / "hub" / "t5-base", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_model": 1024}))
    generator = torch.Generator().manual_seed(2)
    state = {}
    for name, value in load_file(folder / "model.safetensors").items():
        shape = [1024 if size == 768 else size for size in value.shape]
        norm = name.endswith("layer_norm.weight")
        state[name] = torch.ones(shape) if norm else torch.randn(shape, generator=generator) * float(value.std())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
