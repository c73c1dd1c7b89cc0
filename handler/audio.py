"""Audio at the server's edge: read what is uploaded, convert, normalise, encode what is sent.

A waveform is a float32 tensor of shape [C, T] with values nominally in [-1, 1]; a sample rate is in Hz.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import julius
import lameenc
import numpy as np
import pyloudnorm
import soundfile
import torch
from torch import Tensor

from handler.errors import RequestError

READABLE_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE, SAMPLE_RATE_STEP = 8_000, 192_000, 25
MAX_CHANNELS = 8

LOUDNESS_TARGET = -14.0  # LUFS
LOUDNESS_FLOOR = 2e-3  # RMS under which a signal is taken for silence and left as it is
PEAK_HEADROOM = 10 ** (-1 / 20)
RMS_TARGET = 10 ** (-18 / 20)

OPUS_SAMPLE_RATE = 48_000
MP3_BIT_RATE = 192  # kbit/s, constant

# A recorder that writes to a pipe cannot know the length and puts a huge one in the header.
_OPEN_ENDED_WAV = 0x7FFF_F000
_WAV_DATA_CHUNK = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def read_audio(data: bytes, field: str, max_seconds: float) -> tuple[Tensor, int]:
    """Decode an uploaded file (wav, flac, mp3 or ogg) of at most `max_seconds`.

    The length, the channels and the sample rate are checked on the header, before anything is decoded, and the
    length again while decoding, since a header can lie. The size in bytes is the caller's to check.

    Returns:
        the waveform, float32 [C, T], and its sample rate in Hz.

    Raises:
        RequestError: for `field`, when the file cannot be read, is truncated, empty, too long, or holds samples
            that are not numbers.
    """
    if not data:
        raise RequestError(field, "the audio file is empty")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file, field, max_seconds)
            samples = file.read(file.frames + 1, dtype="float32", always_2d=True)  # [T, C]
            claimed, sample_rate = file.frames, file.samplerate
    except (soundfile.SoundFileError, TypeError, OverflowError) as error:
        raise RequestError(
            field, f"not a readable wav, flac, mp3 or ogg file, or a damaged or truncated one ({_reason(error)})"
        ) from error
    if len(samples) < claimed:
        raise RequestError(
            field, f"the file is truncated: its header tells of {claimed} samples, {len(samples)} are there"
        )
    if not np.isfinite(samples).all():
        raise RequestError(field, "the audio holds samples that are not finite numbers (NaN or infinity)")
    return torch.from_numpy(np.ascontiguousarray(samples.T)), sample_rate


def _check_header(file: soundfile.SoundFile, field: str, max_seconds: float) -> None:
    if file.format not in READABLE_FORMATS:
        raise RequestError(field, f"{file.format} files are not read; send wav, flac, mp3 or ogg")
    rate = file.samplerate
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE or rate % SAMPLE_RATE_STEP:
        raise RequestError(
            field,
            f"its sample rate must be from {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz and a multiple of "
            f"{SAMPLE_RATE_STEP}, as all common ones are, not {rate}; resample the file first",
        )
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise RequestError(field, f"it must have from 1 to {MAX_CHANNELS} channels, not {file.channels}")
    # libsndfile trims a wav's length to what is there and tells of it only in its log
    chunk = _WAV_DATA_CHUNK.search(file.extra_info)
    if chunk and int(chunk[2]) < int(chunk[1]) < _OPEN_ENDED_WAV:
        raise RequestError(
            field, f"the file is truncated: its header tells of {chunk[1]} bytes of samples, {chunk[2]} are there"
        )
    if file.frames <= 0:
        raise RequestError(field, "the audio holds no samples")
    if file.frames > max_seconds * rate:
        raise RequestError(
            field, f"the audio must be at most {max_seconds:g} seconds long, not {file.frames / rate:.6g}"
        )


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).strip().rstrip(".")


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

    Raises:
        ValueError: as `convert_channels`.
    """
    return convert_channels(julius.resample_frac(wav, from_rate, to_rate), to_channels)


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


