"""Compression models: audio to codes and back."""

from __future__ import annotations

from handler.compression.audiocraft import encodec_from_config, load_encodec
from handler.compression.base import CompressionModel
from handler.compression.encodec import EncodecConfig, EncodecModel
from handler.compression.huggingface import load_huggingface_encodec
from handler.compression.interleaved import InterleavedStereo
from handler.compression.quantizer import ResidualVectorQuantizer
from handler.compression.seanet import SEANetConfig, SEANetDecoder, SEANetEncoder

__all__ = [
    "CompressionModel",
    "EncodecConfig",
    "EncodecModel",
    "InterleavedStereo",
    "ResidualVectorQuantizer",
    "SEANetConfig",
    "SEANetDecoder",
    "SEANetEncoder",
    "encodec_from_config",
    "load_encodec",
    "load_huggingface_encodec",
]
