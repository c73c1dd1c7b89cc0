from __future__ import annotations

import itertools
import math

import julius
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from handler import audio
from handler.stream_audio import StreamLevel, StreamResampler
from handler.stream_audio.level import _Loudness

RATE = 32_000
STRATEGIES = ("loudness", "peak", "rms", "clip", "none")
MEASURED = ("loudness", "peak", "rms")

# where a clip is cut into pushes: as fractions of its length, so that empty and one-sample pushes occur too
cuts = st.lists(st.floats(0, 1), max_size=12)
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def music(seconds: float, channels: int = 1, level: float = 0.3, seed: int = 0) -> Tensor:
    """A chord over soft noise with a beat, `[C, T]`."""
    time = torch.arange(int(seconds * RATE)) / RATE
    noise = torch.randn(channels, len(time), generator=torch.Generator().manual_seed(seed))
    chord = torch.stack(
        [
            sum((torch.sin(2 * torch.pi * f * (c + 1) * time) for f in (220, 277, 330)), time * 0)
            for c in range(channels)
        ]
    )
    beat = 0.6 + 0.4 * torch.cos(2 * torch.pi * 2 * time)
    return level * beat * (chord / 3 + 0.05 * noise)


def pieces(wav: Tensor, fractions: list[float]) -> list[Tensor]:
    borders = [0, *sorted(int(f * wav.shape[-1]) for f in fractions), wav.shape[-1]]
    return [wav[:, first:last] for first, last in itertools.pairwise(borders)]


def every(wav: Tensor, samples: int) -> list[Tensor]:
    return list(wav.split(samples, dim=-1))


def levelled(pushes: list[Tensor], strategy: str) -> Tensor:
    level = StreamLevel(strategy, RATE)
    return torch.cat([*(level.push(push) for push in pushes), level.finish()], dim=-1)


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel().astype(float), other.ravel().astype(float))[0, 1])


# --- rates


