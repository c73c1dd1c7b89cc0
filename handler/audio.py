"""Waveforms: conversion of rate and channels, levels, and 16-bit samples.

A waveform is a float32 tensor of shape [C, T] with values nominally in [-1, 1]; a sample rate is in Hz.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import julius
import numpy as np
import pyloudnorm
import torch
from torch import Tensor

LOUDNESS_TARGET = -14.0  # LUFS
LOUDNESS_FLOOR = 2e-3  # RMS under which a signal is taken for silence and left as it is
PEAK_HEADROOM = 10 ** (-1 / 20)
RMS_TARGET = 10 ** (-18 / 20)

BLOCK_SECONDS = 10


def convert_channels(wav: Tensor, channels: int) -> Tensor:
    """Bring `[*, C, T]` to `[*, channels, T]`: the mean for mono, mono repeated, else the first channels.

    Raises:
        ValueError: when channels would have to be invented (2 to 4, say).
    """
    given = wav.shape[-2]
    if given == channels:
        return wav
    if channels == 1:
        return wav.mean(dim=-2, keepdim=True)
    if given == 1:
        return wav.expand(*wav.shape[:-2], channels, wav.shape[-1])
    if given > channels:
        return wav[..., :channels, :]
    raise ValueError(f"audio with {given} channels has fewer than the {channels} needed and is not mono")


def convert_audio(wav: Tensor, from_rate: int, to_rate: int, to_channels: int) -> Tensor:
    """Resample `[*, C, T]` with julius's windowed sinc and convert its channels: `[*, to_channels, T']`.

    Long audio is converted in blocks, for the convolution takes several times the memory of what it is given. A block
    is given the samples around it that its own depend on, so the result is that of the whole, up to rounding.

    Raises:
        ValueError: as `convert_channels`.
    """
    length, block = wav.shape[-1], BLOCK_SECONDS * from_rate
    if from_rate == to_rate or length <= 2 * block:
        return convert_channels(julius.resample_frac(wav, from_rate, to_rate), to_channels)
    resample = julius.ResampleFrac(from_rate, to_rate).to(wav)
    divisor = math.gcd(from_rate, to_rate)
    old, new = from_rate // divisor, to_rate // divisor  # so many samples become so many
    margin = old * math.ceil(resample.get_buffer("kernel").shape[-1] / old)
    # julius rounds a length in float32
    samples = min(int(torch.tensor(new * length / old)), -(-new * length // old))
    converted = wav.new_empty(*wav.shape[:-2], to_channels, samples)
    for first in range(0, length, block):
        start = max(0, first - margin)
        piece = convert_channels(resample(wav[..., start : first + block + margin], full=True), to_channels)
        place = converted[..., first * new // old : (first + block) * new // old]
        skipped = (first - start) * new // old
        place.copy_(piece[..., skipped : skipped + place.shape[-1]])
    return converted


def normalize(wav: Tensor, sample_rate: int, strategy: str) -> Tensor:
    """Set the level of a waveform `[C, T]` as audiocraft's `audio_write` does.

    * `loudness`: ITU-R BS.1770-4 integrated loudness to -14 LUFS, then tanh, then within ±1;
    * `peak`: the largest sample at -1 dB;
    * `rms`: the RMS of the channels' mean at -18 dB, then within ±1;
    * `clip`: cut at ±(-1 dB);
    * `none`: as it is.

    Silence stays silence: nothing is scaled by a measure that is zero or not a number.
    """
    return NORMALIZATIONS[strategy](wav, sample_rate)


def _normalize_loudness(wav: Tensor, sample_rate: int) -> Tensor:
    if float(wav.square().mean().sqrt()) < LOUDNESS_FLOOR:
        return wav.clamp(-1, 1)
    return torch.tanh(wav * _decibels(LOUDNESS_TARGET - integrated_loudness(wav, sample_rate))).clamp(-1, 1)


def integrated_loudness(wav: Tensor, sample_rate: int) -> float:
    """The integrated loudness of `[C, T]` in LUFS (ITU-R BS.1770-4); minus infinity for silence.

    A clip shorter than the standard's 0.4 s gating block is measured as one block of its own length.
    """
    samples = wav.detach().cpu().double().numpy().T  # [T, C]
    block = min(0.4, len(samples) / sample_rate)
    return float(pyloudnorm.Meter(sample_rate, block_size=block).integrated_loudness(samples))


def _decibels(gain: float) -> float:
    """The factor for a gain in dB; 1 when the gain is not finite (a constant signal has no loudness at all)."""
    return 10 ** (gain / 20) if math.isfinite(gain) else 1.0


def _normalize_peak(wav: Tensor, sample_rate: int) -> Tensor:
    return wav * _ratio(PEAK_HEADROOM, float(wav.abs().max()))


def _normalize_rms(wav: Tensor, sample_rate: int) -> Tensor:
    rms = float(wav.mean(dim=0).square().mean().sqrt())
    return (wav * _ratio(RMS_TARGET, rms)).clamp(-1, 1)


def _normalize_clip(wav: Tensor, sample_rate: int) -> Tensor:
    return wav.clamp(-PEAK_HEADROOM, PEAK_HEADROOM)


def _ratio(target: float, measured: float) -> float:
    return target / measured if measured > 1e-8 else 1.0


NORMALIZATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "loudness": _normalize_loudness,
    "peak": _normalize_peak,
    "rms": _normalize_rms,
    "clip": _normalize_clip,
    "none": lambda wav, sample_rate: wav,
}


def to_int16(wav: Tensor) -> np.ndarray:
    """Samples `[C, T]` in [-1, 1] as little-endian 16-bit integers `[T, C]`; what is outside is cut, never wrapped."""
    samples = wav.detach().cpu().T.double().nan_to_num(0.0).clamp(-1, 1).mul(32767).round()
    return np.ascontiguousarray(samples.numpy().astype("<i2"))
