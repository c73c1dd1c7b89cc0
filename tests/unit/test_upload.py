from __future__ import annotations

import base64
import io
import struct
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from handler.errors import RequestError
from handler.upload import Upload, open_upload
from tests.ogg import ogg_checksum

pytestmark = pytest.mark.faults

FORMATS = [
    ("WAV", "PCM_16", 44_100),
    ("WAV", "FLOAT", 32_000),
    ("WAV", "PCM_U8", 8_000),
    ("FLAC", "PCM_24", 192_000),
    ("MP3", "MPEG_LAYER_III", 44_100),
    ("OGG", "OPUS", 48_000),
    ("OGG", "VORBIS", 22_050),
]


def tone(seconds: float, sample_rate: int = 32_000, channels: int = 1) -> np.ndarray:
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return 0.3 * np.sin(2 * np.pi * 220 * np.arange(1, channels + 1) * time[:, None])  # [T, C]


def file_of(samples: np.ndarray, sample_rate: int = 32_000, container: str = "WAV", subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate, format=container, subtype=subtype)
    return buffer.getvalue()


def wav_claiming(samples: int, there: bytes = b"", sample_rate: int = 16_000) -> bytes:
    size = samples * 2
    return (
        b"RIFF"
        + struct.pack("<I", (36 + size) & 0xFFFFFFFF)
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, sample_rate, sample_rate * 2 & 0xFFFFFFFF, 2, 16)
        + b"data"
        + struct.pack("<I", size & 0xFFFFFFFF)
        + there
    )


def flac_claiming(samples: int) -> bytes:
    data = bytearray(file_of(tone(0.5), 32_000, "FLAC", "PCM_16"))
    fields = int.from_bytes(data[18:26], "big") >> 36 << 36
    data[18:26] = (fields | samples).to_bytes(8, "big")
    return bytes(data)


def ogg_claiming(samples: int) -> bytes:
    data = bytearray(file_of(tone(0.5), 32_000, "OGG", "VORBIS"))
    last = data.rindex(b"OggS")
    data[last + 6 : last + 14] = samples.to_bytes(8, "little")
    data[last + 22 : last + 26] = bytes(4)
    data[last + 22 : last + 26] = ogg_checksum(data[last:]).to_bytes(4, "little")
    return bytes(data)


def mp3_claiming(frames: int) -> bytes:
    data = bytearray(file_of(tone(0.5), 32_000, "MP3", "MPEG_LAYER_III"))
    header = max(data.find(b"Xing"), data.find(b"Info"))
    data[header + 8 : header + 12] = frames.to_bytes(4, "big")
    return bytes(data)


