from __future__ import annotations

from pathlib import Path

import julius
import numpy as np
import pytest
import torch

from handler import audio

GOLDENS = Path(__file__).parents[1] / "goldens"


def tone(seconds: float = 1.0, sample_rate: int = 32_000, channels: int = 1, level: float = 0.3) -> torch.Tensor:
    time = torch.arange(int(seconds * sample_rate)) / sample_rate
    pitches = 220.0 * torch.arange(1, channels + 1)[:, None]
    return level * torch.sin(2 * torch.pi * pitches * time)  # [C, T]


def test_conversion_equals_the_reference() -> None:
    with np.load(GOLDENS / "patterns" / "convert_audio.npz") as golden:
        arrays = {name: torch.from_numpy(golden[name]) for name in golden}
    stereo, mono = arrays["wav44_stereo"], arrays["mono32"]
    for given, wanted, from_rate, to_rate in [
        (stereo, "to32_mono", 44_100, 32_000),
        (stereo, "to32_stereo", 44_100, 32_000),
        (mono, "mono32_to24", 32_000, 24_000),
    ]:
        converted = audio.convert_audio(given, from_rate, to_rate, arrays[wanted].shape[0])
        torch.testing.assert_close(converted, arrays[wanted], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("from_rate", "to_rate"), [(48_000, 32_000), (44_100, 32_000), (8_000, 32_000), (22_050, 24_000)]
)
@pytest.mark.parametrize("seconds", [20.0, 20.01, 33.3])
def test_long_audio_is_converted_in_blocks_that_do_not_show(from_rate: int, to_rate: int, seconds: float) -> None:
    wav = torch.randn(2, int(seconds * from_rate), generator=torch.Generator().manual_seed(1))
    whole = julius.resample_frac(wav, from_rate, to_rate)
    torch.testing.assert_close(audio.convert_audio(wav, from_rate, to_rate, 2), whole, atol=1e-6, rtol=0)
    mono = audio.convert_audio(wav, from_rate, to_rate, 1)
    torch.testing.assert_close(mono, whole.mean(dim=0, keepdim=True), atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [16_777_217, 9_876_543, 20_000_003])
def test_long_audio_has_the_reference_s_length(length: int) -> None:
    wav = torch.zeros(1, length)
    wav[:, ::1000] = 0.5
    whole = julius.resample_frac(wav, 44_100, 32_000)
    torch.testing.assert_close(audio.convert_audio(wav, 44_100, 32_000, 1), whole, atol=1e-6, rtol=0)


def test_channels_follow_the_reference_rules() -> None:
    wav = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(audio.convert_channels(wav, 1), wav.mean(0, keepdim=True))
    assert torch.equal(audio.convert_channels(wav, 2), wav[:2])
    assert torch.equal(audio.convert_channels(wav[:1], 2), wav[:1].repeat(2, 1))
    with pytest.raises(ValueError, match="3 channels has fewer than the 4"):
        audio.convert_channels(wav, 4)


def test_peak_puts_the_largest_sample_at_minus_one_decibel() -> None:
    assert float(audio.normalize(tone(), 32_000, "peak").abs().max()) == pytest.approx(10 ** (-1 / 20))


def test_rms_puts_the_mean_of_the_channels_at_minus_eighteen_decibels() -> None:
    scaled = audio.normalize(tone(channels=2, level=0.01), 32_000, "rms")
    assert float(scaled.mean(0).square().mean().sqrt()) == pytest.approx(10 ** (-18 / 20), rel=1e-4)


def test_clip_cuts_at_minus_one_decibel_and_changes_nothing_below() -> None:
    loud = tone(level=2.0)
    limit = 10 ** (-1 / 20)
    assert torch.equal(audio.normalize(loud, 32_000, "clip"), loud.clamp(-limit, limit))


def test_none_leaves_the_waveform_alone() -> None:
    loud = tone(level=2.0)
    assert torch.equal(audio.normalize(loud, 32_000, "none"), loud)


def test_loudness_is_minus_fourteen_lufs_before_the_soft_clip() -> None:
    wav = tone(seconds=3.0, level=0.05)
    scaled = torch.atanh(audio.normalize(wav, 32_000, "loudness"))
    assert audio.integrated_loudness(scaled, 32_000) == pytest.approx(-14.0, abs=0.01)


def test_a_nearly_silent_signal_is_not_amplified_by_loudness() -> None:
    quiet = tone(level=1e-3)
    assert torch.equal(audio.normalize(quiet, 32_000, "loudness"), quiet)


@pytest.mark.parametrize("samples", [1, 7, 640, 12_800])
def test_clips_shorter_than_a_loudness_block_are_normalized_as_one_block(samples: int) -> None:
    wav = tone(1.0)[:, 16 : 16 + samples] + 0.1
    scaled = audio.normalize(wav, 32_000, "loudness")
    assert scaled.shape == wav.shape
    assert torch.isfinite(scaled).all()


@pytest.mark.parametrize("strategy", audio.NORMALIZATIONS)
@pytest.mark.parametrize("wav", [torch.zeros(2, 32_000), torch.full((1, 32_000), 0.5), torch.tensor([[1.0], [-1.0]])])
def test_silence_a_constant_and_opposed_channels_never_become_nan(strategy: str, wav: torch.Tensor) -> None:
    scaled = audio.normalize(wav, 32_000, strategy)
    assert torch.isfinite(scaled).all()
    assert scaled.abs().max() <= 1
    if not wav.any():
        assert not scaled.any()


def test_samples_outside_the_range_are_cut_and_never_wrap() -> None:
    wav = torch.tensor([[1.5, -1.5, torch.inf, -torch.inf, torch.nan]])
    assert audio.to_int16(wav)[:, 0].tolist() == [32767, -32767, 32767, -32767, 0]
