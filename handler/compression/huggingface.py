"""EnCodec from a Hugging Face `EncodecModel` folder: `config.json` and its weights."""

from __future__ import annotations

import math
from pathlib import Path

from handler.compression.conv import PAD_MODES
from handler.compression.encodec import EncodecConfig, EncodecModel
from handler.compression.seanet import SEANetConfig
from handler.compression.state import load_weights
from handler.model_folder import read_model_config, read_model_weights
from handler.section import Section


def load_huggingface_encodec(folder: Path) -> EncodecModel:
    """Rebuild an EnCodec from `config.json` and `model.safetensors` or `pytorch_model.bin`.

    Raises:
        CheckpointError: a file is absent or unreadable, `config.json` names what can't be honoured, or the
            weights don't fit it.
    """
    model = _read_config(folder).build()
    path, weights = read_model_weights(folder)
    load_weights(model, weights, str(path), _file_key)
    return model


def _read_config(folder: Path) -> EncodecConfig:
    """The defaults are those of transformers' EncodecConfig."""
    config = read_model_config(folder)
    section = Section(str(folder / "config.json"), (("", config),))
    section.choice("model_type", "encodec", ["encodec"])
    if section.get("chunk_length_s") is not None:
        raise section.error("chunk_length_s", "must be null: coding in overlapping chunks isn't supported")
    dimension = section.integer("hidden_size", 128)
    if section.get("codebook_dim") not in (None, dimension):
        raise section.error("codebook_dim", f"must be hidden_size, {dimension}")
    network = SEANetConfig(
        channels=section.integer("audio_channels", 1),
        dimension=dimension,
        n_filters=section.integer("num_filters", 32),
        n_residual_layers=section.integer("num_residual_layers", 1, at_least=0),
        ratios=section.integers("upsampling_ratios", (8, 5, 4, 2)),
        norm=section.choice("norm_type", "weight_norm", ["weight_norm", "time_group_norm"]),
        kernel_size=section.integer("kernel_size", 7),
        last_kernel_size=section.integer("last_kernel_size", 7),
        residual_kernel_size=section.integer("residual_kernel_size", 3),
        dilation_base=section.integer("dilation_growth_rate", 2),
        causal=section.flag("use_causal_conv", True),
        pad_mode=section.choice("pad_mode", "reflect", PAD_MODES),
        true_skip=not section.flag("use_conv_shortcut", True),
        compress=section.integer("compress", 2),
        lstm=section.integer("num_lstm_layers", 2),
        trim_right_ratio=section.number("trim_right_ratio", 1.0, 0.0, 1.0),
    )
    sample_rate = section.integer("sampling_rate", 24_000)
    bins = section.integer("codebook_size", 1024, at_least=2)
    frame_rate = sample_rate / network.hop_length
    return EncodecConfig(
        encoder=network,
        decoder=network,
        codebooks=_codebooks(section, frame_rate, bins),
        bins=bins,
        sample_rate=sample_rate,
        frame_rate=frame_rate,
        renormalize=section.flag("normalize", False),
    )


def _codebooks(section: Section, frame_rate: float, bins: int) -> int:
    """How many codebooks the highest bandwidth (kbit/s) pays for: 2.2 at 50 Hz and 2048 bins are 4."""
    bandwidths = section.get("target_bandwidths", (1.5, 3.0, 6.0, 12.0, 24.0))
    if not isinstance(bandwidths, list | tuple) or not all(isinstance(b, int | float) for b in bandwidths):
        raise section.error("target_bandwidths", "must be a list of numbers, in kbit/s")
    # The small term is for quotients that rounding leaves just below an integer.
    codebooks = int(max(bandwidths, default=0) * 1000 / (frame_rate * math.log2(bins)) + 1e-3)
    if codebooks < 1:
        raise section.error("target_bandwidths", "must hold one that pays for a codebook")
    return codebooks


def _file_key(name: str) -> str:
    """A parameter's key in the file."""
    stem, _, index = name.rpartition(".")
    if stem == "quantizer.codebooks":
        return f"quantizer.layers.{index}.codebook.embed"
    key = name.replace(".model.", ".layers.", 1)
    for ours, theirs in ((".conv.conv.", ".conv."), (".convtr.convtr.", ".conv.")):
        key = key.replace(ours, theirs)
    for ours in (".conv.norm.", ".convtr.norm."):
        key = key.replace(ours, ".norm.")
    return key
