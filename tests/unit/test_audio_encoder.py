"""Audio files, whole and streamed, judged by two decoders: FFmpeg's and libsndfile's."""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import subprocess
import sys

import av
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from handler.audio import to_int16
from handler.audio_encoder import CONTENT_TYPES, StreamEncoder, encode

RATE = 32_000
RATES = (8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
FORMATS = tuple(CONTENT_TYPES)
FILES = tuple(name for name in FORMATS if name != "pcm")
LOSSLESS = ("wav", "flac")
EXACT = ("wav", "flac", "ogg", "opus")
"""Formats whose files decode to the clip's length, streamed too."""

MP3_DELAY, AAC_DELAY = 1105, 1024
SEED = 7

# where a clip is cut into pushes: as fractions of its length, so that empty and one-sample pushes occur too
cuts = st.lists(st.floats(0, 1), max_size=12)
channel_counts = st.sampled_from([1, 2])
some = settings(max_examples=15, deadline=None)


def music(samples: int, channels: int = 1, rate: int = RATE) -> Tensor:
    """A chord with a beat and soft noise, another in each channel, `[C, T]`."""
    time = torch.arange(samples) / rate
    noise = torch.randn(channels, samples, generator=torch.Generator().manual_seed(0))
    pitches = torch.tensor([[220.0, 277.0, 330.0], [440.0, 554.0, 660.0]])[:channels, :, None]  # [C, 3, 1]
    chord = torch.sin(2 * torch.pi * pitches * time).mean(dim=1)  # [C, T]
    return 0.3 * (0.6 + 0.4 * torch.cos(4 * torch.pi * time)) * (chord + 0.01 * noise)


def pieces(wav: Tensor, fractions: list[float]) -> list[Tensor]:
    borders = [0, *sorted(int(f * wav.shape[-1]) for f in fractions), wav.shape[-1]]
    return [wav[:, first:last] for first, last in itertools.pairwise(borders)]


def every(wav: Tensor, samples: int) -> list[Tensor]:
    return list(wav.split(samples, dim=-1))


def streamed(pushes: list[Tensor], audio_format: str, rate: int = RATE, to_rate: int | None = None) -> bytes:
    length = sum(push.shape[-1] for push in pushes)
    encoder = StreamEncoder(audio_format, rate, pushes[0].shape[0], length, SEED, to_rate)
    return b"".join(encoder.push(push) for push in pushes) + encoder.finish()


def frames_of(data: bytes) -> tuple[list[av.AudioFrame], int]:
    # FFmpeg takes an mp3 of 0.02 s at 44.1 kHz for another format; a player goes by the content type.
    is_mp3 = data[0] == 0xFF and data[1] & 0xE6 == 0xE2
    with av.open(io.BytesIO(data), "r", format="mp3" if is_mp3 else None) as file:
        [stream] = file.streams.audio
        return list(file.decode(stream)), stream.rate


def by_ffmpeg(data: bytes) -> tuple[np.ndarray, int]:
    """Float samples `[T, C]` and their rate."""
    frames, rate = frames_of(data)
    resampler = av.AudioResampler(format="fltp")
    parts = [part.to_ndarray() for frame in frames for part in resampler.resample(frame)]
    return np.concatenate(parts, axis=1).T, rate


def by_libsndfile(data: bytes) -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel().astype(float), other.ravel().astype(float))[0, 1])


# --- the bytes


@pytest.mark.parametrize("audio_format", FORMATS)
@some
@given(
    channels=channel_counts,
    rate=st.sampled_from([16_000, 24_000, 32_000, 44_100]),
    to_rate=st.sampled_from([None, *RATES]),
    samples=st.integers(1, 20_000),
    fractions=cuts,
)
def test_a_file_does_not_depend_on_how_its_audio_was_cut(
    audio_format: str, channels: int, rate: int, to_rate: int | None, samples: int, fractions: list[float]
) -> None:
    wav = music(samples, channels, rate)
    assert streamed(pieces(wav, fractions), audio_format, rate, to_rate) == streamed([wav], audio_format, rate, to_rate)


@pytest.mark.parametrize("audio_format", FORMATS)
def test_pushes_of_a_few_samples_make_the_same_file(audio_format: str) -> None:
    wav = music(3_000)
    assert streamed(every(wav, 3), audio_format) == streamed([wav], audio_format)


