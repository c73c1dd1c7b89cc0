from __future__ import annotations

import io
import itertools
import math

import julius
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from handler import audio
from handler.decoder import Decoder
from handler.stream_audio import StreamEncoder, StreamLevel
from handler.stream_audio.level import _Loudness
from handler.stream_audio.resampler import StreamResampler
from handler.upload import open_upload

RATE = 32_000
FORMATS = ("wav", "flac", "mp3", "ogg", "pcm")
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


def file_of(
    pushes: list[Tensor], audio_format: str, rate: int = RATE, seed: int = 1, length: int | None = None
) -> bytes:
    encoder = StreamEncoder.create(audio_format, rate, pushes[0].shape[0], seed, length)
    return b"".join(encoder.push(push) for push in pushes) + encoder.finish()


def levelled(pushes: list[Tensor], strategy: str) -> Tensor:
    level = StreamLevel(strategy, RATE)
    return torch.cat([*(level.push(push) for push in pushes), level.finish()], dim=-1)


def decoded(data: bytes, dtype: str = "int16") -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(data), dtype=dtype, always_2d=True)


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel().astype(float), other.ravel().astype(float))[0, 1])


# --- files


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("audio_format", FORMATS)
@few
@given(fractions=cuts)
def test_a_streamed_file_does_not_depend_on_how_its_audio_was_cut(
    audio_format: str, channels: int, fractions: list[float]
) -> None:
    wav = music(1.37, channels)
    assert file_of(pieces(wav, fractions), audio_format) == file_of([wav], audio_format)


@pytest.mark.parametrize("audio_format", FORMATS)
def test_pushes_of_a_few_samples_make_the_same_file(audio_format: str) -> None:
    wav = music(0.31)
    assert file_of(every(wav, 3), audio_format) == file_of([wav], audio_format)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_streamed_wav_opens_at_its_true_length_with_every_sample(channels: int) -> None:
    wav = music(0.777, channels)
    samples, rate = decoded(file_of(every(wav, 5000), "wav"))
    assert rate == RATE
    assert np.array_equal(samples, audio.to_int16(wav))


