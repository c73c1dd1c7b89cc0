"""Melody: which of the twelve pitch classes sounds when (MusicGen paper, section 2.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handler.checkpoint import Config
from handler.conditioners.base import WavConditioner, WavInput
from handler.conditioners.fuser import Condition
from handler.conditioners.htdemucs import MelodySeparator, load_htdemucs
from handler.errors import CheckpointError

# Keys of chroma_stem that only matter to training and its evaluation. `match_len_on_eval` is one of them: audiocraft
# sets it to true whenever it loads a model to generate.
_WITHOUT_EFFECT = frozenset({"match_len_on_eval", "eval_wavs", "n_eval_wavs", "cache_path"})


class ChromaStemConditioner(WavConditioner):
    """The chroma of the melody's stems, frame by frame, projected (`conditioners.*.chroma_stem`).

    As audiocraft configures it to generate: every condition has the length of the training segment's chroma, a longer
    one is cut, a shorter one repeated, and nothing is masked. An absent melody is the chroma of silence, which is not
    zero: the first pitch class stands in every frame, and the projection has a bias.

    Args:
        separator: leaves the melody's stems of a mix. Like T5 it is not among this module's parameters, and always
            computes in float32.
        chroma: the chroma of audio.
        duration: seconds of the training segment (`dataset.segment_duration`).
        output_dim: the language model's dimension.
    """

    def __init__(self, separator: MelodySeparator, chroma: Chroma, duration: float, output_dim: int) -> None:
        super().__init__(chroma.num_bins, output_dim)
        self.separator = separator
        self.chroma = chroma
        self.length = self.max_length = chroma.num_frames(int(chroma.sample_rate * duration))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ChromaStemConditioner:
        """Takes the separator along wherever the module goes (`to`, `cuda`, …)."""
        self.separator.model._apply(fn)
        super()._apply(fn, recurse)
        return self

    def forward(self, wav: WavInput | None) -> Condition:
        if wav is None:
            return self.null(self.length)
        samples = wav.wav.to(self.output_proj.weight.device)
        # One sample is what audiocraft takes for an absent melody.
        if len(samples) > 1:
            samples = self.separator(samples, wav.sample_rate)
        return Condition(self._embed(samples))

    def null(self, length: int) -> Condition:
        """The condition of silence, of its own length whatever stands beside it."""
        return Condition(self._embed(self.output_proj.weight.new_zeros(1)), is_null=True)

    def _embed(self, samples: Tensor) -> Tensor:
        chroma = self.chroma(samples)  # [frames, bins]
        chroma = chroma.repeat(math.ceil(self.length / len(chroma)), 1)[: self.length]  # [length, bins]
        return self.output_proj(chroma)[None].float().cpu()


class Chroma(nn.Module):
    """The energy of each pitch class over time, relative to the strongest.

    Args:
        sample_rate: of the audio, in Hz.
        num_bins: pitch classes of an octave (`n_chroma`).
        window_size: samples of the Hann window and of the Fourier transform (2 to the `radix2_exp`); a frame begins
            every quarter of it.
        argmax: whether only the strongest pitch class of a frame is kept, as 1.
    """

    filters: Tensor

    def __init__(self, sample_rate: int, num_bins: int, window_size: int, argmax: bool) -> None:
        super().__init__()
        self.sample_rate, self.num_bins, self.argmax = sample_rate, num_bins, argmax
        self.spec = Spectrogram(window_size)
        filters = torch.from_numpy(chroma_filters(sample_rate, window_size, num_bins))  # [bins, frequencies]
        self.register_buffer("filters", filters, persistent=False)

    def num_frames(self, samples: int) -> int:
        """The frames of so many samples."""
        return 1 + max(samples, self.spec.size) // self.spec.hop

    def forward(self, wav: Tensor) -> Tensor:
        """Mono audio `[T]` at `sample_rate` -> chroma `[frames, bins]`, 0 to 1; of silence the first bin is taken."""
        missing = max(0, self.spec.size - len(wav))
        wav = F.pad(wav, (missing // 2, missing - missing // 2))
        chroma = (self.filters @ self.spec(wav)).mT  # [frames, bins]
        chroma = F.normalize(chroma, p=math.inf, dim=-1, eps=1e-6)
        if self.argmax:
            return F.one_hot(chroma.argmax(dim=-1), self.num_bins).to(chroma)
        return chroma


class Spectrogram(nn.Module):
    """The power of each frequency over time. The window is in the checkpoint, rounded as all of it is.

    Args:
        size: samples of the window.
    """

    window: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.hop = size, size // 4
        self.register_buffer("window", torch.hann_window(size))

    def forward(self, wav: Tensor) -> Tensor:
        """Audio `[T]`, of at least `size` samples -> `[size / 2 + 1, frames]`; frames are centred, edges reflected."""
        spectrum = torch.stft(
            wav, self.size, self.hop, window=self.window, center=True, pad_mode="reflect", return_complex=True
        )
        return (spectrum / self.window.square().sum().sqrt()).abs().square()


def chroma_filters(sample_rate: int, window_size: int, num_bins: int) -> np.ndarray:
    """How much each frequency of a Fourier transform counts for each pitch class, from C on.

    A frequency's share is a Gaussian of its distance to the pitch class, as wide as the frequencies are apart but at
    least a bin; the shares of a frequency have unit norm, and count most five octaves above A0 (27.5 Hz), by another
    Gaussian of two octaves (Ellis 2007). The numbers are those of `librosa.filters.chroma` with `tuning=0`.

    Returns:
        float32 `[num_bins, window_size / 2 + 1]`.
    """
    frequencies = np.arange(1, window_size // 2 + 2) * sample_rate / window_size  # Hz
    pitch = num_bins * np.log2(frequencies / 27.5)  # in bins above A0
    pitch = np.concatenate([pitch[:1] - 1.5 * num_bins, pitch])  # 0 Hz has no pitch: it is put below all others
    width = np.maximum(np.diff(pitch), 1.0)
    pitch = pitch[:-1]
    pitch_class = np.arange(num_bins)[:, None] + 3 * (num_bins // 12)  # C is three semitones above A
    half = round(num_bins / 2)
    distance = (pitch - pitch_class + half) % num_bins - half  # [bins, frequencies], round the octave
    shares = np.exp(-0.5 * (2 * distance / width) ** 2)
    shares /= np.linalg.norm(shares, axis=0)
    return (shares * np.exp(-0.5 * ((pitch / num_bins - 5) / 2) ** 2)).astype(np.float32)


def build_chroma(
    config: Config, section: Config, state: Mapping[str, Tensor], find_auxiliary: Callable[[str], Path]
) -> ChromaStemConditioner:
    """The conditioner of a `chroma_stem`.

    Args:
        config: the whole `xp.cfg`.
        section: its `chroma_stem`.
        state: parameters of this conditioner; none is needed to build it.
        find_auxiliary: finds `htdemucs`.

    Raises:
        CheckpointError: for a key that cannot be honoured, or when htdemucs cannot be used.
    """
    argmax = section.get("argmax", False)
    if not isinstance(argmax, bool):
        raise CheckpointError(f"{section.source}: {section.key('argmax')} must be true or false, not {argmax!r}.")
    duration = config.section("dataset").get("segment_duration", 30.0)
    if not isinstance(duration, int | float) or not 0 < duration <= 3600:
        raise CheckpointError(
            f"{config.source}: dataset.segment_duration of its xp.cfg must be 0 to 3600 seconds, not {duration!r}."
        )
    chroma = Chroma(
        _integer(section, "sample_rate", 1, 192_000),
        _integer(section, "n_chroma", 1, 96),
        2 ** _integer(section, "radix2_exp", 2, 20),
        argmax,
    )
    honoured = {"sample_rate", "n_chroma", "radix2_exp", "argmax"} | _WITHOUT_EFFECT
    strange = sorted(name for name in section if name not in honoured and section[name] is not None)
    if strange:
        raise CheckpointError(f"{section.source}: {section.key(strange[0])} of its xp.cfg cannot be honoured.")
    separator = MelodySeparator(load_htdemucs(find_auxiliary("htdemucs")))
    return ChromaStemConditioner(separator, chroma, duration, _integer(config.section("transformer_lm"), "dim", 1))


def _integer(section: Config, name: str, low: int, high: int | None = None) -> int:
    value = section.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        bounds = f"{low} or more" if high is None else f"{low} to {high}"
        raise CheckpointError(
            f"{section.source}: {section.key(name)} of its xp.cfg must be a whole number, {bounds}, not {value!r}."
        )
    return value