@pytest.mark.parametrize(
    ("rate", "to_rate"),
    [(16_000, 48_000), (32_000, 48_000), (44_100, 48_000), (32_000, 22_050), (32_000, 8_000), (24_000, 44_100)],
)
def test_resampling_a_stream_equals_resampling_the_whole(rate: int, to_rate: int) -> None:
    wav = torch.randn(2, 40_001, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    whole = julius.resample_frac(wav, rate, to_rate)
    resampler = StreamResampler(rate, to_rate)
    stream = torch.cat([*(resampler.push(piece) for piece in every(wav, 1234)), resampler.finish()], dim=-1)
    assert stream.shape == whole.shape
    assert torch.allclose(stream, whole, atol=1e-5, rtol=0)


# --- levels


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
@few
@given(fractions=cuts)
def test_a_streams_level_does_not_depend_on_how_it_was_cut(
    strategy: str, channels: int, fractions: list[float]
) -> None:
    wav = music(1.37, channels)
    whole = levelled([wav], strategy)
    assert whole.shape == wav.shape
    assert torch.equal(levelled(pieces(wav, fractions), strategy), whole)


@pytest.mark.parametrize("strategy", ["clip", "none"])
def test_clip_and_none_are_those_of_a_whole_clip(strategy: str) -> None:
    wav = music(0.5, level=2.0)
    assert torch.equal(levelled(every(wav, 999), strategy), audio.normalize(wav, RATE, strategy))


@pytest.mark.parametrize("strategy", MEASURED)
@pytest.mark.parametrize("level", [0.1, 0.3, 0.9])
def test_a_clip_of_steady_level_ends_at_the_level_of_the_whole_clips_strategy(strategy: str, level: float) -> None:
    wav = music(4.0, channels=2, level=level)
    stream, whole = levelled([wav], strategy), audio.normalize(wav, RATE, strategy)
    assert likeness(stream.numpy(), whole.numpy()) > 0.99
    second = slice(-RATE, None)
    decibels = 20 * math.log10(float(stream[:, second].std() / whole[:, second].std()))
    assert abs(decibels) < 0.5
    start = slice(0, RATE // 2)
    assert abs(20 * math.log10(float(stream[:, start].std() / whole[:, start].std()))) < 3


@pytest.mark.parametrize("channels", [1, 2])
def test_the_loudness_of_all_that_was_heard_is_the_integrated_loudness(channels: int) -> None:
    wav = torch.cat(
        [music(1.5, channels, 0.02), torch.zeros(channels, RATE), music(2.0, channels, 0.6, seed=1)], dim=-1
    )
    heard = _Loudness(RATE)
    for block in every(wav, RATE // 10):
        heard.add(block.numpy())
    assert heard.loudness() == pytest.approx(audio.integrated_loudness(wav, RATE), abs=0.01)


def test_a_clip_shorter_than_a_gating_block_gets_its_loudness_too() -> None:
    wav = music(0.25, level=0.2)
    assert audio.integrated_loudness(levelled([wav], "loudness"), RATE) == pytest.approx(-14, abs=1.5)


@given(levels=st.lists(st.floats(0, 4), min_size=1, max_size=8), seed=st.integers(0, 99))
@few
def test_a_peak_is_never_above_minus_one_decibel(levels: list[float], seed: int) -> None:
    wav = torch.cat([music(0.17, level=level, seed=seed) for level in levels], dim=-1)
    assert float(levelled([wav], "peak").abs().max()) <= audio.PEAK_HEADROOM


@pytest.mark.parametrize("strategy", ["loudness", "rms"])
def test_no_sample_leaves_the_range(strategy: str) -> None:
    wav = torch.cat([music(1.0, level=0.01), music(1.0, level=20.0)], dim=-1)
    assert float(levelled([wav], strategy).abs().max()) <= 1


@pytest.mark.parametrize("strategy", MEASURED)
def test_a_change_of_level_makes_no_click(strategy: str) -> None:
    time = torch.arange(RATE) / RATE
    quiet, loud = 0.02 * torch.sin(2 * torch.pi * 100 * time), 0.2 * torch.sin(2 * torch.pi * 100 * time)
    wav = torch.cat([quiet, loud, quiet])[None]
    stream = levelled(every(wav, 1000), strategy)
    # a steady gain makes steps of the tone's own slope; a click would be a larger one
    slope = 2 * math.pi * 100 / RATE
    assert float(stream.diff().abs().max()) < 1.2 * slope


@pytest.mark.parametrize("strategy", MEASURED)
def test_a_loud_passage_is_turned_down_before_it_begins(strategy: str) -> None:
    wav = torch.cat([music(2.0, level=0.05), music(1.0, level=0.9)], dim=-1)
    stream = levelled([wav], strategy)
    gain = (stream[:, RATE:] / wav[:, RATE:]).median(dim=-1).values
    attack = (
        stream[:, 2 * RATE : 2 * RATE + RATE // 20].abs().max() / wav[:, 2 * RATE : 2 * RATE + RATE // 20].abs().max()
    )
    assert attack < gain


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_silence_stays_silence(strategy: str) -> None:
    stream = levelled([torch.zeros(2, 20_000), torch.zeros(2, 0)], strategy)
    assert torch.equal(stream, torch.zeros(2, 20_000))


@pytest.mark.parametrize("strategy", MEASURED)
def test_noise_before_the_music_is_amplified_by_no_more_than_20_decibels(strategy: str) -> None:
    noise = 1e-3 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0))
    stream = levelled([torch.cat([noise, music(1.0)], dim=-1)], strategy)
    assert float(stream[:, : RATE // 2].std()) <= 10.01 * float(noise[:, : RATE // 2].std())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_level_without_samples_ends_without_an_error(strategy: str) -> None:
    assert StreamLevel(strategy, RATE).finish().numel() == 0


@pytest.mark.parametrize("strategy", MEASURED)
def test_sound_leaves_after_four_tenths_of_a_second(strategy: str) -> None:
    level = StreamLevel(strategy, RATE)
    assert level.push(music(0.39)).shape == (1, 0)
    assert level.push(music(0.5)).shape == (1, RATE // 2)