def test_a_streamed_wav_can_be_sent_back_as_a_continuation() -> None:
    wav = music(0.5)
    upload = open_upload(file_of(every(wav, 5000), "wav"), "continuation", 10**6, 0.02, max_seconds=10)
    read = upload.read(Decoder()).wav()
    assert read.shape == wav.shape
    assert torch.allclose(read, wav, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_streamed_flac_of_known_length_opens_with_every_sample(channels: int) -> None:
    wav = music(0.777, channels)
    data = file_of(every(wav, 5000), "flac", length=wav.shape[-1])
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        assert file.frames == wav.shape[-1]
    samples, rate = decoded(data)
    assert rate == RATE
    assert np.array_equal(samples, audio.to_int16(wav))


def test_a_streamed_flac_says_only_what_was_known_when_it_began() -> None:
    wav = music(0.5, channels=2)
    data = file_of(every(wav, 5000), "flac")
    header = data[8:42]  # STREAMINFO
    assert header[4:10] == bytes(6)  # sizes of the frames: unknown
    assert int.from_bytes(header[10:18], "big") & (2**36 - 1) == 0  # samples: unknown
    assert header[18:] == bytes(16)  # checksum: not computed
    known = file_of(every(wav, 5000), "flac", length=wav.shape[-1])
    assert [i for i, (a, b) in enumerate(zip(data, known, strict=True)) if a != b] == [24, 25]


@pytest.mark.parametrize("channels", [1, 2])
def test_a_streamed_pcm_is_what_is_sent_whole(channels: int) -> None:
    wav = music(1.0, channels)
    assert file_of(every(wav, 7001), "pcm") == audio.encode(wav, RATE, "pcm", seed=1).data


@pytest.mark.parametrize("rate", [16_000, RATE])
def test_a_streamed_mp3_has_the_bit_rate_of_one_sent_whole(rate: int) -> None:
    wav = music(4.0)
    streamed, whole = file_of(every(wav, 7001), "mp3", rate), audio.encode(wav, rate, "mp3", seed=1).data
    assert len(streamed) == pytest.approx(len(whole), rel=0.05)


def test_a_streamed_mp3_has_no_gaps() -> None:
    wav = music(1.5)
    samples, _ = decoded(file_of(every(wav, 3000), "mp3"))
    delay = 1105  # of lame and its decoder
    assert 0 <= len(samples) - wav.shape[-1] - delay < 2 * 1152
    assert likeness(samples[delay : delay + wav.shape[-1]], audio.to_int16(wav)) > 0.99


@pytest.mark.parametrize("channels", [1, 2])
def test_a_streamed_ogg_is_opus_at_48_khz_of_exactly_the_clips_length(channels: int) -> None:
    wav = music(1.5, channels)
    data = file_of(every(wav, 3000), "ogg")
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        assert (file.samplerate, file.subtype) == (48_000, "OPUS")
    samples, _ = decoded(data)
    whole = audio.to_int16(julius.resample_frac(wav, RATE, 48_000))
    assert samples.shape == whole.shape
    assert likeness(samples, whole) > 0.99
    assert likeness(samples, decoded(audio.encode(wav, RATE, "ogg", seed=1).data)[0]) > 0.9999


def test_a_streamed_ogg_is_the_same_for_a_seed_and_has_another_serial_for_another() -> None:
    wav = music(0.5)
    first, again, other = (file_of([wav], "ogg", seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first[14:18] != other[14:18]
    assert first[14:18] == audio.encode(wav, RATE, "ogg", seed=1).data[14:18]


@pytest.mark.parametrize("audio_format", FORMATS)
def test_sound_leaves_long_before_the_clip_ends(audio_format: str) -> None:
    encoder = StreamEncoder.create(audio_format, RATE, 1, seed=1)
    wav = music(0.5)
    first = encoder.push(wav)
    assert len(first) > 1000
    assert len(encoder.push(wav)) > 1000
    if audio_format != "flac":  # libsndfile does not read a flac of unknown length
        header = b"" if audio_format != "pcm" else file_of([wav[:, :0]], "wav")
        assert len(decoded(header + first)[0]) >= 0.2 * RATE


@pytest.mark.parametrize("audio_format", FORMATS)
def test_samples_out_of_range_are_cut_and_never_wrap(audio_format: str) -> None:
    wav = 2.0 * torch.sin(2 * torch.pi * 50 * torch.arange(RATE) / RATE)[None]
    data = file_of(every(wav, 5000), audio_format, length=RATE)
    if audio_format == "pcm":
        data = file_of([torch.zeros(1, 0)], "wav") + data
    samples, _ = decoded(data, "float32")  # as integers libsndfile wraps what opus itself overshoots
    # a wrapped sample would stand at the other end of the range, far from its neighbours
    assert np.abs(np.diff(samples, axis=0)).max() < 0.5
    assert samples.max() > 0.95


@pytest.mark.parametrize("audio_format", FORMATS)
def test_a_stream_without_samples_ends_without_an_error(audio_format: str) -> None:
    encoder = StreamEncoder.create(audio_format, RATE, 2, seed=1)
    assert encoder.push(torch.zeros(2, 0)) == b""
    data = encoder.finish()
    assert data == b"" or data.startswith((b"RIFF", b"OggS", b"\xff"))


@pytest.mark.parametrize("samples", [1, 2, 53, 3199, 3201])
@pytest.mark.parametrize("audio_format", ["wav", "flac", "ogg"])
def test_the_shortest_clips_keep_their_length(audio_format: str, samples: int) -> None:
    wav = music(0.2)[:, :samples]
    data, rate = decoded(file_of([wav], audio_format, length=samples))
    assert len(data) == samples * rate // RATE


def test_media_type_and_sample_rate_are_told_before_anything_is_sent() -> None:
    for audio_format in FORMATS:
        whole = audio.encode(music(0.1), RATE, audio_format, seed=1)
        encoder = StreamEncoder.create(audio_format, RATE, 1, seed=1)
        assert (encoder.content_type, encoder.sample_rate) == (whole.content_type, whole.sample_rate)


def test_wrong_uses_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="no encoder for 'aiff'"):
        StreamEncoder.create("aiff", RATE, 1, seed=1)
    with pytest.raises(ValueError, match="2 channels cannot take audio with 1"):
        StreamEncoder.create("wav", RATE, 2, seed=1).push(music(0.1))


@pytest.mark.parametrize("rate", [16_000, 24_000, 32_000, 44_100])
def test_resampling_a_stream_equals_resampling_the_whole(rate: int) -> None:
    wav = torch.randn(2, 40_001, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    whole = julius.resample_frac(wav, rate, 48_000)
    resampler = StreamResampler(rate, 48_000)
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
