"""Compression models by name, as checkpoints point to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from handler.compression.base import CompressionModel
from handler.compression.dac import load_dac
from handler.compression.debug import debug_encodec
from handler.compression.huggingface import load_huggingface_encodec

DEBUG = "debug_compression_model"
"""Names the model of audiocraft's own tests."""

DAC = {"dac_44khz": "descript/dac_44khz", "dac_24khz": "descript/dac_24khz"}
"""From audiocraft's names of Descript's models to their ids on the hub."""


def load_pretrained(name: str, find_auxiliary: Callable[[str], Path]) -> CompressionModel:
    """The compression model that `{'pretrained': name}` or `//pretrained/name` means.

    Args:
        name: `dac_44khz`, `dac_24khz`, `debug_compression_model`, or the hub id of a transformers EncodecModel.
        find_auxiliary: from a hub id to its folder.

    Raises:
        CheckpointError: if it cannot be found or used.
    """
    if name in DAC:
        return load_dac(find_auxiliary(DAC[name]))
    if name == DEBUG:
        return debug_encodec()
    return load_huggingface_encodec(find_auxiliary(name))