def silence(seconds: float, sample_rate: int, container: str, subtype: str, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", sample_rate, channels, format=container, subtype=subtype) as file:
        for _ in range(int(seconds / 10)):
            file.write(np.zeros((10 * sample_rate, channels), "float32"))
    return buffer.getvalue()


def opened(value: Any, max_seconds: float = 10.0) -> Upload:
    return open_upload(value, "melody", 1_000_000, 0.02, max_seconds)


@pytest.mark.parametrize(("container", "subtype", "sample_rate"), FORMATS)
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_each_format_is_read_with_its_channels_rate_and_length(
    container: str, subtype: str, sample_rate: int, channels: int
) -> None:
    channels = min(channels, 2) if container == "MP3" else channels
    upload = opened(file_of(tone(0.5, sample_rate, channels), sample_rate, container, subtype))
    assert upload.sample_rate == sample_rate
    assert upload.seconds == 0.5
    wav = upload.read()
    assert wav.dtype == torch.float32
    assert wav.shape == (channels, sample_rate // 2)


@pytest.mark.parametrize(("container", "subtype", "sample_rate"), FORMATS)
def test_a_part_is_the_same_samples_as_in_the_whole(container: str, subtype: str, sample_rate: int) -> None:
    upload = opened(file_of(tone(2.0, sample_rate, 2), sample_rate, container, subtype))
    first, last = round(0.7 * sample_rate), round(1.3 * sample_rate)
    assert torch.equal(upload.read(0.7, 1.3), upload.read()[:, first:last])
    assert torch.equal(upload.read(end=90.0), upload.read())


def test_a_wav_keeps_its_samples() -> None:
    samples = tone(0.25, channels=2).astype("float32")
    assert np.array_equal(opened(file_of(samples)).read().T.numpy(), samples)


def test_base64_and_data_urls_are_the_file() -> None:
    data = file_of(tone(0.1))
    text = base64.b64encode(data).decode()
    lines = "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for value in (text, text.encode(), lines, "data:audio/wav;base64," + text, bytearray(data)):
        assert opened(value).data == data


def test_a_wav_from_a_pipe_whose_header_cannot_know_its_length_is_read() -> None:
    assert opened(wav_claiming(0x7FFFFFFF, there=bytes(3200))).read().shape == (1, 1600)


def test_silence_is_audio_like_any_other() -> None:
    assert not opened(silence(10, 32_000, "FLAC", "PCM_16")).read().any()


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (b"", "empty"),
        ("", "empty"),
        ("data:audio/wav;base64", "empty"),
        ("not base64!", "not valid base64"),
        ("🎵", "not valid base64"),
        ("AAA", "not valid base64"),
        ("A" * 2_000_004, "at most 1000000 bytes"),
        (bytes(1_000_001), "at most 1000000 bytes, not 1000001"),
        (b"\xff" * 2_000_001, "at most 1000000 bytes"),
        (b"\x00" * 4096, "not a readable"),
        (b"<html>no audio h\xe9re</html>", "not a readable"),
        (b"<!doctype html><html><body>404 not found</body></html>", "not a readable"),
        (b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(200), "not a readable"),
        (b"\xff\xfb" + bytes(2000), "not a readable"),
        (file_of(tone(0.1), 32_000, "AIFF", "PCM_16"), "AIFF files are not read"),
        (wav_claiming(0), "no samples"),
        (wav_claiming(1, there=bytes(2)), "at least 0.02 seconds long, not 6.25e-05"),
        (wav_claiming(16_000 * 36_000), "truncated"),
        (wav_claiming(48_000 * 36_000, sample_rate=48_000), "no samples"),
        (wav_claiming(16_000, there=bytes(8_000)), "truncated"),
        (wav_claiming(100, there=bytes(200), sample_rate=1), "sample rate must be from 8000 to 192000 Hz"),
        (wav_claiming(100, there=bytes(200), sample_rate=1_000_000), "sample rate must be from 8000 to 192000 Hz"),
        (wav_claiming(100, there=bytes(200), sample_rate=44_101), "a multiple of 25"),
        (file_of(tone(0.1, channels=9)), "channels, not 9"),
        (file_of(tone(0.02, channels=200)), "channels, not 200"),
        (file_of(tone(11.0), 32_000, "FLAC", "PCM_16"), "at most 10 seconds long, not 11"),
        (flac_claiming(0), "does not tell how long"),
        (flac_claiming(2**36 - 1), "at most 10 seconds long, not 2.14748e\\+06"),
        (mp3_claiming(2**31 - 1), "at most 10 seconds long"),
        (silence(3600, 8_000, "FLAC", "PCM_16"), "at most 10 seconds long, not 3600"),
        (silence(300, 8_000, "MP3", "MPEG_LAYER_III"), "at most 10 seconds long, not 300"),
        (silence(300, 8_000, "OGG", "VORBIS"), "at most 10 seconds long, not 300"),
        (silence(10, 192_000, "FLAC", "PCM_16", 8), "with 8 channels at 192000 Hz, the audio must be at most 0.625"),
    ],
)
def test_what_cannot_be_taken_is_refused_before_anything_is_decoded(
    value: Any, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: Any, **options: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    monkeypatch.setattr(soundfile.SoundFile, "buffer_read_into", read)
    with pytest.raises(RequestError, match=complaint) as caught:
        opened(value)
    assert caught.value.field == "melody"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (flac_claiming(32_000 * 9), "damaged or truncated|is truncated"),
        *(
            (file_of(tone(3.0, rate), rate, container, subtype)[: int(cut)], "truncated")
            for container, subtype, rate, cut in [
                ("WAV", "PCM_16", 32_000, 9_999),
                ("RF64", "PCM_16", 32_000, 9_999),
                ("FLAC", "PCM_16", 32_000, 20_000),
                ("MP3", "MPEG_LAYER_III", 32_000, 8_000),
                ("OGG", "OPUS", 48_000, 8_000),
            ]
        ),
        (file_of(np.full((1000, 1), np.nan)), "not finite"),
        (file_of(np.full((1000, 2), np.inf)), "not finite"),
        (file_of(np.r_[np.zeros(1000), -np.inf, 0]), "not finite"),
        (file_of(np.full(1000, 1e30)), "samples of 1e\\+30, where full scale is 1"),
        (file_of(np.full(1000, -101.0)), "at most 100"),
    ],
)
def test_a_file_that_is_not_what_its_header_says_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint) as caught:
        opened(data).read()
    assert caught.value.field == "melody"


@pytest.mark.parametrize("claimed", [2**62, 2**40, 32_000 * 9])
def test_an_ogg_that_claims_more_than_it_holds_is_no_longer_for_it(claimed: int) -> None:
    assert opened(ogg_claiming(claimed)).read().shape[1] < 20_000


def test_no_more_is_decoded_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = []
    original = soundfile.SoundFile.read

    def read(file: soundfile.SoundFile, count: int, **options: Any) -> Any:
        frames.append(count)
        return original(file, count, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    opened(silence(10, 8_000, "FLAC", "PCM_16")).read(1.0, 2.0)
    assert frames == [16_000]
