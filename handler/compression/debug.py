"""The compression model of audiocraft's own tests: tiny, with random weights."""

from __future__ import annotations

import math
from typing import Any

import torch

from handler.compression.audiocraft import encodec_from_config
from handler.compression.encodec import EncodecModel

_RATIOS = {16_000: (10, 8, 8), 32_000: (10, 8, 16)}  # 25 Hz
_SEED = 2036


def debug_encodec(sample_rate: int = 32_000) -> EncodecModel:
    """What a pointer to `debug_compression_model` means: 25 frames a second of 4 codebooks of 400 codes.

    The architecture is that of audiocraft's `get_debug_compression_model`, which draws new weights every time. Here
    they follow from a fixed seed, so that the same codes always give the same noise.

    Args:
        sample_rate: 16000 or 32000 Hz.

    Raises:
        ValueError: for another rate.
    """
    model = encodec_from_config(debug_config(sample_rate)).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(_SEED)
    for name, parameter in model.named_parameters():
        if name.startswith("quantizer."):
            parameter.normal_(generator=generator)
        else:
            bound = 1 / math.sqrt(parameter[0].numel())
            parameter.uniform_(-bound, bound, generator=generator)
    return model


def debug_config(sample_rate: int = 32_000) -> dict[str, Any]:
    """Its `xp.cfg`. Raises as `debug_encodec`."""
    if sample_rate not in _RATIOS:
        raise ValueError(f"the debug model's sample rate must be {' or '.join(map(str, _RATIOS))}, not {sample_rate}")
    return {
        "compression_model": "encodec",
        "sample_rate": sample_rate,
        "channels": 1,
        "encodec": {"autoencoder": "seanet", "quantizer": "rvq"},
        "seanet": {"n_filters": 4, "n_residual_layers": 1, "dimension": 32, "ratios": list(_RATIOS[sample_rate])},
        "rvq": {"n_q": 4, "bins": 400},
    }
