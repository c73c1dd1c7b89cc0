"""Resampling of a waveform that arrives in pieces."""

from __future__ import annotations

import math

import julius
import torch
from torch import Tensor

from handler.stream_audio.windows import Windows

BLOCK_SECONDS = 0.1


class StreamResampler:
    """`julius.resample_frac` of a whole signal, made while the signal arrives (equal to about 1e-6).

    julius's filter is a windowed sinc of finite support, so a block of output needs the block of input and a margin
    on both sides; beyond both ends of the signal julius repeats the first and the last sample.
    """

    def __init__(self, from_rate: int, to_rate: int) -> None:
        divisor = math.gcd(from_rate, to_rate)
        self._old, self._new = from_rate // divisor, to_rate // divisor
        self._resample = julius.ResampleFrac(from_rate, to_rate)
        width = (self._resample.get_buffer("kernel").shape[-1] - self._old) // 2
        # both in units of `old` input samples, which make `new` output samples
        self._margin = math.ceil(width / self._old)
        self._block = max(1, round(BLOCK_SECONDS * divisor))
        self._windows = Windows((self._block + 2 * self._margin) * self._old, self._block * self._old)
        self._heard = self._made = 0

    def push(self, wav: Tensor) -> Tensor:
        """Add a piece `[C, m]`, m at least 1; the resampled samples that have become certain, `[C, m']`."""
        before = wav[:, :0] if self._heard else wav[:, :1].expand(-1, self._margin * self._old)
        self._heard += wav.shape[-1]
        return self._blocks(torch.cat([before, wav], dim=-1))

    def finish(self) -> Tensor:
        """The remaining samples, `[C, m']`; in all there are `floor(T * to_rate / from_rate)`, as julius gives."""
        held = self._windows.rest()
        if held is None:
            return torch.zeros(1, 0)
        missing = self._heard * self._new // self._old - self._made
        return self._blocks(held[:, -1:].expand(-1, self._windows.size))[:, :missing]

    def _blocks(self, wav: Tensor) -> Tensor:
        first, last = self._margin * self._new, (self._margin + self._block) * self._new
        made = [self._resample(window)[:, first:last] for window in self._windows.push(wav)]
        self._made += self._block * self._new * len(made)
        return torch.cat([wav[:, :0], *made], dim=-1)
