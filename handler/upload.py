"""An uploaded audio file: what came is checked for its size at once, and for all else while a decoder reads it."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handler.audio import AudioConverter
from handler.decoder import Decoder, Decoding, FileRefusedError
from handler.errors import RequestError

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE, SAMPLE_RATE_STEP = 8_000, 192_000, 25
MAX_CHANNELS = 8
MAX_LEVEL = 100.0  # full scale is 1

# Decoding the longest file allowed takes as much work at most as if it were this.
COMMON_SAMPLE_RATE, COMMON_CHANNELS = 48_000, 2

_LINK = re.compile(rb"[\s\"'<]*(?:(?:blob:)?[a-z][a-z0-9+.-]*://|blob:|//[\w-]+\.|www\.)", re.IGNORECASE)
_FILE_NAME = re.compile(rb"@?[^\0-\x1f]{0,200}\.[A-Za-z0-9]{2,5}")
_DATA_URL = re.compile(rb"\s*data:", re.IGNORECASE)
_LINE_BREAK = re.compile(rb"[ \t]*[\r\n]+[ \t]*|\t+")
_URL_SAFE = bytes.maketrans(b"-_ ", b"+/+")  # a form that is not encoded turns each + into a space


@dataclass(frozen=True, slots=True)
class Sound:
    """What was read from a file, or from a part of it.

    Attributes:
        seconds: that the whole file lasts.
        sample_rate: of what was read, in Hz.
        converter: holds what was read.
    """

    seconds: float
    sample_rate: int
    converter: AudioConverter

    @property
    def length(self) -> int:
        """Samples of each channel."""
        return self.converter.length

    def wav(self, first: int = 0, last: int | None = None) -> Tensor:
        """Samples of it, float32 `[C, last - first]`, in memory of their own; at first all of them."""
        return self.converter.part(first, last).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class Upload:
    """An audio file that has not been looked into yet; `open_upload` makes one.

    Attributes:
        field: the request field it came in, for error messages.
        data: the file.
        min_seconds, max_seconds: that it may last.
    """

    field: str
    data: bytes
    min_seconds: float
    max_seconds: float

    def read(
        self,
        decoder: Decoder,
        sample_rate: int | None = None,
        channels: int | None = None,
        start: float | None = None,
        end: float | None = None,
        wanted: Callable[[], bool] = lambda: True,
        check: Callable[[float], None] = lambda seconds: None,
    ) -> Sound:
        """Decode the file to its end, and keep the part between two times in seconds; None: its beginning, its end.

        Args:
            sample_rate, channels: to convert it to, while it is decoded; None: as in the file.
            wanted: asked every moment; once it is false, nothing more is decoded.
            check: told now and then how many seconds have been kept; what it raises ends the reading.

        Raises:
            RequestError: when the file cannot be read, is damaged or truncated anywhere, is too short or too long,
                has a sample rate or a number of channels that are not read, or holds samples that are no audio.
            DecoderLostError, DecodingAbandonedError: as `Decoder.open`.
        """
        try:
            decoding = decoder.open(self.data, start, end, self.max_seconds, wanted)
            self._check_format(decoding)
            rate, number = sample_rate or decoding.sample_rate, channels or decoding.channels
            return self._read(decoding, AudioConverter(decoding.sample_rate, rate, number), rate, check)
        except FileRefusedError as error:
            raise RequestError(self.field, str(error)) from error

    def _read(
        self, decoding: Decoding, converter: AudioConverter, to_rate: int, check: Callable[[float], None]
    ) -> Sound:
        rate, channels = decoding.sample_rate, decoding.channels
        longest = min(self.max_seconds, self.max_seconds * COMMON_SAMPLE_RATE * COMMON_CHANNELS / (rate * channels))
        decoded = kept = 0
        for block in decoding:
            decoded = block.decoded
            if decoded > longest * rate:
                raise RequestError(self.field, self._too_long(longest, decoding))
            if len(block.samples):
                self._check_level(block.samples)
                kept += len(block.samples)
                # Rows side by side: a mean over channels has other last bits where they are not.
                converter.add(torch.from_numpy(np.array(block.samples.T, order="C")))
                check(kept / rate)
        seconds = decoding.length / rate
        if decoding.length > longest * rate:
            raise RequestError(self.field, self._too_long(longest, decoding))
        if seconds < self.min_seconds:
            raise RequestError(
                self.field, f"the audio must be at least {self.min_seconds:.4g} seconds long, not {seconds:.4g}"
            )
        converter.finish()
        return Sound(seconds, to_rate, converter)

    def _check_format(self, decoding: Decoding) -> None:
        rate, channels = decoding.sample_rate, decoding.channels
        if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE or rate % SAMPLE_RATE_STEP:
            raise RequestError(
                self.field,
                f"its sample rate must be from {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz and a multiple of "
                f"{SAMPLE_RATE_STEP}, as all common ones are, not {rate}; resample the file first",
            )
        if not 1 <= channels <= MAX_CHANNELS:
            raise RequestError(self.field, f"it must have from 1 to {MAX_CHANNELS} channels, not {channels}")

    def _too_long(self, longest: float, decoding: Decoding) -> str:
        if longest == self.max_seconds:
            return f"the audio must be at most {longest:g} seconds long, and it is longer"
        return (
            f"with {decoding.channels} channels at {decoding.sample_rate} Hz, the audio must be at most {longest:.4g} "
            f"seconds long, and it is longer; resample it to {COMMON_SAMPLE_RATE} Hz or mix it down first"
        )

    def _check_level(self, samples: NDArray[np.float32]) -> None:
        peak = float(np.abs([samples.min(), samples.max()]).max())
        if not np.isfinite(peak):
            raise RequestError(self.field, "the audio holds samples that are not finite numbers (NaN or infinity)")
        if peak > MAX_LEVEL:
            raise RequestError(
                self.field, f"the audio holds samples of {peak:.3g}, where full scale is 1; at most {MAX_LEVEL:g}"
            )


def open_upload(
    value: str | bytes | bytearray, field: str, max_bytes: int, min_seconds: float, max_seconds: float
) -> Upload:
    """Take an uploaded file, or a base64 text or data URL of one, without looking into it.

    Raises:
        RequestError: for `field`, when it is empty, too large, a link, or a text that is neither.
    """
    data = _file_of(value, field, max_bytes)
    if not data:
        raise RequestError(field, "the audio file is empty")
    return Upload(field, data, min_seconds, max_seconds)


def _file_of(value: str | bytes | bytearray, field: str, max_bytes: int) -> bytes:
    # base64 takes 4 bytes for 3, may be broken into lines, and percent signs take more
    if len(value) > 2 * max_bytes:
        raise RequestError(field, f"the audio must be at most {max_bytes} bytes")
    head = value[:256].encode(errors="replace") if isinstance(value, str) else bytes(value[:256])
    if _LINK.match(head):
        raise RequestError(
            field, f"links are not fetched; send the file: upload it (-F {field}=@song.mp3) or give its base64"
        )
    if len(value) <= 205 and _FILE_NAME.fullmatch(head):
        raise RequestError(field, f"is a file's name; send the file itself: upload it (-F {field}=@song.mp3)")
    data = _from_base64(value)
    if data is None and isinstance(value, str):
        raise RequestError(
            field, f"the text is not valid base64 of an audio file; to upload the file itself, use -F {field}=@song.mp3"
        )
    data = bytes(value) if data is None else data  # type: ignore[arg-type]
    if len(data) > max_bytes:
        raise RequestError(field, f"the audio must be at most {max_bytes} bytes, not {len(data)}")
    return data


def _from_base64(value: str | bytes | bytearray) -> bytes | None:
    """The decoded bytes of a base64 text or data URL; None if it is neither (no audio file's bytes are)."""
    if not value.isascii():
        return None
    text = value.encode() if isinstance(value, str) else bytes(value)
    if _DATA_URL.match(text):
        text = unquote_to_bytes(text.partition(b",")[2])
    text = _LINE_BREAK.sub(b"", text.strip()).rstrip(b"=").translate(_URL_SAFE)
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        return None