@pytest.mark.parametrize("audio_format", ["wav", "pcm", "ogg", "opus", "aac"])
@pytest.mark.parametrize("to_rate", [None, 22_050])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_streamed_file_is_the_whole_one(audio_format: str, to_rate: int | None, channels: int) -> None:
    wav = music(50_000, channels)
    assert (
        streamed(every(wav, 7_001), audio_format, to_rate=to_rate)
        == encode(wav, RATE, audio_format, SEED, to_rate).data
    )


def test_a_streamed_mp3_is_the_whole_one_without_its_first_frame() -> None:
    wav = music(50_000)
    whole, stream = encode(wav, RATE, "mp3", SEED).data, streamed(every(wav, 7_001), "mp3")
    assert b"Info" in whole[:100]
    assert whole.endswith(stream)
    assert len(whole) - len(stream) < 1000


def test_a_streamed_flac_differs_from_the_whole_one_by_what_its_header_cannot_know() -> None:
    wav = music(50_000, 2)
    whole, stream = encode(wav, RATE, "flac", SEED).data, streamed(every(wav, 7_001), "flac")
    assert stream[26:42] == bytes(16)  # checksum: not computed
    sizes, checksum = slice(12, 18), slice(26, 42)  # in the file; sizes of the smallest and the largest frame
    assert stream[:12] + whole[sizes] + stream[18:26] + whole[checksum] + stream[42:] == whole


