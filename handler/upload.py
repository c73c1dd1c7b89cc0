"""An uploaded audio file: checked by its header, then decoded only as far as it is needed.

A file's header is believed about its length before anything is decoded, and never afterwards: no more is read than the
header tells of, and less than that is an error.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from dataclasses import dataclass

import numpy as np
import soundfile
import torch
from torch import Tensor

from handler.errors import RequestError

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE, SAMPLE_RATE_STEP = 8_000, 192_000, 25
MAX_CHANNELS = 8
MAX_LEVEL = 100.0  # full scale is 1

# Decoded, the longest file allowed takes as much memory at most as if it were this.
COMMON_SAMPLE_RATE, COMMON_CHANNELS = 48_000, 2

# A recorder that writes to a pipe cannot know the length: a wav has a huge one then, a flac none.
_OPEN_ENDED_WAV = 0x7FFF_F000
_UNKNOWN_FRAMES = 2**63 - 1
# Of the samples, or in an RF64 of the whole file.
_WAV_SIZE = re.compile(r"^(?:data|  Riff size) : (\d+) \(should be (\d+)\)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Upload:
    """An audio file with an acceptable header; `open_upload` makes one.

    Attributes:
        field: the request field it came in, for error messages.
        data: the file.
        frames: samples of each channel.
        sample_rate: in Hz.
    """

    field: str
    data: bytes
    frames: int
    sample_rate: int

    @property
    def seconds(self) -> float:
        return self.frames / self.sample_rate

    def read(self, start: float | None = None, end: float | None = None) -> Tensor:
        """Decode the part between two times in seconds; None is the beginning, or the end.

        Returns:
            float32 [C, T].

        Raises:
            RequestError: when the file is damaged or truncated before `end`, or holds samples that are no audio.
        """
        first = 0 if start is None else round(start * self.sample_rate)
        last = self.frames if end is None else min(self.frames, round(end * self.sample_rate))
        try:
            with soundfile.SoundFile(io.BytesIO(self.data)) as file:
                # in one piece and from the beginning: soundfile seeks after each piece, which an mp3 does not survive
                samples = file.read(last, dtype="float32", always_2d=True)  # [T, C]
        except (soundfile.SoundFileError, TypeError, OverflowError) as error:
            raise _unreadable(self.field, error) from error
        if len(samples) < last:
            raise RequestError(
                self.field,
                f"the file is truncated: its header tells of {self.frames} samples, {len(samples)} are there",
            )
        samples = samples[first:]
        peak = float(np.abs([samples.min(), samples.max()]).max())
        if not np.isfinite(peak):
            raise RequestError(self.field, "the audio holds samples that are not finite numbers (NaN or infinity)")
        if peak > MAX_LEVEL:
            raise RequestError(
                self.field, f"the audio holds samples of {peak:.3g}, where full scale is 1; at most {MAX_LEVEL:g}"
            )
        # Rows side by side: a mean over channels has other last bits where they are not.
        return torch.from_numpy(np.array(samples.T, order="C"))


def open_upload(
    value: str | bytes | bytearray, field: str, max_bytes: int, min_seconds: float, max_seconds: float
) -> Upload:
    """Check an uploaded file (wav, flac, mp3 or ogg; or a base64 text or data URL of one) without decoding it.

    Raises:
        RequestError: for `field`, when it is too large, cannot be read, is too short or too long, or has a sample
            rate or a number of channels that are not read.
    """
    data = _file_of(value, field, max_bytes)
    if not data:
        raise RequestError(field, "the audio file is empty")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file, field, min_seconds, max_seconds)
            return Upload(field, data, file.frames, file.samplerate)
    except (soundfile.SoundFileError, TypeError, OverflowError) as error:
        raise _unreadable(field, error) from error


def _file_of(value: str | bytes | bytearray, field: str, max_bytes: int) -> bytes:
    # base64 takes 4 bytes for 3, and may be broken into lines
    if len(value) > 2 * max_bytes:
        raise RequestError(field, f"the audio must be at most {max_bytes} bytes")
    data = _from_base64(value)
    if data is None and isinstance(value, str):
        raise RequestError(field, "the text is not valid base64")
    data = bytes(value) if data is None else data  # type: ignore[arg-type]
    if len(data) > max_bytes:
        raise RequestError(field, f"the audio must be at most {max_bytes} bytes, not {len(data)}")
    return data


def _from_base64(value: str | bytes | bytearray) -> bytes | None:
    """The decoded bytes of a base64 text or data URL; None if it is neither (no audio file's bytes are)."""
    if not value.isascii():
        return None
    text = value.encode() if isinstance(value, str) else bytes(value)
    if text[:5] == b"data:":
        text = text.partition(b",")[2]
    try:
        return base64.b64decode(re.sub(rb"[\r\n\t ]", b"", text), validate=True)
    except binascii.Error:
        return None


def _check_header(file: soundfile.SoundFile, field: str, min_seconds: float, max_seconds: float) -> None:
    if file.format not in FORMATS:
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
    size = _WAV_SIZE.search(file.extra_info)
    if size and int(size[2]) < int(size[1]) < _OPEN_ENDED_WAV:
        raise RequestError(field, f"the file is truncated: its header tells of {size[1]} bytes, {size[2]} are there")
    if file.frames <= 0:
        raise RequestError(field, "the audio holds no samples")
    if file.frames == _UNKNOWN_FRAMES:
        raise RequestError(
            field,
            "its header does not tell how long the audio is, as when it was written to a pipe; write it to a file",
        )
    seconds = file.frames / rate
    if seconds < min_seconds:
        raise RequestError(field, f"the audio must be at least {min_seconds:.4g} seconds long, not {seconds:.4g}")
    if seconds > max_seconds:
        raise RequestError(field, f"the audio must be at most {max_seconds:g} seconds long, not {seconds:.6g}")
    longest = max_seconds * COMMON_SAMPLE_RATE * COMMON_CHANNELS / (rate * file.channels)
    if seconds > longest:
        raise RequestError(
            field,
            f"with {file.channels} channels at {rate} Hz, the audio must be at most {longest:.4g} seconds long, "
            f"not {seconds:.6g}; resample it to {COMMON_SAMPLE_RATE} Hz or mix it down first",
        )


def _unreadable(field: str, error: Exception) -> RequestError:
    reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
    return RequestError(field, f"not a readable wav, flac, mp3 or ogg file, or a damaged or truncated one ({reason})")
