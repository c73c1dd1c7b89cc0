from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from handler import audio
from handler.errors import RequestError

GOLDENS = Path(__file__).parents[1] / "goldens"
FORMATS = ("wav", "flac", "mp3", "ogg", "pcm")


def tone(seconds: float = 1.0, sample_rate: int = 32_000, channels: int = 1, level: float = 0.3) -> torch.Tensor:
    time = torch.arange(int(seconds * sample_rate)) / sample_rate
    pitches = 220.0 * torch.arange(1, channels + 1)[:, None]
    return level * torch.sin(2 * torch.pi * pitches * time)  # [C, T]


def file_of(wav: torch.Tensor, sample_rate: int, container: str, subtype: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wav.T.numpy(), sample_rate, format=container, subtype=subtype)
    return buffer.getvalue()


def wav_claiming(samples: int, there: bytes = b"", sample_rate: int = 16_000) -> bytes:
    size = samples * 2
    return (
        b"RIFF"
        + struct.pack("<I", (36 + size) & 0xFFFFFFFF)
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, sample_rate, sample_rate * 2, 2, 16)
        + b"data"
        + struct.pack("<I", size & 0xFFFFFFFF)
        + there
    )


def read(data: bytes, max_seconds: float = 10.0) -> tuple[torch.Tensor, int]:
    return audio.read_audio(data, "continuation", max_seconds)


@pytest.mark.parametrize(
    ("container", "subtype", "sample_rate"),
    [
        ("WAV", "PCM_16", 44_100),
        ("WAV", "FLOAT", 32_000),
        ("FLAC", "PCM_24", 48_000),
        ("MP3", "MPEG_LAYER_III", 44_100),
        ("OGG", "OPUS", 48_000),
        ("OGG", "VORBIS", 22_050),
    ],
)
def test_each_upload_format_is_read_with_its_channels_rate_and_length(
    container: str, subtype: str, sample_rate: int
) -> None:
    wav, rate = read(file_of(tone(0.5, sample_rate, channels=2), sample_rate, container, subtype))
    assert wav.dtype == torch.float32
    assert rate == sample_rate
    assert wav.shape == (2, sample_rate // 2)


def test_a_wav_keeps_its_samples() -> None:
    wav = tone(0.25)
    assert torch.equal(read(file_of(wav, 32_000, "WAV", "FLOAT"))[0], wav)


def test_a_wav_from_a_pipe_whose_header_cannot_know_its_length_is_read() -> None:
    wav, _ = read(wav_claiming(0x7FFFFFFF, there=bytes(3200)))
    assert wav.shape == (1, 1600)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "empty"),
        (b"\x00" * 4096, "not a readable"),
        (b"<html>no audio here</html>", "not a readable"),
        (wav_claiming(0), "no samples"),
        (wav_claiming(16_000 * 36_000), "truncated"),
        (wav_claiming(48_000 * 36_000, sample_rate=48_000), "no samples"),
        (wav_claiming(16_000, there=bytes(8_000)), "truncated"),
        (wav_claiming(100, there=bytes(200), sample_rate=44_101), "sample rate"),
        (wav_claiming(100, there=bytes(200), sample_rate=1_000), "sample rate"),
        (file_of(tone(0.1), 32_000, "AIFF", "PCM_16"), "AIFF files are not read"),
        (file_of(tone(11.0), 32_000, "FLAC", "PCM_16"), "at most 10 seconds long, not 11"),
        (file_of(tone(0.1, channels=9), 32_000, "WAV", "PCM_16"), "channels, not 9"),
        (file_of(torch.full((1, 100), torch.nan), 32_000, "WAV", "FLOAT"), "not finite"),
        (file_of(torch.full((1, 100), torch.inf), 32_000, "WAV", "FLOAT"), "not finite"),
        *(
            (file_of(tone(3.0, rate), rate, container, subtype)[: int(cut)], "truncated")
            for container, subtype, rate, cut in [
                ("WAV", "PCM_16", 32_000, 9_999),
                ("FLAC", "PCM_16", 32_000, 20_000),
                ("MP3", "MPEG_LAYER_III", 32_000, 8_000),
                ("OGG", "OPUS", 48_000, 8_000),
            ]
        ),
    ],
)
def test_a_bad_upload_is_refused_with_its_field_and_the_reason(data: bytes, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint) as caught:
        read(data)
    assert caught.value.field == "continuation"


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


@pytest.mark.parametrize("audio_format", FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_the_same_waveform_and_seed_give_the_same_bytes(audio_format: str, channels: int) -> None:
    wav = tone(0.5, channels=channels)
    first, second = (audio.encode(wav, 32_000, audio_format, seed=2**62) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("audio_format", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_encoded_clip_decodes_to_its_length_and_rate(audio_format: str, channels: int) -> None:
    encoded = audio.encode(tone(0.5, channels=channels), 32_000, audio_format, seed=1)
    decoded, rate = soundfile.read(io.BytesIO(encoded.data), always_2d=True)
    assert rate == encoded.sample_rate == (48_000 if audio_format == "ogg" else 32_000)
    assert decoded.shape == (rate // 2, channels)


@pytest.mark.parametrize("sample_rate", [16_000, 32_000, 44_100])
def test_mp3_holds_the_clip_between_the_encoder_s_own_padding(sample_rate: int) -> None:
    encoded = audio.encode(tone(2.0, sample_rate), sample_rate, "mp3", seed=1)
    decoded, rate = soundfile.read(io.BytesIO(encoded.data))
    assert rate == encoded.sample_rate == sample_rate
    assert 2 * rate <= len(decoded) <= 2 * rate + 4 * 1152
    assert np.sqrt((decoded[rate // 2 : rate] ** 2).mean()) == pytest.approx(0.3 / np.sqrt(2), rel=0.1)


def test_pcm_is_interleaved_little_endian() -> None:
    wav = torch.tensor([[0.0, 1.0], [-1.0, 0.5]])
    data = audio.encode(wav, 32_000, "pcm", seed=0).data
    assert np.frombuffer(data, "<i2").tolist() == [0, -32767, 32767, 16384]


def test_samples_outside_the_range_are_cut_and_never_wrap() -> None:
    wav = torch.tensor([[1.5, -1.5, torch.inf, -torch.inf, torch.nan]])
    assert audio.to_int16(wav)[:, 0].tolist() == [32767, -32767, 32767, -32767, 0]


def test_the_ogg_serial_follows_the_seed_and_the_checksums_follow_the_serial() -> None:
    wav = tone(2.5)
    one, two = (audio.encode(wav, 32_000, "ogg", seed=seed).data for seed in (1, 2))
    assert one != two
    assert len(one) == len(two)
    assert audio.set_ogg_serial(one, int.from_bytes(two[14:18], "little")) == two


def test_the_ogg_checksum_is_the_one_libsndfile_writes() -> None:
    data = file_of(tone(2.5, 48_000), 48_000, "OGG", "OPUS")
    assert audio.set_ogg_serial(data, int.from_bytes(data[14:18], "little")) == data