def test_another_process_writes_the_same_bytes() -> None:
    program = (
        "import hashlib\nfrom tests.unit.test_audio_encoder import *\n"
        "print(*(hashlib.sha256(encode(music(9_000, 2), RATE, name, SEED).data).hexdigest() for name in FORMATS))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    here = [hashlib.sha256(encode(music(9_000, 2), RATE, name, SEED).data).hexdigest() for name in FORMATS]
    assert run.stdout.split() == here


def test_a_wav_is_44_bytes_of_header_and_the_samples_as_libsndfile_writes_it() -> None:
    wav = music(1_234, 2)
    buffer = io.BytesIO()
    soundfile.write(buffer, to_int16(wav), RATE, format="WAV", subtype="PCM_16")
    assert encode(wav, RATE, "wav", SEED).data == streamed(every(wav, 100), "wav") == buffer.getvalue()


def test_pcm_is_interleaved_little_endian() -> None:
    data = encode(torch.tensor([[0.0, 1.0], [-1.0, 0.5]]), RATE, "pcm", SEED).data
    assert np.frombuffer(data, "<i2").tolist() == [0, -32767, 32767, 16384]


def test_ogg_files_of_different_seeds_can_be_joined() -> None:
    wav = music(16_000)
    one, two = (encode(wav, RATE, "ogg", seed).data for seed in (2**63 - 1, 2**63 - 2))
    assert one[14:18] != two[14:18]
    assert sum(frame.samples for frame in frames_of(one + two)[0]) == 2 * 24_000


# --- the audio


@pytest.mark.parametrize("audio_format", FILES)
@some
@given(
    channels=channel_counts,
    rate=st.sampled_from([16_000, 24_000, 32_000, 44_100]),
    to_rate=st.sampled_from([None, *RATES]),
    seconds=st.sampled_from([0.02]) | st.floats(0.02, 1.5),
    stream=st.booleans(),
)
def test_a_file_decodes_to_its_clip(
    audio_format: str, channels: int, rate: int, to_rate: int | None, seconds: float, stream: bool
) -> None:
    samples = int(seconds * rate)
    wav = music(samples, channels, rate)
    encoded = encode(wav, rate, audio_format, SEED, to_rate)
    data = streamed(every(wav, 5_000), audio_format, rate, to_rate) if stream else encoded.data
    wanted = to_rate or rate
    opus = audio_format in ("ogg", "opus")
    assert encoded.sample_rate == (48_000 if opus and wanted in (22_050, 32_000, 44_100) else wanted)

    clip = encode(wav, rate, "pcm", SEED, encoded.sample_rate).data  # the samples that the file was made from
    expected = np.frombuffer(clip, "<i2").reshape(-1, channels) / np.float32(32768)
    assert len(expected) == samples * encoded.sample_rate // rate

    for decode in (by_ffmpeg, by_libsndfile):
        if audio_format == "aac" and decode is by_libsndfile:
            continue  # which it cannot read
        decoded, decoded_rate = decode(data)
        if opus and decode is by_ffmpeg:  # it decodes Opus at 48 kHz, whatever was encoded
            assert (decoded_rate, len(decoded)) == (48_000, len(expected) * 48_000 // encoded.sample_rate)
            decoded = decoded[:: 48_000 // encoded.sample_rate]
        else:
            assert decoded_rate == encoded.sample_rate
        assert decoded.shape[1] == channels
        delay = {"aac": AAC_DELAY, "mp3": MP3_DELAY if stream else 0}.get(audio_format, 0)
        if audio_format in EXACT or (audio_format == "mp3" and not stream):
            assert len(decoded) == len(expected)
        else:
            most = 2 * 1152 if len(expected) > 2048 or audio_format == "mp3" else 2048 + 1024
            assert 0 <= len(decoded) - len(expected) - delay <= most
        decoded = decoded[delay : delay + len(expected)]
        if audio_format in LOSSLESS:
            assert np.array_equal(decoded, expected)
        elif len(expected) >= 4_000:
            assert likeness(decoded, expected) > 0.98


@pytest.mark.parametrize("audio_format", EXACT)
@pytest.mark.parametrize("samples", [1, 2, 53, 3_199, 3_201])
def test_the_shortest_clips_keep_their_length(audio_format: str, samples: int) -> None:
    for data in (encode(music(samples), RATE, audio_format, SEED).data, streamed([music(samples)], audio_format)):
        decoded, rate = by_libsndfile(data)
        assert len(decoded) == samples * rate // RATE


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_an_mp3_keeps_its_length_wherever_its_last_frame_ends(rate: int) -> None:
    for samples in range(1152, 2304, 23):
        data = encode(music(samples, rate=rate), rate, "mp3", SEED).data
        assert {len(by_ffmpeg(data)[0]), len(by_libsndfile(data)[0])} == {samples}


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("audio_format", FILES)
def test_each_channel_sounds_like_itself(audio_format: str, channels: int) -> None:
    wav = music(64_000, channels)
    encoded = encode(wav, RATE, audio_format, SEED)
    decoded = by_ffmpeg(encoded.data)[0][AAC_DELAY if audio_format == "aac" else 0 :]
    clip = encode(wav, RATE, "pcm", SEED, encoded.sample_rate).data
    expected = np.frombuffer(clip, "<i2").reshape(-1, channels) / 32768
    for channel in range(channels):
        ours, theirs = decoded[3_200:60_000, channel], expected[3_200:60_000, channel]
        assert likeness(ours, theirs) > 0.99
        assert ours.std() == pytest.approx(theirs.std(), rel=0.04)  # lame turns 192 kbit/s down by 3 %


@pytest.mark.parametrize("to_rate", RATES)
def test_what_a_lower_rate_cannot_hold_is_filtered_out_and_the_rest_is_kept(to_rate: int) -> None:
    time = torch.arange(RATE) / RATE
    low, high = torch.sin(2 * torch.pi * 1_000 * time), torch.sin(2 * torch.pi * 14_000 * time)
    data = encode(0.4 * (low + high)[None], RATE, "wav", SEED, to_rate).data
    samples = by_libsndfile(data)[0][to_rate // 10 : -to_rate // 10, 0]
    amplitudes = 2 * np.abs(np.fft.rfft(samples * np.hanning(len(samples)))) / (len(samples) / 2)
    frequencies = np.fft.rfftfreq(len(samples), 1 / to_rate)
    assert amplitudes[np.abs(frequencies - 1_000) < 20].max() == pytest.approx(0.4, rel=0.02)
    others = amplitudes[(np.abs(frequencies - 1_000) > 50) & (np.abs(frequencies - 14_000) > 50)]
    assert others.max() < 1e-3  # no images or aliases above -60 dB
    kept = to_rate / 2 > 14_000
    assert (amplitudes[np.abs(frequencies - 14_000) < 20].max(initial=0) > 0.39) == kept


@pytest.mark.parametrize("audio_format", FORMATS)
def test_samples_out_of_range_are_cut_and_never_wrap(audio_format: str) -> None:
    wav = 2.0 * torch.sin(2 * torch.pi * 50 * torch.arange(RATE) / RATE)[None]
    data = streamed(every(wav, 5_000), "wav" if audio_format == "pcm" else audio_format)
    samples, rate = by_ffmpeg(data)
    # a wrapped sample would stand at the other end of the range, far from its neighbours
    assert np.abs(np.diff(samples, axis=0)).max() < 0.5
    assert samples[: rate // 2].max() > 0.95


# --- streams


@pytest.mark.parametrize("audio_format", FORMATS)
def test_sound_leaves_as_soon_as_it_is_made(audio_format: str) -> None:
    wav = music(RATE)
    encoder = StreamEncoder(audio_format, RATE, 1, 10 * RATE, SEED)
    first = encoder.push(wav[:, : RATE // 2])
    assert len(encoder.push(wav[:, RATE // 2 :])) > 1000
    if audio_format == "pcm":
        assert len(first) == RATE
        return
    frames, rate = frames_of(first)
    assert sum(frame.samples for frame in frames) >= 0.25 * rate


@pytest.mark.parametrize("audio_format", LOSSLESS)
@pytest.mark.parametrize("to_rate", [None, 48_000, 22_050])
def test_the_header_of_a_stream_tells_its_length_before_there_is_any_audio(
    audio_format: str, to_rate: int | None
) -> None:
    header = StreamEncoder(audio_format, RATE, 2, 64_001, SEED, to_rate).push(torch.zeros(2, 0))
    length = 64_001 * (to_rate or RATE) // RATE
    if audio_format == "wav":
        assert (len(header), int.from_bytes(header[40:44], "little")) == (44, length * 4)
        assert int.from_bytes(header[4:8], "little") == length * 4 + 36
    else:
        assert int.from_bytes(header[18:26], "big") & (2**36 - 1) == length


def test_a_wav_longer_than_its_header_can_tell_says_the_most() -> None:
    header = StreamEncoder("wav", RATE, 2, 2**40, SEED).push(torch.zeros(2, 0))
    assert (header[4:8], header[40:44]) == (b"\xff\xff\xff\xff", b"\xdb\xff\xff\xff")


@pytest.mark.parametrize("audio_format", FORMATS)
def test_a_stream_without_samples_ends_without_an_error(audio_format: str) -> None:
    encoder = StreamEncoder(audio_format, RATE, 2, 0, SEED)
    assert (encoder.push(torch.zeros(2, 0)) + encoder.finish())[:4] in (b"RIFF", b"OggS", b"fLaC", b"")


@pytest.mark.parametrize("audio_format", FORMATS)
@pytest.mark.parametrize("finish", [False, True])
def test_a_closed_encoder_leaves_nothing_to_the_garbage_collector(audio_format: str, finish: bool) -> None:
    encode(music(100), RATE, audio_format, SEED)  # what the libraries keep
    gc.collect()
    gc.disable()
    try:
        encoder = StreamEncoder(audio_format, RATE, 2, RATE, SEED)
        assert encoder.push(music(RATE // 2, 2))
        if finish:
            encoder.finish()
        encoder.close()
        del encoder
        assert not [item for item in gc.get_objects() if issubclass(type(item), av.container.Container)]
    finally:
        gc.enable()


@pytest.mark.parametrize("audio_format", [name for name in FILES if name != "wav"])
def test_a_closed_encoder_refuses_more(audio_format: str) -> None:
    encoder = StreamEncoder(audio_format, RATE, 1, RATE, SEED)
    encoder.push(music(3_000))
    encoder.close()
    encoder.close()
    for again in (lambda: encoder.push(music(RATE)), encoder.finish):
        with pytest.raises(ValueError, match="is closed"):
            again()


@pytest.mark.parametrize("audio_format", FORMATS)
def test_an_encoder_can_be_dropped_without_being_closed(audio_format: str) -> None:
    encoder = StreamEncoder(audio_format, RATE, 2, RATE, SEED)
    assert encoder.push(music(RATE // 2, 2))
    del encoder
    gc.collect()
    assert encode(music(RATE, 2), RATE, audio_format, SEED).data


def test_media_type_and_sample_rate_are_told_before_anything_is_sent() -> None:
    for audio_format in FORMATS:
        whole = encode(music(3_200), RATE, audio_format, SEED)
        encoder = StreamEncoder(audio_format, RATE, 1, 3_200, SEED)
        assert (encoder.content_type, encoder.sample_rate) == (whole.content_type, whole.sample_rate)


def test_wrong_uses_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="no encoder for 'aiff'"):
        encode(music(100), RATE, "aiff", SEED)
    with pytest.raises(ValueError, match="3 channels cannot be written"):
        encode(torch.zeros(3, 100), RATE, "wav", SEED)
    with pytest.raises(ValueError, match="2 channels cannot take audio with 1"):
        StreamEncoder("wav", RATE, 2, 100, SEED).push(music(100))