@dataclass(frozen=True, slots=True)
class EncodedAudio:
    """An audio file in memory.

    Attributes:
        data: the file's bytes.
        content_type: its media type.
        sample_rate: of the audio in the file, in Hz; 48000 for ogg whatever the model's.
    """

    data: bytes
    content_type: str
    sample_rate: int


CONTENT_TYPES = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "pcm": "audio/pcm",
}


def encode(wav: Tensor, sample_rate: int, audio_format: str, seed: int) -> EncodedAudio:
    """Write `[C, T]` as 16-bit wav or flac, mp3, ogg (Opus) or pcm (raw little-endian 16-bit, interleaved).

    The same waveform and seed give the same bytes. Opus takes 48 kHz and not 32, so ogg is resampled; mp3 carries
    its encoder's delay, about 50 ms, at the front, as every mp3 does.
    """
    if audio_format == "ogg":
        wav, sample_rate = julius.resample_frac(wav, sample_rate, OPUS_SAMPLE_RATE), OPUS_SAMPLE_RATE
    pcm = to_int16(wav)
    match audio_format:
        case "wav":
            data = _write(pcm, sample_rate, "WAV", "PCM_16")
        case "flac":
            data = _write(pcm, sample_rate, "FLAC", "PCM_16")
        case "ogg":
            data = set_ogg_serial(_write(pcm, sample_rate, "OGG", "OPUS"), serial=zlib.crc32(b"%d" % seed))
        case "mp3":
            data = _write_mp3(pcm, sample_rate)
        case "pcm":
            data = pcm.tobytes()
        case _:
            raise ValueError(f"no encoder for {audio_format!r}")
    return EncodedAudio(data, CONTENT_TYPES[audio_format], sample_rate)


def to_int16(wav: Tensor) -> np.ndarray:
    """Samples `[C, T]` in [-1, 1] as little-endian 16-bit integers `[T, C]`; what is outside is cut, never wrapped."""
    samples = wav.detach().cpu().T.double().nan_to_num(0.0).clamp(-1, 1).mul(32767).round()
    return np.ascontiguousarray(samples.numpy().astype("<i2"))


def _write(pcm: np.ndarray, sample_rate: int, container: str, subtype: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, sample_rate, format=container, subtype=subtype)
    return buffer.getvalue()


def _write_mp3(pcm: np.ndarray, sample_rate: int) -> bytes:
    encoder = lameenc.Encoder()
    encoder.silence()
    encoder.set_in_sample_rate(sample_rate)
    encoder.set_out_sample_rate(sample_rate)
    encoder.set_channels(pcm.shape[1])
    encoder.set_bit_rate(MP3_BIT_RATE)
    encoder.set_quality(2)
    return bytes(encoder.encode(pcm.tobytes()) + encoder.flush())


def set_ogg_serial(data: bytes, serial: int) -> bytes:
    """Give every page of an ogg file this stream serial number and the checksum that follows from it (RFC 3533).

    libsndfile draws the number at random, the only thing that differs between two encodings of one waveform.
    """
    file = bytearray(data)
    start = 0
    while start < len(file):
        segments = file[start + 26]
        end = start + 27 + segments + sum(file[start + 27 : start + 27 + segments])
        file[start + 14 : start + 18] = serial.to_bytes(4, "little")
        file[start + 22 : start + 26] = bytes(4)
        file[start + 22 : start + 26] = ogg_checksum(file[start:end]).to_bytes(4, "little")
        start = end
    return bytes(file)


def ogg_checksum(page: bytes | bytearray) -> int:
    """CRC-32 with polynomial 0x04c11db7, most significant bit first, no inversion (RFC 3533).

    It is zlib's CRC with every byte and the result mirrored, and zlib's two inversions undone.
    """
    mirrored = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
