"""An audio file written while its audio is made."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import SEEK_CUR, SEEK_SET
from typing import Protocol

import lameenc
import numpy as np
import soundfile
from torch import Tensor

from handler.audio import CONTENT_TYPES, OPUS_SAMPLE_RATE, ogg_serial, set_ogg_serial, to_int16
from handler.stream_audio.resampler import StreamResampler

OGG_PAGE_MILLISECONDS = 200.0  # libsndfile's own choice, a second, is long to wait for the first sound
_SET_OGG_PAGE_LATENCY_MS = 0x1302  # libsndfile's command, which soundfile does not name
MP3_KILOBITS = 192  # a second, constant; half below 32 kHz
_UNKNOWN_SIZE = 0xFFFF_FFFF


class _Writer(Protocol):
    """Writes one file: 16-bit samples `[T, C]` in, bytes out."""

    def write(self, pcm: np.ndarray) -> bytes: ...

    def close(self) -> bytes: ...


@dataclass(slots=True)
class StreamEncoder:
    """Encodes one streamed reply. The bytes of all pushes and of `finish`, in order, are one file.

    The file does not depend on how the audio was cut into pushes. Against `handler.audio.encode`'s file of the same
    samples and seed:

    * `pcm`: the same bytes;
    * `mp3`: of the same bit rate, by lame itself; it is one encoder's work, so it has no gaps, but its first frame
      cannot tell the length, so its delay (about 50 ms) is heard, once, at the front;
    * `wav`: the same samples; the header says 0xFFFFFFFF for both sizes, which players take for "until it ends";
    * `flac`: the same samples; the header tells of no checksum (0), of no frame sizes (0), and of the length that
      `create` was given, or 0: "unknown" to the format, which libsndfile alone among decoders does not read;
    * `ogg` (Opus): the same samples after resampling to 48 kHz, in pages of 200 ms instead of a second.

    Attributes:
        content_type: the reply's media type.
        sample_rate: of the audio in the file, in Hz; 48000 for ogg whatever the model's.
    """

    content_type: str
    sample_rate: int
    channels: int
    _writer: _Writer
    _resampler: StreamResampler | None

    @classmethod
    def create(
        cls, audio_format: str, sample_rate: int, channels: int, seed: int, length: int | None = None
    ) -> StreamEncoder:
        """Begin a file in one of the formats of `CONTENT_TYPES`.

        Args:
            sample_rate: of the audio that will be pushed, in Hz.
            seed: the request's, for ogg's stream serial number.
            length: samples per channel that will be pushed, where that is known; flac says so in its header.

        Raises:
            ValueError: for another format.
        """
        rate = OPUS_SAMPLE_RATE if audio_format == "ogg" else sample_rate
        writer: _Writer
        match audio_format:
            case "wav":
                writer = _PcmWriter(_wav_header(rate, channels))
            case "pcm":
                writer = _PcmWriter(b"")
            case "mp3":
                writer = _Mp3Writer(rate, channels)
            case "flac":
                writer = _FlacWriter(rate, channels, length or 0)
            case "ogg":
                writer = _OpusWriter(rate, channels, ogg_serial(seed))
            case _:
                raise ValueError(f"no encoder for {audio_format!r}")
        resampler = StreamResampler(sample_rate, rate) if rate != sample_rate else None
        return cls(CONTENT_TYPES[audio_format], rate, channels, writer, resampler)

    def push(self, wav: Tensor) -> bytes:
        """Add samples, float32 `[C, m]` in [-1, 1] (what is outside is cut); the bytes that are final, perhaps none.

        Raises:
            ValueError: when `C` is not the number of channels of the file.
        """
        if wav.shape[-1] == 0:
            return b""
        if wav.shape[0] != self.channels:
            raise ValueError(f"a file with {self.channels} channels cannot take audio with {wav.shape[0]}")
        wav = wav.detach().cpu().float()
        return self._write(self._resampler.push(wav) if self._resampler else wav)

    def finish(self) -> bytes:
        """The rest of the file; nothing can be pushed after it."""
        rest = self._write(self._resampler.finish()) if self._resampler else b""
        return rest + self._writer.close()

    def _write(self, wav: Tensor) -> bytes:
        return self._writer.write(to_int16(wav)) if wav.shape[-1] else b""


def _wav_header(sample_rate: int, channels: int) -> bytes:
    frame = 2 * channels
    layout = struct.pack("<IHHIIHH", 16, 1, channels, sample_rate, sample_rate * frame, frame, 16)
    sizes = struct.pack("<I", _UNKNOWN_SIZE)
    return b"RIFF" + sizes + b"WAVEfmt " + layout + b"data" + sizes


class _PcmWriter:
    """The samples themselves after a header."""

    def __init__(self, header: bytes) -> None:
        self._header = header

    def write(self, pcm: np.ndarray) -> bytes:
        header, self._header = self._header, b""
        return header + pcm.tobytes()

    def close(self) -> bytes:
        return self._header


class _Mp3Writer:
    def __init__(self, sample_rate: int, channels: int) -> None:
        self._encoder = lameenc.Encoder()
        self._encoder.set_in_sample_rate(sample_rate)
        self._encoder.set_channels(channels)
        self._encoder.set_bit_rate(MP3_KILOBITS if sample_rate >= 32_000 else MP3_KILOBITS // 2)
        self._encoder.set_quality(2)  # of 0 (best) to 9
        self._encoder.silence()

    def write(self, pcm: np.ndarray) -> bytes:
        return bytes(self._encoder.encode(pcm.tobytes()))

    def close(self) -> bytes:
        # lame refuses to flush what it never began
        return bytes(self._encoder.encode(b"") + self._encoder.flush())


class _FinalBytes:
    """The file that libsndfile believes it writes: keeps what is appended until taken, and drops what is rewritten.

    When closing a flac file libsndfile goes back to complete its header; those bytes have left by then.
    """

    def __init__(self) -> None:
        self._kept = bytearray()
        self._size = self._position = 0

    def write(self, data: bytes) -> int:
        if self._position == self._size:
            self._kept += data
            self._size += len(data)
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        base = 0 if whence == SEEK_SET else self._position if whence == SEEK_CUR else self._size
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def take(self) -> bytes:
        taken, self._kept = bytes(self._kept), bytearray()
        return taken


class _FlacWriter:
    def __init__(self, sample_rate: int, channels: int, length: int) -> None:
        self._out = _FinalBytes()
        self._file = soundfile.SoundFile(self._out, "w", sample_rate, channels, "PCM_16", format="FLAC")
        self._length = length
        self._begun = False

    def write(self, pcm: np.ndarray) -> bytes:
        self._file.write(pcm)
        return self._take()

    def close(self) -> bytes:
        self._file.close()
        return self._take()

    def _take(self) -> bytes:
        data = self._out.take()
        if data and not self._begun:
            self._begun = True
            # the number of samples is the low 36 bits of STREAMINFO's bytes 10 to 17 (RFC 9639, 8.2), zero so far
            fields = int.from_bytes(data[18:26], "big") | self._length
            data = data[:18] + fields.to_bytes(8, "big") + data[26:]
        return data


class _OpusWriter:
    def __init__(self, sample_rate: int, channels: int, serial: int) -> None:
        self._out = _FinalBytes()
        self._file = soundfile.SoundFile(self._out, "w", sample_rate, channels, "OPUS", format="OGG")
        self._serial = serial
        milliseconds = soundfile._ffi.new("double *", OGG_PAGE_MILLISECONDS)
        soundfile._snd.sf_command(self._file._file, _SET_OGG_PAGE_LATENCY_MS, milliseconds, 8)

    def write(self, pcm: np.ndarray) -> bytes:
        self._file.write(pcm)
        # libsndfile never leaves a page half written
        return set_ogg_serial(self._out.take(), self._serial)

    def close(self) -> bytes:
        self._file.close()
        return set_ogg_serial(self._out.take(), self._serial)
