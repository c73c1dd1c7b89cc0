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
    converter = AudioConverter(from_rate, to_rate, to_channels)
    converter.add(wav)
    converter.finish()
    return converter.part()


class AudioConverter:
    """`convert_audio` for audio that comes piece by piece: `add` each, `finish`, then take a `part`.

    Attributes:
        length: samples of each channel converted so far; of all, once it is finished.
    """

    def __init__(self, from_rate: int, to_rate: int, to_channels: int) -> None:
        self.length = 0
        self._rates = from_rate, to_rate
        self._channels = to_channels
        self._block = BLOCK_SECONDS * from_rate
        divisor = math.gcd(from_rate, to_rate)
        self._old, self._new = from_rate // divisor, to_rate // divisor  # old input samples become new output samples
        self._pending: list[Tensor] = []  # from the margin of the next block on
        self._pending_from = self._first = self._given = self._margin = 0
        self._resample: julius.ResampleFrac | None = None
        self._converted: list[Tensor] = []

    def add(self, wav: Tensor) -> None:
        """Take the next `[*, C, T]`.

        Raises:
            ValueError: as `convert_channels`.
        """
        self._given += wav.shape[-1]
        if self._old == self._new:
            self._keep(convert_channels(wav, self._channels))
            return
        self._pending.append(wav)
        if self._given > 2 * self._block:
            self._prepare(wav)
            while self._first + self._block + self._margin <= self._given:
                self._convert_block((self._first + self._block) * self._new // self._old)

    def finish(self) -> None:
        """Convert what is left."""
        if self._old == self._new or not self._pending:
            return
        if self._given <= 2 * self._block:
            wav = torch.cat(self._pending, dim=-1)
            self._keep(convert_channels(julius.resample_frac(wav, *self._rates), self._channels))
        else:
            # julius rounds a length in float32
            told = int(torch.tensor(self._new * self._given / self._old))
            samples = min(told, -(-self._new * self._given // self._old))
            while self._first < self._given:
                self._convert_block(min(samples, (self._first + self._block) * self._new // self._old))
        self._pending = []

    def part(self, first: int = 0, last: int | None = None) -> Tensor:
        """Some of the converted audio, `[*, to_channels, last - first]`; at first all of it."""
        last, place, pieces = self.length if last is None else last, 0, []
        for piece in self._converted:
            pieces.append(piece[..., max(0, first - place) : max(0, last - place)])
            place += piece.shape[-1]
        return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]

    def _prepare(self, wav: Tensor) -> None:
        if self._resample is None:
            self._resample = julius.ResampleFrac(*self._rates).to(wav)
            self._margin = self._old * math.ceil(self._resample.get_buffer("kernel").shape[-1] / self._old)

    def _convert_block(self, last: int) -> None:
        """Convert the next block, up to a sample of the result."""
        assert self._resample is not None
        wav = torch.cat(self._pending, dim=-1) if len(self._pending) > 1 else self._pending[0]
        start, end = max(0, self._first - self._margin), self._first + self._block + self._margin
        piece = wav[..., start - self._pending_from : end - self._pending_from]
        piece = convert_channels(self._resample(piece, full=True), self._channels)
        skipped = (self._first - start) * self._new // self._old
        self._keep(piece[..., skipped : skipped + last - self.length].clone())  # it is a part of more
        self._first += self._block
        self._pending = [wav[..., max(0, self._first - self._margin) - self._pending_from :]]
        self._pending_from = max(0, self._first - self._margin)

    def _keep(self, converted: Tensor) -> None:
        self._converted.append(converted)
        self.length += converted.shape[-1]


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
