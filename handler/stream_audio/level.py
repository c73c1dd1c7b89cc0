"""The level of a waveform set while it is made: what `handler.audio.normalize` does to a whole clip, approximated."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque

import numpy as np
import scipy.signal
import torch
from pyloudnorm import IIRfilter
from torch import Tensor

from handler.audio import LOUDNESS_FLOOR, LOUDNESS_TARGET, PEAK_HEADROOM, RMS_TARGET, normalize
from handler.stream_audio.windows import Windows

BLOCK_SECONDS = 0.1
LOOKAHEAD_BLOCKS = 3
MAX_GAIN = 10.0  # 20 dB: a clip that fades in from noise must not begin with that noise at full level


class StreamLevel:
    """A causal limiter: sets the level of one clip `[C, T]` as it arrives, by what has been heard of it so far.

    `none` and `clip` do exactly what they do to a whole clip, at once. The others measure the clip in blocks of
    100 ms counted from its start. A block leaves when the three after it have been measured too, under the gain that
    follows from all that has been measured: so sound starts after 0.4 s, a loud passage is turned down before it
    begins, and the gain goes from one block's to the next in a straight line, without clicks.

    * `loudness`: a gain for -14 LUFS of the gated loudness so far (ITU-R BS.1770-4), then tanh, then within ±1;
    * `rms`: a gain for -18 dB of the RMS so far of the channels' mean, silence not counted, then within ±1;
    * `peak`: a gain that puts the largest sample so far at -1 dB; no sample ever goes beyond that, and once a sound
      has been heard the gain only falls.

    What a listener gets, compared with the whole clip's strategy: a clip of steady level is within 1 dB of it from
    the start and equal to it after a few seconds. A quiet beginning is played as if it were the whole clip, 10 to
    20 dB louder, and its crescendo is flatter; after the clip's loudest passage has begun both draw near in seconds.
    No gain exceeds 20 dB, so a very quiet clip stays below its target; what comes before the first sound has gain 1.

    The result does not depend on how the clip is cut into pushes, and is as long as the clip.
    """

    def __init__(self, strategy: str, sample_rate: int) -> None:
        block = round(BLOCK_SECONDS * sample_rate)
        self._strategy, self._sample_rate = strategy, sample_rate
        self._measure = _MEASURES[strategy](sample_rate) if strategy in _MEASURES else None
        self._windows = Windows(block, block)
        self._held: deque[Tensor] = deque()
        self._ramp = torch.arange(1, block + 1) / block
        self._gain: float | None = None
        self._nothing = torch.zeros(1, 0)

    def push(self, wav: Tensor) -> Tensor:
        """Add samples, float32 `[C, m]`; those whose level is decided, `[C, m']`."""
        wav = wav.detach().cpu().float()
        self._nothing = wav[:, :0]
        if self._measure is None:
            return normalize(wav, self._sample_rate, self._strategy)
        out = [self._nothing]
        for block in self._windows.push(wav):
            self._measure.add(block.numpy())
            self._held.append(block)
            if len(self._held) > LOOKAHEAD_BLOCKS:
                out.append(self._leave(self._measure))
        return torch.cat(out, dim=-1)

    def finish(self) -> Tensor:
        """The remaining samples, `[C, m']`."""
        rest = self._windows.rest()
        if self._measure is None or rest is None:
            return self._nothing
        if rest.shape[-1]:
            self._measure.add(rest.numpy())
            self._held.append(rest)
        return torch.cat([self._nothing, *(self._leave(self._measure) for _ in range(len(self._held)))], dim=-1)

    def _leave(self, measure: _Measure) -> Tensor:
        block = self._held.popleft()
        gain = measure.gain()
        start = gain if self._gain is None else self._gain
        self._gain = gain
        return measure.limit(block * (start + (gain - start) * self._ramp[: block.shape[-1]]))


class _Measure(ABC):
    """What has been heard so far, and the gain that follows from it."""

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate

    @abstractmethod
    def add(self, block: np.ndarray) -> None:
        """Hear the next 100 ms `[C, n]`, or the clip's last samples, fewer."""

    @abstractmethod
    def gain(self) -> float:
        """The factor for what has been heard."""

    @abstractmethod
    def limit(self, wav: Tensor) -> Tensor:
        """Keep an amplified block `[C, n]` within bounds."""


class _Peak(_Measure):
    def __init__(self, sample_rate: int) -> None:
        super().__init__(sample_rate)
        self._peak = 0.0

    def add(self, block: np.ndarray) -> None:
        self._peak = max(self._peak, float(np.abs(block).max()))

    def gain(self) -> float:
        return _bounded(PEAK_HEADROOM, self._peak)

    def limit(self, wav: Tensor) -> Tensor:
        return wav.clamp(-PEAK_HEADROOM, PEAK_HEADROOM)  # the last bit


class _Rms(_Measure):
    def __init__(self, sample_rate: int) -> None:
        super().__init__(sample_rate)
        self._energy, self._samples = 0.0, 0

    def add(self, block: np.ndarray) -> None:
        mono = block.mean(axis=0, dtype=np.float64)
        if _rms(mono) >= LOUDNESS_FLOOR:
            self._energy += float(np.square(mono).sum())
            self._samples += mono.size

    def gain(self) -> float:
        return _bounded(RMS_TARGET, math.sqrt(self._energy / max(1, self._samples)))

    def limit(self, wav: Tensor) -> Tensor:
        return wav.clamp(-1, 1)


class _Loudness(_Measure):
    """Integrated loudness so far (ITU-R BS.1770-4): its gating blocks of 400 ms, 75 % overlapping, are four of ours."""

    def __init__(self, sample_rate: int) -> None:
        super().__init__(sample_rate)
        shelf = IIRfilter(4.0, 1 / math.sqrt(2), 1500.0, sample_rate, "high_shelf")
        highpass = IIRfilter(0.0, 0.5, 38.0, sample_rate, "high_pass")
        self._sections = np.array([[*stage.b, *stage.a] for stage in (shelf, highpass)])  # [2, 6]
        self._state: np.ndarray | None = None  # [2, C, 2]
        self._powers: list[float] = []  # K-weighted mean squares of the blocks, summed over channels
        self._sound = False

    def add(self, block: np.ndarray) -> None:
        if self._state is None:
            self._state = np.zeros((2, len(block), 2))
        weighted, self._state = scipy.signal.sosfilt(self._sections, block.astype(np.float64), zi=self._state)
        self._powers.append(float(np.square(weighted).mean(axis=-1).sum()))
        self._sound = self._sound or _rms(block) >= LOUDNESS_FLOOR

    def gain(self) -> float:
        return _bounded(10 ** (LOUDNESS_TARGET / 20), 10 ** (self.loudness() / 20)) if self._sound else 1.0

    def loudness(self) -> float:
        """In LUFS; minus infinity for silence. A clip shorter than a gating block is measured as one block."""
        kernel = np.full(min(4, len(self._powers)), 1 / min(4, len(self._powers)))
        gating = np.convolve(self._powers, kernel, mode="valid")
        gating = gating[gating >= _power(-70.0)]
        if gating.size == 0:
            return -math.inf
        return -0.691 + 10 * math.log10(float(gating[gating > 0.1 * gating.mean()].mean()))

    def limit(self, wav: Tensor) -> Tensor:
        return torch.tanh(wav).clamp(-1, 1)


_MEASURES: dict[str, type[_Measure]] = {"peak": _Peak, "rms": _Rms, "loudness": _Loudness}


def _bounded(target: float, measured: float) -> float:
    """`target / measured`, at most `MAX_GAIN`; 1 for silence and for what is not a number."""
    return min(target / measured, MAX_GAIN) if measured > 1e-8 else 1.0


def _rms(samples: np.ndarray) -> float:
    return math.sqrt(float(np.square(samples, dtype=np.float64).mean()))


def _power(loudness: float) -> float:
    return float(10 ** ((loudness + 0.691) / 10))
